"""transformers loads what we save, and we load what it saves, in both of its formats, bitwise."""

import json

import jax
import numpy as np
import pytest

from intellect3.models import hf, presets
from intellect3.models.stored import directory as stored
from tests.models import helpers

SIZES = dict(vocab_size=97, embed_dim=32, mlp_dim=48)
CONFIGS = {
  "glm4_moe": helpers.small(qk_norm=True, num_shared_experts=2),
  "qwen3": presets.tiny_qwen3(**SIZES, tie_embeddings=False),
  "qwen3_tied": presets.tiny_qwen3(**SIZES, tie_embeddings=True),
  "qwen3_moe": presets.tiny_qwen3_moe(**SIZES, num_experts_per_token=1),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_through_transformers(tmp_path, family):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = CONFIGS[family]
  params = helpers.random_params(config)
  hf.save(tmp_path / "ours", config, params, shard_bytes=40_000)
  model, told = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", dtype=torch.float32, output_loading_info=True
  )
  assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for original in (True, False):
    theirs = tmp_path / f"theirs_{original}"
    model.save_pretrained(theirs, save_original_format=original, max_shard_size="50KB")
    loaded, again = hf.load(theirs, remat_policy=config.remat_policy)
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # Its config, with all it holds besides, travels on.
    hf.save(tmp_path / "onwards", loaded, again, source=theirs)
    values, its = (
      json.loads((place / "config.json").read_text()) for place in (tmp_path / "onwards", theirs)
    )
    assert "pad_token_id" in values and its.keys() - values.keys() <= {"transformers_version"}
    assert hf.load(tmp_path / "onwards", remat_policy=config.remat_policy)[0] == config


def test_fused_experts_of_another_shape_are_not_taken(tmp_path):
  config = CONFIGS["qwen3_moe"]
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  hf.save(tmp_path, config, helpers.random_params(config))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  model.save_pretrained(tmp_path / "fused", save_original_format=False)
  names = stored.scan(tmp_path / "fused")[0]
  assert "model.layers.1.mlp.experts.gate_up_proj" in names  # else nothing was tested above
  values = json.loads((tmp_path / "fused" / "config.json").read_text())
  values["moe_intermediate_size"] += 1
  (tmp_path / "fused" / "config.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match=r"unexpected: model.layers.0.mlp.experts.gate_up_proj"):
    hf.check(tmp_path / "fused")
