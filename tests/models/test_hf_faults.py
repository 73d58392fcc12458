"""What is wrong with a checkpoint is told at once, in full, before a tensor is read."""

import json
import struct

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intellect3.models import hf
from intellect3.models.hf import write
from intellect3.models.stored import directory as stored
from intellect3.models.stored import formats
from tests.models import helpers

CONFIG = helpers.small()
TIED = helpers.small(tie_embeddings=True)
NEXTN = "num_nextn_predict_layers"


@pytest.fixture
def params():
  return helpers.random_params(CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  hf.save(directory, CONFIG, helpers.random_params(CONFIG))
  return directory


def assert_same(given, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), given, expected
  )


def rewrite(directory, change, **config):
  """Changes the tensors (in place, as a dict) and the config of a checkpoint."""
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  path = directory / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def problems(directory):
  with pytest.raises(ValueError) as error:
    hf.check(directory)
  first, *lines = str(error.value).splitlines()
  assert str(directory) in first
  return sorted(line.strip() for line in lines)


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path, params):
  hf.save(tmp_path, CONFIG, params)

  def spoil(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    tensors["model.layers.0.self_attn.rotary.weight"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.ones(64, np.int32)

  rewrite(tmp_path, spoil)
  assert problems(tmp_path) == [
    "broken: model.layers.1.self_attn.q_proj.bias in model.safetensors: dtype: expected one of "
    "F64, F32, F16, BF16, got 'I32'",
    "misshapen: lm_head.weight: expected [97, 32], got [32, 97]",
    "missing: model.layers.1.mlp.experts.4.up_proj.weight",
    "missing: model.norm.weight",
    "unexpected: model.layers.0.self_attn.rotary.weight",
  ]


def test_a_cut_and_an_absent_file_among_several(tmp_path, params):
  hf.save(tmp_path, CONFIG, params, shard_bytes=30_000)
  index = json.loads((tmp_path / formats.INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  assert len(files) > 3
  cut, absent = tmp_path / files[1], tmp_path / files[2]
  cut.write_bytes(cut.read_bytes()[:-1])
  absent.unlink()
  lines = problems(tmp_path)
  lost = [name for name, file in index["weight_map"].items() if file == files[2]]
  last = [name for name, file in index["weight_map"].items() if file == files[1]][-1]
  size = cut.stat().st_size
  assert lines == sorted(
    [
      f"unreadable: {files[2]}: No such file or directory",
      f"truncated: {last}: expected {files[1]} to have {size + 1} bytes, got {size}",
      *(f"missing: {name} (the index says it is in {files[2]})" for name in lost),
    ]
  )


def repack(path, change):
  """Changes a file's header and bytes: (header, bytearray) -> None."""
  data = path.read_bytes()
  start = 8 + struct.unpack("<Q", data[:8])[0]
  header, tensors = json.loads(data[8:start]), bytearray(data[start:])
  change(header, tensors)
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def test_bytes_that_are_two_tensors_or_nobodys(tmp_path, params):
  hf.save(tmp_path, CONFIG, params)
  path = tmp_path / "model.safetensors"
  whole, offsets = path.read_bytes(), {}

  def look(header, _):
    offsets.update((n, e["data_offsets"]) for n, e in header.items() if "shape" in e)

  repack(path, look)
  order = sorted(offsets, key=offsets.get)
  at = order.index("model.layers.0.mlp.up_proj.weight")
  before, first, second, after = order[at - 2 : at + 2]  # first (gate) is as large as second
  begin, end = offsets[first]

  def share(header, _):
    header[second]["data_offsets"] = [begin, end]

  def gap(header, tensors):
    tensors[begin:begin] = bytes(24)
    for name in order[at - 1 :]:
      header[name]["data_offsets"] = [offset + 24 for offset in offsets[name]]

  misplaced = (
    "misplaced: {} in model.safetensors: expected its bytes right behind {}, at {}, got {}"
  )
  for change, expected in (
    (
      lambda _, tensors: tensors.extend(b"xxxx"),
      [f"unexpected: 4 bytes in model.safetensors behind {order[-1]}"],
    ),
    (
      share,
      [
        misplaced.format(second, first, end, begin),
        misplaced.format(after, second, end, offsets[after][0]),
      ],
    ),
    (gap, [misplaced.format(first, before, begin, begin + 24)]),
  ):
    path.write_bytes(whole)
    repack(path, change)
    assert problems(tmp_path) == sorted(expected)
    with pytest.raises(safetensors.SafetensorError):
      safetensors.safe_open(path, "np")


def test_an_index_that_does_not_say_what_there_is(tmp_path, params):
  hf.save(tmp_path, CONFIG, params, shard_bytes=30_000)
  path = tmp_path / formats.INDEX
  index = json.loads(path.read_text())
  weight_map = index["weight_map"]
  true = weight_map["model.norm.weight"]
  other = next(file for file in weight_map.values() if file != true)
  index["weight_map"]["model.norm.weight"] = other
  path.write_text(json.dumps(index))
  assert problems(tmp_path) == [
    f"missing: model.norm.weight (the index says it is in {other})",
    f"unexpected: model.norm.weight (in {true}, of which the index knows not)",
  ]
  for weights in (None, ["a"], {"a": 3}, {"a": "../b.safetensors"}):
    path.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ValueError, match="expected an object `weight_map` of file names"):
      hf.check(tmp_path)


def test_broken_directories_say_what_is_wrong(tmp_path, params):
  with pytest.raises(ValueError, match=r"config.json: cannot be read: No such file"):
    hf.load(tmp_path)
  hf.save(tmp_path, CONFIG, params)
  config_file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
  config, data = json.loads(config_file.read_text()), weights.read_bytes()
  for damaged, message in (
    (data[:-100], r"truncated: \S+: expected model.safetensors to have"),
    (data[:50], "unreadable: model.safetensors: .* truncated: the header ends after 42"),
    (b"", "unreadable: model.safetensors"),
    (struct.pack("<Q", 4) + b"[1] ", "expected an object, got list"),
  ):
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
      hf.load(tmp_path)
  weights.unlink()
  with pytest.raises(ValueError, match=r"expected model.safetensors or .* found neither"):
    hf.load(tmp_path)
  weights.write_bytes(data)
  for text, message in (
    ("{", "no valid JSON"),
    ("[]", "expected a JSON object, got list"),
    (json.dumps({**config, "model_type": "llama"}), "model_type: expected one of .*'llama'"),
    (json.dumps({**config, "hidden_act": "gelu"}), "hidden_act: expected 'silu', got 'gelu'"),
    (json.dumps({**config, "n_group": 3}), "num_expert_groups: expected a divisor"),
    (json.dumps({**config, "num_attention_heads": 3}), "num_heads: expected a multiple of"),
    (json.dumps({**config, "vocab_size": "many"}), "vocab_size"),
    (json.dumps({**config, "hidden_size": None}), "config.json: .*'hidden_size'"),
    (json.dumps({**config, NEXTN: "1"}), f"{NEXTN}: expected an integer of at least 0, got '1'"),
    (json.dumps({**config, NEXTN: -1}), f"{NEXTN}: expected an integer of at least 0, got -1"),
    ("[" * 100_000, "config.json: no valid JSON"),
  ):
    config_file.write_text(text)
    with pytest.raises(ValueError, match=message):
      hf.load(tmp_path)
  config_file.write_text(json.dumps(config))
  assert_same(hf.load(tmp_path)[1], params)


def test_extra_layers_are_left_or_kept_as_asked(tmp_path, params, caplog):
  caplog.set_level("INFO")
  source, extra = tmp_path / "source", np.arange(6, dtype=np.float16).reshape(2, 3)
  hf.save(source, CONFIG, params)
  add = {"model.layers.3.eh_proj.weight": extra, "model.layers.3.mlp.gate.weight": extra}
  rewrite(source, lambda tensors: tensors.update(add))
  assert problems(source) == [f"unexpected: {name} (num_nextn_predict_layers is 0)" for name in add]
  rewrite(source, lambda tensors: None, num_nextn_predict_layers=1)
  assert_same(hf.load(source)[1], params)
  assert "2 tensors (0.000 GB) of layers past the last" in caplog.text
  for extras, said in (("keep", "kept"), ("drop", "dropped")):
    hf.save(tmp_path / extras, CONFIG, params, source=source, extras=extras, dtype="bfloat16")
    assert f"2 extra tensors (0.000 GB) of layers past the last: {said}" in caplog.text
    places, _ = stored.scan(tmp_path / extras)
    assert (set(add) <= set(places)) == (extras == "keep")
    hf.check(tmp_path / extras)
    config = json.loads((tmp_path / extras / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == (extras == "keep")
  places, _ = stored.scan(tmp_path / "keep")
  for name in add:
    kept = stored.mapped(tmp_path / "keep", places[name])
    assert kept.dtype == np.float16
    np.testing.assert_array_equal(kept, extra)
  rewrite(source, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": extra}))
  assert problems(source) == ["unexpected: model.layers.2.eh_proj.weight"]


def test_a_tied_head_must_repeat_the_embedding(tmp_path):
  params = helpers.random_params(TIED)
  hf.save(tmp_path, TIED, params)
  head = params["embedding"].copy()
  rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
  assert_same(hf.load(tmp_path)[1], params)
  head[96, 31] += 1e-3
  rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
  with pytest.raises(ValueError, match=r"lm_head\.weight: expected the embedding's values"):
    hf.load(tmp_path)
  rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head[1:]}))
  assert problems(tmp_path) == [
    "misshapen: lm_head.weight: expected the embedding's shape, as it is tied to it"
  ]


def test_dtypes_of_a_stack_must_agree_or_be_converted(tmp_path, params):
  hf.save(tmp_path, CONFIG, params)
  name = "model.layers.2.self_attn.q_proj.weight"
  half = params["moe_layers"]["attention"]["q"]["kernel"].copy()
  half[1] = half[1].astype(np.float16)
  rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
  with pytest.raises(ValueError, match=r"q_proj.weight: expected one dtype .*float16.*float32"):
    hf.load(tmp_path)
  loaded = hf.load(tmp_path, dtype="float32")[1]
  np.testing.assert_array_equal(loaded["moe_layers"]["attention"]["q"]["kernel"], half)


@pytest.mark.filterwarnings("error")
def test_a_dtype_too_small_for_the_values_names_every_tensor(tmp_path, params):
  params["head"][3, 5], params["final_norm"]["scale"][0] = -1e6, 65504
  params["moe_layers"]["moe"]["experts"]["up"][1, 2, 3, 4] = 7e4
  params["moe_layers"]["moe"]["router"]["correction_bias"][0, 0] = 1e6  # float32 always
  params["embedding"][0, 0] = np.inf  # was so before
  expected = [
    "lm_head.weight: float16 holds up to 65504, got 1e+06",
    "model.layers.2.mlp.experts.2.up_proj.weight: float16 holds up to 65504, got 70000",
  ]

  def refused(act):
    with pytest.raises(ValueError, match=r"dtype: expected one .* too small for 2:") as error:
      act()
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == expected

  refused(lambda: hf.save(tmp_path / "half", CONFIG, params, dtype="float16"))
  assert not (tmp_path / "half").exists()
  hf.save(tmp_path / "whole", CONFIG, params)
  refused(lambda: hf.load(tmp_path / "whole", dtype="float16"))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda leaf: place, params)
  refused(lambda: hf.load_sharded(tmp_path / "whole", CONFIG, shardings, dtype="float16"))
  hf.save(tmp_path / "brain", CONFIG, params, dtype="bfloat16")  # ends as late as float32, almost
  with pytest.raises(ValueError, match=r"lm_head\.weight: float16 holds up to 65504, got 999424"):
    hf.load(tmp_path / "brain", dtype="float16")
  params["head"][3, 5] = np.finfo(np.float32).max
  with pytest.raises(ValueError, match=r"lm_head\.weight: bfloat16 holds up to 3.38953e"):
    dict((name, tensor.read()) for name, tensor in write.tensors(CONFIG, params, "bfloat16"))


@settings(
  max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_header_never_reads_as_a_checkpoint(whole, tmp_path, data):
  """Whatever bytes of the header change, the tensors are the same or a ValueError says why not."""
  true = (whole / "model.safetensors").read_bytes()
  length = 8 + struct.unpack("<Q", true[:8])[0]
  damaged = bytearray(true)
  for _ in range(data.draw(st.integers(1, 3))):
    damaged[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
  (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
  (tmp_path / "model.safetensors").write_bytes(damaged)
  places, _ = stored.scan(whole)
  try:
    hf.check(tmp_path)
  except ValueError:
    return
  found, _ = stored.scan(tmp_path)
  for name, place in found.items():
    assert place.shape == places[name].shape
    assert place.start + place.bytes <= len(damaged)
