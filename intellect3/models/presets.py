"""Models by name: values, not code paths. Change one with `dataclasses.replace` or by argument."""

from typing import Any

from intellect3.models.config import ModelConfig


def tiny(*, vocab_size: int = 264, **changes: Any) -> ModelConfig:
  """The demo's model, about 139K parameters: one dense and one MoE layer of the GLM-4.5 family.

  Args:
    vocab_size: at least the renderer's.
    **changes: any other field of ModelConfig.
  """
  values: dict[str, Any] = dict(
    family="glm4_moe",
    vocab_size=vocab_size,
    embed_dim=64,
    num_layers=2,
    num_dense_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    expert_mlp_dim=32,
    num_experts=8,
    num_experts_per_token=2,
    num_shared_experts=1,
    rope_theta=10_000.0,
    partial_rotary_factor=0.5,
    attention_bias=True,
    qk_norm=False,
    max_positions=4096,
    remat_policy="none",
  )
  return ModelConfig(**{**values, **changes})


def glm_4_5_air(**changes: Any) -> ModelConfig:
  """GLM-4.5-Air, the base of INTELLECT-3: 106B parameters, 12B of them active.

  From the `config.json` of zai-org/GLM-4.5-Air-Base. Computes in bfloat16 over float32 parameters.

  Args:
    **changes: any field of ModelConfig.
  """
  values: dict[str, Any] = dict(
    family="glm4_moe",
    vocab_size=151552,
    embed_dim=4096,
    num_layers=46,
    num_dense_layers=1,
    num_heads=96,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=10944,
    expert_mlp_dim=1408,
    num_experts=128,
    num_experts_per_token=8,
    num_shared_experts=1,
    routed_scaling_factor=1.0,
    norm_topk_prob=True,
    rope_theta=1e6,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-5,
    attention_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    max_positions=131072,
    dtype="bfloat16",
    remat_policy="full",
    expert_block_size=128,
  )
  return ModelConfig(**{**values, **changes})
