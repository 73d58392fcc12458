"""Checkpoints out and in: bitwise, sharded, and what a broken one says."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

from intellect3.models import hf, presets
from intellect3.models.config import ModelConfig
from intellect3.models.hf import companions, names, write
from intellect3.models.stored import aside
from tests.models import helpers

CONFIG = helpers.small()


@pytest.fixture
def params():
  return helpers.random_params(CONFIG)


def assert_same(given, expected):
  def check(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

  jax.tree.map(check, given, expected)


FAMILIES = {
  "glm": CONFIG,
  "glm_tied": helpers.small(
    tie_embeddings=True, qk_norm=True, attention_bias=False, num_shared_experts=0
  ),
  "qwen3": presets.tiny_qwen3(embed_dim=32, mlp_dim=48, vocab_size=97, tie_embeddings=False),
  "qwen3_tied": presets.tiny_qwen3(embed_dim=32, mlp_dim=48, vocab_size=97, tie_embeddings=True),
  "qwen3_moe": presets.tiny_qwen3_moe(embed_dim=32, mlp_dim=48, vocab_size=97),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 20_000])
def test_round_trip_is_bitwise(tmp_path, family, shard_bytes):
  config = FAMILIES[family]
  params = helpers.random_params(config)
  hf.save(tmp_path, config, params, shard_bytes=shard_bytes, threads=2)
  files = list(tmp_path.glob("*.safetensors"))
  assert (len(files) > 2) == (shard_bytes == 20_000)
  loaded, again = hf.load(tmp_path, remat_policy=config.remat_policy)
  assert loaded == config
  assert_same(again, params)
  assert set(dict(hf.to_hf(config, params))) == {slot.name for slot in names.slots(config)}
  # And out again: the same bytes, file by file.
  hf.save(tmp_path / "again", loaded, again, shard_bytes=shard_bytes, threads=1)
  for file in files:
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_device_arrays_are_saved_as_host_arrays_are(tmp_path, params, monkeypatch):
  on_device = jax.tree.map(jax.numpy.asarray, params)
  hf.save(tmp_path / "whole", CONFIG, on_device)
  monkeypatch.setattr(write, "_FETCH_BYTES", 1000)  # most leaves leave tensor by tensor
  hf.save(tmp_path / "parts", CONFIG, on_device)
  for part in ("whole", "parts"):
    assert_same(hf.load(tmp_path / part)[1], params)


def test_bfloat16_out_and_in(tmp_path, params):
  hf.save(tmp_path, CONFIG, params, dtype="bfloat16")
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
  config, half = hf.load(tmp_path)
  assert config.dtype == config.param_dtype == "bfloat16"
  rounded = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if "correction" in str(path) else leaf.astype(ml_dtypes.bfloat16),
    params,
  )
  assert_same(half, rounded)
  config, wide = hf.load(tmp_path, dtype="float32")
  assert config.dtype == config.param_dtype == "float32"
  assert_same(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))
  assert hf.load(tmp_path, dtype="float32", remat_policy="dots")[0].remat_policy == "dots"


def test_tensors_have_the_layout_of_linear_layers(params):
  tensors = dict(hf.to_hf(CONFIG, params))
  layer = params["moe_layers"]
  q, o = layer["attention"]["q"]["kernel"], layer["attention"]["o"]["kernel"]
  given = tensors["model.layers.2.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(given, q[1].reshape(32, 64).T)
  given = tensors["model.layers.1.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(given, o[0].reshape(64, 32).T)
  given = tensors["model.layers.2.mlp.experts.5.gate_proj.weight"]
  np.testing.assert_array_equal(given, layer["moe"]["experts"]["gate"][1, 5].T)
  assert all(tensor.flags.c_contiguous for tensor in tensors.values())
  with pytest.raises(ValueError, match=r"embedding: expected \[97, 32\], got \[96, 32\]"):
    dict(hf.to_hf(CONFIG, {**params, "embedding": params["embedding"][1:]}))


TRAVELLERS = (
  *("tokenizer.json", "chat_template.jinja", "generation_config.json", "vocab.txt", "LICENSE"),
  *("modeling_own.py", "additional_chat_templates/tool_use.jinja"),
)
LEFT = ("old.bin", "old.gguf", "original/params.json", "big.txt")
ANEW = ("old.safetensors", "pytorch_model.bin.index.json", "manifest.json", ".gitattributes")


def source_directory(directory, **config):
  """A checkpoint directory without tensors: what travels along, and a config with more in it."""
  directory.mkdir()
  for name in (*TRAVELLERS, *LEFT, *ANEW):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(name)
  more = {"eos_token_id": [5, 6], "pad_token_id": 5, "torch_dtype": "bfloat16", "a_flag": True}
  (directory / "config.json").write_text(json.dumps({**CONFIG.to_hf(), **more, **config}))
  return directory


def test_what_travels_along(tmp_path, params, caplog, monkeypatch):
  caplog.set_level("INFO")
  monkeypatch.setattr(companions, "MOST_BYTES", 100)
  source = source_directory(tmp_path / "source")
  (source / "big.txt").write_text("x" * 101)
  out = tmp_path / "out"
  hf.save(out, CONFIG, params, source=source)
  with safetensors.safe_open(out / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}
  for name in TRAVELLERS:
    assert (out / name).read_text() == name
  written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
  assert written == {*TRAVELLERS, "config.json", "model.safetensors"}
  assert "not copied along: big.txt, old.bin, old.gguf, original\n" in caplog.text
  config = json.loads((out / "config.json").read_text())
  assert config["eos_token_id"] == [5, 6] and config["pad_token_id"] == 5 and config["a_flag"]
  # Said of the tensors that are there, not of those of the source.
  assert config["dtype"] == "float32" and "torch_dtype" not in config
  assert config["num_nextn_predict_layers"] == 0
  assert hf.load(out, remat_policy=CONFIG.remat_policy)[0] == CONFIG
  hf.save(out, CONFIG, params, source=source)  # again, where it all is already
  assert (out / TRAVELLERS[-1]).is_file()


def test_a_source_must_be_of_the_same_model(tmp_path, params):
  source = source_directory(tmp_path / "source", mlp_only_layers=[0])
  hf.save(tmp_path / "out", CONFIG, params, source=source)  # what no field of ours is read from
  qwen3 = FAMILIES["qwen3"]
  other = source_directory(
    tmp_path / "other", sliding_window=None, layer_types=["sliding_attention"]
  )
  with pytest.raises(ValueError, match=r"partial_rotary_factor|layer_types"):
    hf.save(tmp_path / "out", qwen3, helpers.random_params(qwen3), source=other)
  for options, message in (
    ({"source": tmp_path / "nowhere"}, "source: expected a directory"),
    ({"extras": "all"}, "extras: expected one of .*'all'"),
    ({"extras": "keep"}, "extras: expected a source"),
  ):
    with pytest.raises(ValueError, match=message):
      hf.save(tmp_path / "never", CONFIG, params, **options)
  assert not (tmp_path / "never").exists()


def test_a_save_that_breaks_off_leaves_nothing(tmp_path, params, monkeypatch):
  old = helpers.random_params(CONFIG, 1)
  hf.save(tmp_path / "there", CONFIG, old, shard_bytes=20_000)
  (tmp_path / "there" / "notes.txt").write_text("mine")

  def broken(*args, **options):
    raise OSError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(companions, "write_config", broken)
    for name in ("there", "new"):
      with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path / name, CONFIG, params)
  assert [path.name for path in tmp_path.iterdir()] == ["there"]
  assert_same(hf.load(tmp_path / "there")[1], old)
  # Broken off between two files: no checkpoint any more, and not the half of two.
  with monkeypatch.context() as patch:
    patch.setattr(aside.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
      hf.save(tmp_path / "there", CONFIG, params)
  with pytest.raises(ValueError, match=r"config.json: cannot be read"):
    hf.load(tmp_path / "there")
  hf.save(tmp_path / "there", CONFIG, old, shard_bytes=20_000)
  # One file takes the place of several, and nobody else's file is touched.
  hf.save(tmp_path / "there", CONFIG, params)
  assert_same(hf.load(tmp_path / "there")[1], params)
  assert {path.name for path in (tmp_path / "there").iterdir()} == {
    *("config.json", "model.safetensors", "notes.txt")
  }
  with pytest.raises(ValueError, match="expected a directory, got the file"):
    hf.save(tmp_path / "there" / "notes.txt", CONFIG, params)


GLM_4_5_AIR = {
  "architectures": ["Glm4MoeForCausalLM"],
  "attention_bias": True,
  "attention_dropout": 0.0,
  "pad_token_id": 151329,
  "eos_token_id": [151329, 151336, 151338],
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "partial_rotary_factor": 0.5,
  "initializer_range": 0.02,
  "intermediate_size": 10944,
  "max_position_embeddings": 131072,
  "model_type": "glm4_moe",
  "moe_intermediate_size": 1408,
  "norm_topk_prob": True,
  "num_attention_heads": 96,
  "n_group": 1,
  "topk_group": 1,
  "n_routed_experts": 128,
  "n_shared_experts": 1,
  "routed_scaling_factor": 1.0,
  "num_experts_per_tok": 8,
  "first_k_dense_replace": 1,
  "num_hidden_layers": 46,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "num_nextn_predict_layers": 1,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.54.0",
  "use_cache": True,
  "use_qk_norm": False,
  "vocab_size": 151552,
}


def test_configs_of_transformers_4_and_5():
  options = dict(param_dtype="float32", remat_policy="full", expert_block_size=128)
  air = presets.glm_4_5_air()
  assert ModelConfig.from_hf(GLM_4_5_AIR, **options) == air
  five = {k: v for k, v in GLM_4_5_AIR.items() if not k.startswith(("rope", "partial", "torch"))}
  five["dtype"] = "bfloat16"
  five["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
  five["rope_parameters"]["partial_rotary_factor"] = 0.5
  assert ModelConfig.from_hf(five, **options) == air
  del five["rope_parameters"]
  with pytest.raises(ValueError, match="rope_theta"):
    ModelConfig.from_hf(five)
  with pytest.raises(ValueError, match="rope_type: expected 'default', got 'yarn'"):
    ModelConfig.from_hf({**GLM_4_5_AIR, "rope_scaling": {"rope_type": "yarn"}})


def test_transformers_reads_our_config_as_we_mean_it():
  transformers = pytest.importorskip("transformers")
  for config in (presets.glm_4_5_air(), presets.tiny(partial_rotary_factor=1.0)):
    theirs = transformers.Glm4MoeConfig(**config.to_hf()).to_dict()
    run = {k: getattr(config, k) for k in ("dtype", "remat_policy", "expert_block_size")}
    assert ModelConfig.from_hf(theirs, **run) == config


def test_wrong_fields_are_named():
  for changes, message in (
    ({"family": "gpt"}, "family: expected one of .*'gpt'"),
    ({"dtype": "float8"}, "dtype: expected one of .*'float8'"),
    ({"num_layers": 0}, "num_layers: expected an integer of at least 1, got 0"),
    ({"num_dense_layers": 5}, r"num_dense_layers: expected 0 to num_layers \(2\), got 5"),
    ({"num_kv_heads": 3}, r"num_heads: expected a multiple of num_kv_heads \(3\), got 4"),
    ({"num_experts_per_token": 9}, r"num_experts_per_token: expected at most num_experts \(8\)"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected 0 to 1"),
  ):
    with pytest.raises(ValueError, match=message):
      presets.tiny(**changes)
