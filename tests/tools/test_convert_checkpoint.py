"""Conversion both ways: bitwise, restorable by Orbax, from a run's checkpoints; bad input."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore as ts

from intellect3.models import hf, presets
from intellect3.models.stored import directory as stored
from intellect3.training.state import TrainState
from tests.models import helpers
from tools import convert_checkpoint
from tools.checkpoints import orbax

GLM = helpers.small(qk_norm=True)
CONFIGS = {
  "glm4_moe": GLM,
  "qwen3_tied": presets.tiny_qwen3(vocab_size=97, tie_embeddings=True),
  "qwen3_moe": presets.tiny_qwen3_moe(vocab_size=97),
}
EXTRA = {"model.layers.3.eh_proj.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def assert_same(given, expected):
  assert jax.tree.structure(given) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, given, expected)


def run(*arguments):
  return convert_checkpoint.main([str(argument) for argument in arguments])


def checkpoint(directory, config=GLM, *, seed=0, extra=False, **options):
  """A checkpoint of Hugging Face's kind with a tokenizer; its params."""
  params = helpers.random_params(config, seed)
  hf.save(directory, config, params, **options)
  (directory / "tokenizer.json").write_text("{}")
  values = {**json.loads((directory / "config.json").read_text()), "eos_token_id": 3}
  if extra:
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    safetensors.numpy.save_file({**tensors, **EXTRA}, directory / "model.safetensors")
    values["num_nextn_predict_layers"] = 1
  (directory / "config.json").write_text(json.dumps(values))
  return params


def tensors_of(directory):
  places, faults = stored.scan(directory)
  assert not faults
  return {name: stored.mapped(directory, place) for name, place in places.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_is_bitwise(tmp_path, family, capsys):
  config = CONFIGS[family]
  checkpoint(tmp_path / "hf", config, extra=family == "glm4_moe", dtype="bfloat16")
  stored_params = hf.load(tmp_path / "hf")[1]
  assert run("hf-to-orbax", tmp_path / "hf", tmp_path / "orbax") == 0
  restored = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "params")
  assert_same(restored, stored_params)
  back = tmp_path / "back"
  assert run("orbax-to-hf", tmp_path / "orbax", back, "--shard-gb", 5e-5) == 0
  assert len(list(back.glob("*.safetensors"))) > 2
  before, after = tensors_of(tmp_path / "hf"), tensors_of(back)
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert after[name].dtype == tensor.dtype
    np.testing.assert_array_equal(after[name], tensor, err_msg=name)
  values = [json.loads((d / "config.json").read_text()) for d in (tmp_path / "hf", back)]
  assert values[0] == values[1] and values[1]["eos_token_id"] == 3
  assert (back / "tokenizer.json").read_text() == "{}"
  for pair in (("hf", "orbax"), ("orbax", "back"), ("hf", "back")):
    assert run("verify", *(tmp_path / name for name in pair)) == 0
  assert capsys.readouterr().out.count("the same") == 3


def assert_progress(said, what, expected):
  """The last line says that all bytes are done, and how many those are."""
  line = [line for line in said.splitlines() if line.startswith(f"{what}: ")][-1]
  done, of, total, *_ = line.removeprefix(f"{what}: ").split()
  assert of == "of" and done == total
  assert float(total) * 1e9 == pytest.approx(expected, rel=0.01)


def test_dtypes_and_extras_as_asked(tmp_path, capsys):
  params = checkpoint(tmp_path / "hf", extra=True)
  options = ("--extras", "drop", "--dtype", "bfloat16")
  assert run("hf-to-orbax", tmp_path / "hf", tmp_path / "orbax", *options) == 0
  said = capsys.readouterr().err
  assert "1 extra tensors (0.000 GB) of layers past the last: dropped" in said
  elements = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert_progress(said, "hf-to-orbax", 2 * elements)
  assert not (tmp_path / "orbax" / "extras").exists()
  assert run("orbax-to-hf", tmp_path / "orbax", tmp_path / "back", "--dtype", "float32") == 0
  assert_progress(capsys.readouterr().err, "orbax-to-hf", 4 * elements)
  back = hf.load(tmp_path / "back")[1]
  bias = params["moe_layers"]["moe"]["router"]["correction_bias"]
  np.testing.assert_array_equal(back["moe_layers"]["moe"]["router"]["correction_bias"], bias)
  rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype(np.float32), params)
  np.testing.assert_array_equal(back["embedding"], rounded["embedding"])
  assert run("verify", tmp_path / "orbax", tmp_path / "back") == 0
  said = capsys.readouterr().out
  assert "model.embed_tokens.weight: 1 with the same values  (bfloat16 against float32)" in said
  assert run("verify", tmp_path / "hf", tmp_path / "back") == 1
  said = capsys.readouterr().out
  assert "only in" in said and "model.layers.3.eh_proj.weight" in said and "NOT the same" in said
  # Without the extra tensors it is the roundings that differ.
  assert run("verify", tmp_path / "hf", tmp_path / "back", "--extras", "drop") == 1
  assert "only in" not in capsys.readouterr().out
  rounded = tmp_path / "rounded"
  assert run("hf-to-orbax", tmp_path / "hf", rounded, "--extras", "drop") == 0
  for pair in ((tmp_path / "hf", rounded), (rounded, tmp_path / "hf")):
    assert run("verify", *pair) == 1 and run("verify", *pair, "--extras", "drop") == 0
    assert "compared without those of layers past the last: the same" in capsys.readouterr().out


def test_a_dtype_too_small_is_refused(tmp_path, capsys):
  params = helpers.random_params(GLM)
  params["head"][3, 5], params["final_norm"]["scale"][1] = 1e6, 7e4
  hf.save(tmp_path / "hf", GLM, params)
  assert run("hf-to-orbax", tmp_path / "hf", tmp_path / "orbax") == 0
  capsys.readouterr()
  for command, source in (("hf-to-orbax", "hf"), ("orbax-to-hf", "orbax")):
    assert run(command, tmp_path / source, tmp_path / "half", "--dtype", "float16") == 2
    said = capsys.readouterr().err
    assert "lm_head.weight: float16 holds up to 65504, got 1e+06" in said
    assert "model.norm.weight: float16 holds up to 65504, got 70000" in said
  assert {path.name for path in tmp_path.iterdir()} == {"hf", "orbax"}


def test_differences_are_named_with_their_size(tmp_path, capsys):
  params = checkpoint(tmp_path / "one")
  params["moe_layers"]["moe"]["experts"]["up"][1, 3, 2, 1] += 0.25
  params["final_norm"]["scale"][0] = np.nan
  hf.save(tmp_path / "other", GLM, params)
  assert run("verify", tmp_path / "one", tmp_path / "other") == 1
  lines = capsys.readouterr().out.splitlines()
  assert "model.layers.*.mlp.experts.*.up_proj.weight: 1 of 16 differ, by 0.25 at most" in lines
  assert "  differs: model.layers.2.mlp.experts.3.up_proj.weight" in lines
  assert "model.norm.weight: 1 of 1 differ, by inf at most" in lines
  assert lines[-1].endswith("NOT the same") and len(lines) == 5


def run_directory(root, config=GLM):
  """Two checkpoints of a run, whole arrays in one chunk, the optimizer beside them."""
  optimizer = optax.adam(1e-3)
  made = []
  for step in (2, 7):
    params = helpers.random_params(config, step)
    state = TrainState(np.asarray(step), params, jax.jit(optimizer.init)(params))
    manager = ocp.CheckpointManager(root / "checkpoints")
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    manager.close()
    made.append(params)
  return made


def test_checkpoints_of_a_run(tmp_path):
  run_dir = tmp_path / "run"
  older, newest = run_directory(run_dir)
  assert run("orbax-to-hf", run_dir, tmp_path / "never") == 2  # no config anywhere
  checkpoint(tmp_path / "start", seed=9)
  assert run("orbax-to-hf", run_dir, tmp_path / "a", "--model", tmp_path / "start") == 0
  checkpoint(run_dir / "weights" / "v_000003", seed=9)
  (run_dir / "weights" / "v_000003" / "manifest.json").write_text("{}")
  steps = run_dir / "checkpoints"
  assert run("orbax-to-hf", steps, tmp_path / "b", "--step", 2, "--dtype", "bfloat16") == 0
  assert run("orbax-to-hf", steps / "7", tmp_path / "c") == 0
  assert_same(hf.load(tmp_path / "a")[1], newest)
  assert_same(hf.load(tmp_path / "c")[1], newest)
  np.testing.assert_array_equal(
    hf.load(tmp_path / "b")[1]["embedding"], older["embedding"].astype("bfloat16")
  )
  assert (tmp_path / "b" / "tokenizer.json").is_file()
  assert run("verify", steps, tmp_path / "c") == 0
  assert run("verify", steps, tmp_path / "c", "--step", 2) == 1


@pytest.mark.parametrize("chunk", [(1, 1, 4), (1, 3, 2), (2, 3, 4), (5, 6, 4), (3, 4, 4)])
def test_parts_of_any_chunks_each_read_once(chunk):
  values = np.arange(5 * 6 * 4, dtype=np.float32).reshape(5, 6, 4)
  layout = {"chunk": {"shape": list(chunk)}}
  spec = {"driver": "zarr3", "kvstore": "memory://", "schema": {"chunk_layout": layout}}
  store = ts.open(spec, create=True, dtype=ts.float32, shape=values.shape).result()
  store.write(values).result()
  array = orbax.Array(store)
  for axes in (1, 2):
    for at in np.ndindex(values.shape[:axes]):
      np.testing.assert_array_equal(array.read(at), values[at])
  np.testing.assert_array_equal(array.read(()), values)


def test_bad_input_is_told_and_leaves_nothing(tmp_path, capsys, monkeypatch):
  checkpoint(tmp_path / "hf", shard_bytes=30_000)
  assert run("hf-to-orbax", tmp_path / "hf", tmp_path / "orbax") == 0
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("mine")
  (tmp_path / "empty").mkdir()
  broken = tmp_path / "broken"
  checkpoint(broken, shard_bytes=30_000)
  cut = sorted(broken.glob("*.safetensors"))[1]
  cut.write_bytes(cut.read_bytes()[:-5])
  before = sorted(path.name for path in tmp_path.iterdir())
  capsys.readouterr()
  for arguments, message in (
    (("hf-to-orbax", tmp_path / "nowhere", tmp_path / "x"), "config.json: cannot be read"),
    (("hf-to-orbax", broken, tmp_path / "x"), f"to have {cut.stat().st_size + 5} bytes"),
    (("hf-to-orbax", tmp_path / "hf", tmp_path / "full"), "no directory, or an empty one"),
    (
      ("orbax-to-hf", tmp_path / "empty", tmp_path / "x"),
      "an Orbax checkpoint, found none",
    ),
    (("orbax-to-hf", tmp_path / "orbax", tmp_path / "x", "--step", 3), "with step 3, found none"),
    (("orbax-to-hf", tmp_path / "orbax", tmp_path / "x", "--shard-gb", 0), "--shard-gb: expected"),
    (
      ("orbax-to-hf", tmp_path / "orbax" / "params", tmp_path / "x"),
      "its directory as --model",
    ),
    (("hf-to-orbax", tmp_path / "hf", tmp_path / "hf" / "x"), "outside of the source"),
    (("orbax-to-hf", tmp_path / "orbax", tmp_path / "orbax" / "x" / "y"), "outside of the source"),
    (("hf-to-orbax", tmp_path / "hf", "/proc/xx"), "checkpoint: /proc/xx: cannot be made: No such"),
    (("hf-to-orbax", tmp_path / "orbax", tmp_path / "x"), "kind, got an Orbax checkpoint"),
    (("verify", tmp_path / "hf", tmp_path / "nowhere"), "expected a directory, found none"),
    (("verify", tmp_path / "hf", tmp_path / "orbax", "--step", 1), "are for Orbax checkpoints"),
  ):
    assert run(*arguments) == 2, arguments
    said = capsys.readouterr().err
    assert said.startswith("convert_checkpoint: ") and message in said, said
  # The config of another model beside the arrays.
  config = tmp_path / "orbax" / "model" / "config.json"
  text = config.read_text()
  other = dataclasses.replace(GLM, mlp_dim=40, tie_embeddings=True)
  config.write_text(json.dumps(other.to_hf()))
  assert run("orbax-to-hf", tmp_path / "orbax", tmp_path / "x") == 2
  said = capsys.readouterr().err
  assert "unexpected: head" in said
  assert "misshapen: dense_layers/mlp/gate/kernel: expected [1, 32, 40], got [1, 32, 48]" in said
  config.write_text(text)

  # Bytes that are gone or changed are found when they are read.
  def fails(*_):
    raise ValueError("no room")

  with monkeypatch.context() as patch:
    patch.setattr(orbax, "write", fails)
    assert run("hf-to-orbax", tmp_path / "hf", tmp_path / "x") == 2
  for data in pathlib.Path(tmp_path / "orbax" / "params").rglob("d/*"):
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  assert run("orbax-to-hf", tmp_path / "orbax", tmp_path / "x") == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == before
