"""Models by name: values, not code paths. Change one with `dataclasses.replace` or by argument.

The named ones are from the public `config.json` of the checkpoint that each names; they compute in
bfloat16 over float32 parameters.
"""

from collections.abc import Mapping
from typing import Any

from intellect3.models.config import ModelConfig

_TINY: Mapping[str, Any] = dict(
  embed_dim=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=128,
  rope_theta=10_000.0,
  max_positions=4096,
  remat_policy="none",
)
_TINY_EXPERTS: Mapping[str, Any] = dict(expert_mlp_dim=32, num_experts=8, num_experts_per_token=2)


def tiny(*, vocab_size: int = 264, **changes: Any) -> ModelConfig:
  """The demo's model, about 139K parameters: one dense and one MoE layer of the GLM-4.5 family.

  Args:
    vocab_size: at least the renderer's.
    **changes: any other field of ModelConfig.
  """
  values: dict[str, Any] = dict(
    **_TINY,
    **_TINY_EXPERTS,
    family="glm4_moe",
    vocab_size=vocab_size,
    num_dense_layers=1,
    num_shared_experts=1,
    partial_rotary_factor=0.5,
    attention_bias=True,
  )
  return ModelConfig(**{**values, **changes})


def glm_4_5_air(**changes: Any) -> ModelConfig:
  """GLM-4.5-Air, the base of INTELLECT-3: 106B parameters, 12B of them active.

  From zai-org/GLM-4.5-Air-Base.

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
    rope_theta=1e6,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-5,
    attention_bias=True,
    max_positions=131072,
    dtype="bfloat16",
    expert_block_size=128,
  )
  return ModelConfig(**{**values, **changes})


intellect_3 = glm_4_5_air
"""PrimeIntellect/INTELLECT-3 has the architecture of its base."""

_QWEN3: Mapping[str, Any] = dict(
  family="qwen3",
  vocab_size=151936,
  head_dim=128,
  num_kv_heads=8,
  router_scores="softmax",
  router_bias=False,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  qk_norm=True,
  max_positions=40960,
  dtype="bfloat16",
)


def tiny_qwen3(*, vocab_size: int = 264, **changes: Any) -> ModelConfig:
  """A small dense model of the Qwen3 family with a tied head; arguments as `tiny`'s."""
  values = {**_QWEN3, **_TINY, "num_dense_layers": 2, "tie_embeddings": True, "dtype": "float32"}
  return ModelConfig(**{**values, "vocab_size": vocab_size, **changes})


def tiny_qwen3_moe(*, vocab_size: int = 264, **changes: Any) -> ModelConfig:
  """A small model of the Qwen3-MoE family, experts in every layer; arguments as `tiny`'s."""
  values = {**_QWEN3, **_TINY, **_TINY_EXPERTS, "family": "qwen3_moe", "num_dense_layers": 0}
  return ModelConfig(**{**values, "vocab_size": vocab_size, "dtype": "float32", **changes})


def qwen3_0_6b(**changes: Any) -> ModelConfig:
  """Qwen/Qwen3-0.6B. Args: any field of ModelConfig."""
  return _qwen3_dense(1024, 28, 16, 3072, True, changes)


def qwen3_1_7b(**changes: Any) -> ModelConfig:
  """Qwen/Qwen3-1.7B. Args: any field of ModelConfig."""
  return _qwen3_dense(2048, 28, 16, 6144, True, changes)


def qwen3_4b(**changes: Any) -> ModelConfig:
  """Qwen/Qwen3-4B. Args: any field of ModelConfig."""
  return _qwen3_dense(2560, 36, 32, 9728, True, changes)


def qwen3_8b(**changes: Any) -> ModelConfig:
  """Qwen/Qwen3-8B. Args: any field of ModelConfig."""
  return _qwen3_dense(4096, 36, 32, 12288, False, changes)


def _qwen3_dense(
  embed_dim: int, layers: int, heads: int, mlp_dim: int, tied: bool, changes: dict[str, Any]
) -> ModelConfig:
  sizes: dict[str, Any] = dict(
    embed_dim=embed_dim,
    num_layers=layers,
    num_dense_layers=layers,
    num_heads=heads,
    mlp_dim=mlp_dim,
    tie_embeddings=tied,
  )
  return ModelConfig(**{**_QWEN3, **sizes, **changes})


def qwen3_30b_a3b(**changes: Any) -> ModelConfig:
  """Qwen/Qwen3-30B-A3B: 30B parameters, 3B of them active. Args: any field of ModelConfig."""
  values: dict[str, Any] = dict(
    family="qwen3_moe",
    embed_dim=2048,
    num_layers=48,
    num_dense_layers=0,
    num_heads=32,
    num_kv_heads=4,
    mlp_dim=6144,
    expert_mlp_dim=768,
    num_experts=128,
    num_experts_per_token=8,
    expert_block_size=128,
  )
  return ModelConfig(**{**_QWEN3, **values, **changes})
