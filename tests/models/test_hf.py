"""Checkpoints out and in: bitwise, sharded, and what a broken one says."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from intellect3.models import hf, presets
from intellect3.models.config import ModelConfig
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


def rewrite(directory, change):
  """Loads the tensors of a checkpoint, changes the dict in place and writes them back."""
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
  "changes",
  [{}, {"tie_embeddings": True, "qk_norm": True, "attention_bias": False, "num_shared_experts": 0}],
)
def test_round_trip_is_bitwise(tmp_path, changes):
  config = dataclasses.replace(CONFIG, **changes)
  params = helpers.random_params(config)
  hf.save(tmp_path, config, params)
  loaded, again = hf.load(tmp_path, remat_policy=config.remat_policy)
  assert loaded == config
  assert_same(again, params)


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


def test_metadata_and_tokenizer_files(tmp_path, params):
  source, out = tmp_path / "source", tmp_path / "out"
  source.mkdir()
  for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
    (source / name).write_text(name)
  hf.save(out, CONFIG, params, tokenizer_from=source)
  with safetensors.safe_open(out / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}
  assert (out / "tokenizer.json").read_text() == "tokenizer.json"
  assert (out / "chat_template.jinja").is_file() and (out / "generation_config.json").is_file()
  assert json.loads((out / "config.json").read_text())["model_type"] == "glm4_moe"
  with pytest.raises(ValueError, match="tokenizer_from: expected a directory"):
    hf.save(out, CONFIG, params, tokenizer_from=tmp_path / "nowhere")


def shard(directory):
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  weight_map = {}
  for index, names in enumerate(np.array_split(sorted(tensors), 3)):
    file = f"model-{index + 1:05}-of-00003.safetensors"
    safetensors.numpy.save_file({name: tensors[name] for name in names}, directory / file)
    weight_map |= dict.fromkeys(names.tolist(), file)
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return weight_map


def test_sharded_checkpoints(tmp_path, params):
  hf.save(tmp_path, CONFIG, params)
  weight_map = shard(tmp_path)
  assert_same(hf.load(tmp_path)[1], params)
  (tmp_path / weight_map["lm_head.weight"]).unlink()
  with pytest.raises(ValueError, match=r"model-00001-of-00003.safetensors: no readable"):
    hf.load(tmp_path)


def test_mtp_layers_are_ignored_and_a_tied_head_too(tmp_path, params):
  hf.save(tmp_path, CONFIG, params)
  extra = np.ones(3, np.float32)
  rewrite(tmp_path, lambda t: t.update({"model.layers.3.eh_proj.weight": extra}))
  assert_same(hf.load(tmp_path)[1], params)
  rewrite(tmp_path, lambda t: t.update({"model.layers.2.eh_proj.weight": extra}))
  with pytest.raises(ValueError, match=r"unexpected: model.layers.2.eh_proj.weight"):
    hf.load(tmp_path)


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path, params):
  hf.save(tmp_path, CONFIG, params)

  def spoil(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    tensors["model.layers.0.self_attn.rotary.weight"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()

  rewrite(tmp_path, spoil)
  with pytest.raises(ValueError) as error:
    hf.load(tmp_path)
  lines = str(error.value).splitlines()
  assert str(tmp_path) in lines[0]
  assert sorted(line.strip() for line in lines[1:]) == [
    "misshapen: lm_head.weight: expected [97, 32], got [32, 97]",
    "missing: model.layers.1.mlp.experts.4.up_proj.weight",
    "missing: model.norm.weight",
    "unexpected: model.layers.0.self_attn.rotary.weight",
  ]


def test_broken_directories_say_what_is_wrong(tmp_path, params):
  with pytest.raises(ValueError, match=r"config.json: cannot be read: No such file"):
    hf.load(tmp_path)
  hf.save(tmp_path, CONFIG, params)
  config_file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
  config, data = json.loads(config_file.read_text()), weights.read_bytes()

  weights.write_bytes(data[:-100])
  with pytest.raises(ValueError, match=r"model.safetensors: no readable safetensors file"):
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
  ):
    config_file.write_text(text)
    with pytest.raises(ValueError, match=message):
      hf.load(tmp_path)
  config_file.write_text(json.dumps(config))
  assert_same(hf.load(tmp_path)[1], params)


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
