"""One server for the engine's tests: the recorded model if it is at hand, else one of its shape."""

import pytest
from engine_http import SHARED, random_params, serving

from intellect3.models import hf
from intellect3.models.config import ModelConfig

SHAPE = {
  "architectures": ["Glm4MoeForCausalLM"],
  "model_type": "glm4_moe",
  "vocab_size": 512,
  "hidden_size": 64,
  "num_hidden_layers": 2,
  "first_k_dense_replace": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "intermediate_size": 128,
  "moe_intermediate_size": 32,
  "n_routed_experts": 8,
  "n_shared_experts": 1,
  "num_experts_per_tok": 2,
  "routed_scaling_factor": 1.0,
  "norm_topk_prob": True,
  "n_group": 1,
  "topk_group": 1,
  "hidden_act": "silu",
  "rope_theta": 10000.0,
  "partial_rotary_factor": 0.5,
  "rms_norm_eps": 1e-5,
  "attention_bias": True,
  "use_qk_norm": True,
  "tie_word_embeddings": False,
  "max_position_embeddings": 2048,
}
"""Of the model that answered the recorded requests."""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
  """Directories of two checkpoints of one shape."""
  if (SHARED / "model_a").is_dir():
    return SHARED / "model_a", SHARED / "model_b"
  config = ModelConfig.from_hf(SHAPE)
  directories = []
  for seed in range(2):
    directories.append(tmp_path_factory.mktemp("models") / str(seed))
    hf.save(directories[-1], config, random_params(config, seed))
  return tuple(directories)


@pytest.fixture(scope="session")
def client(models):
  """A client of a server of the first checkpoint, with the recorded context length.

  Tests leave it as they found it: not paused, nothing running, the first checkpoint served.
  """
  with serving(
    models[0], context_length=1024, slots=8, prefill_rows=4, prefill_chunk=16, queue_limit=24
  ) as client:
    yield client
