"""The description of a model: its family, its sizes, and how to run it.

Place in the ring: made by a preset or read from a checkpoint's `config.json`; every part that runs
or sizes the model takes it. A frozen, hashable value: fit for static arguments of `jax.jit`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from intellect3.models import hf_config
from intellect3.models.checks import require

DTYPES = ("float32", "bfloat16", "float16")
ROUTER_SCORES = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A model of some family.

  A dense model has `num_dense_layers == num_layers`; its expert fields mean nothing.

  Attributes:
    family: `glm4_moe`, `qwen3` or `qwen3_moe`: how its checkpoints are written.
    vocab_size: V, rows of the embedding.
    embed_dim: D, width of the residual stream.
    num_layers: L, all layers.
    num_dense_layers: the first so many have a dense MLP, the others experts.
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides N.
    head_dim: H.
    mlp_dim: width of a dense layer's MLP.
    expert_mlp_dim: F, width of one expert.
    num_experts: E, routed experts.
    num_experts_per_token: A, routed experts that a token uses.
    num_expert_groups: groups of E / groups experts, among which a token first chooses.
    num_groups_per_token: groups in which a token's experts may lie.
    num_shared_experts: experts every token uses; one MLP of so many times F.
    router_scores: what makes scores of the router's logits: `sigmoid`, or `softmax` over E.
    router_bias: whether a correction bias, added to the scores, takes part in the choice.
    routed_scaling_factor: factor of the routed experts' weights.
    norm_topk_prob: whether a token's weights are normalised to sum 1 before that factor.
    rope_theta: base of the rotary frequencies.
    partial_rotary_factor: share of each head's dims that is rotated.
    rms_norm_eps: added to the mean square.
    attention_bias: whether q, k and v have a bias.
    qk_norm: whether each head's q and k are normalised (RMSNorm) before the rotation.
    tie_embeddings: whether the head is the embedding transposed.
    max_positions: longest sequence the model was made for.
    dtype: dtype of the computation. Norms, router, softmaxes and sums are float32 in any case.
    param_dtype: dtype in which `transformer.init` makes parameters.
    remat_policy: what the backward pass recomputes; see `remat.POLICIES`.
    attention: implementation of `kernels.attention`; `auto` is the platform's best.
    grouped_matmul: implementation of `kernels.grouped_matmul`; `auto` likewise.
    expert_block_size: most rows of a block of the `blocked` grouped matmul.
    expert_exchange: how tokens travel between devices that hold different experts; see
      `kernels.expert_parallel`.
    expert_receive_rows: most (token, expert) pairs that a device receives at a time.
  """

  family: str = "glm4_moe"
  vocab_size: int
  embed_dim: int
  num_layers: int
  num_dense_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  expert_mlp_dim: int = 0
  num_experts: int = 0
  num_experts_per_token: int = 0
  num_expert_groups: int = 1
  num_groups_per_token: int = 1
  num_shared_experts: int = 0
  router_scores: str = "sigmoid"
  router_bias: bool = True
  routed_scaling_factor: float = 1.0
  norm_topk_prob: bool = True
  rope_theta: float = 1e6
  partial_rotary_factor: float = 1.0
  rms_norm_eps: float = 1e-5
  attention_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = False
  max_positions: int = 131072
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat_policy: str = "full"
  attention: str = "auto"
  grouped_matmul: str = "auto"
  expert_block_size: int = 64
  expert_exchange: str = "auto"
  expert_receive_rows: int = 65_536

  def __post_init__(self) -> None:
    """Raises ValueError naming the field, what was expected and what was given."""
    families = tuple(hf_config.FAMILIES)
    require("family", self.family in families, f"one of {families}", self.family)
    require(
      "router_scores",
      self.router_scores in ROUTER_SCORES,
      f"one of {ROUTER_SCORES}",
      self.router_scores,
    )
    for field in ("dtype", "param_dtype"):
      value = getattr(self, field)
      require(field, value in DTYPES, f"one of {DTYPES}", value)
    sizes = (
      *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
      *("mlp_dim", "max_positions", "expert_block_size", "expert_receive_rows"),
    )
    expert_sizes = ("expert_mlp_dim", "num_experts", "num_experts_per_token")
    groups = ("num_expert_groups", "num_groups_per_token")
    for field in ("num_dense_layers", "num_shared_experts", *sizes, *expert_sizes, *groups):
      value, least = getattr(self, field), 1 if field in (*sizes, *groups) else 0
      whole = isinstance(value, int) and not isinstance(value, bool)
      require(field, whole and value >= least, f"an integer of at least {least}", value)
    for field in ("routed_scaling_factor", "rope_theta", "partial_rotary_factor", "rms_norm_eps"):
      value = getattr(self, field)
      require(field, isinstance(value, int | float) and value >= 0, "a number >= 0", value)
    for field in ("router_bias", "norm_topk_prob", "attention_bias", "qk_norm", "tie_embeddings"):
      value = getattr(self, field)
      require(field, isinstance(value, bool), "True or False", value)
    require(
      "num_dense_layers",
      self.num_dense_layers <= self.num_layers,
      f"0 to num_layers ({self.num_layers})",
      self.num_dense_layers,
    )
    require(
      "num_heads",
      self.num_heads % self.num_kv_heads == 0,
      f"a multiple of num_kv_heads ({self.num_kv_heads})",
      self.num_heads,
    )
    require(
      "partial_rotary_factor",
      self.partial_rotary_factor <= 1 and self.rotary_dim % 2 == 0,
      f"0 to 1, rotating an even number of the {self.head_dim} head dims",
      self.partial_rotary_factor,
    )
    if self.num_moe_layers:
      for field in expert_sizes:
        value = getattr(self, field)
        require(field, value >= 1, f"at least 1 with {self.num_moe_layers} MoE layers", value)
      self._check_groups()

  def _check_groups(self) -> None:
    experts, groups, chosen = self.num_experts, self.num_expert_groups, self.num_groups_per_token
    require(
      "num_experts_per_token",
      self.num_experts_per_token <= experts,
      f"at most num_experts ({experts})",
      self.num_experts_per_token,
    )
    # A group's score is the sum of its best two.
    require(
      "num_expert_groups",
      groups == 1 or (experts % groups == 0 and experts // groups >= 2),
      f"a divisor of num_experts ({experts}) that leaves at least 2 to a group",
      groups,
    )
    require(
      "num_groups_per_token",
      chosen <= groups and self.num_experts_per_token <= chosen * (experts // groups),
      f"at most num_expert_groups ({groups}), with room for num_experts_per_token "
      f"({self.num_experts_per_token})",
      chosen,
    )

  @property
  def num_moe_layers(self) -> int:
    """Layers with experts: all after the dense ones."""
    return self.num_layers - self.num_dense_layers

  @property
  def rotary_dim(self) -> int:
    """Leading dims of each head that are rotated."""
    return int(self.head_dim * self.partial_rotary_factor)

  @classmethod
  def from_hf(cls, hf: Mapping[str, Any], **run_options: Any) -> "ModelConfig":
    """Reads a Hugging Face `config.json`, as transformers 4 or 5 write it.

    Args:
      hf: the parsed JSON. The rotary base may stand at the top or in `rope_parameters`.
      **run_options: fields of ModelConfig that the file does not hold (remat_policy, ...), or that
        are to differ from it (dtype).

    Raises:
      ValueError: for an unknown family, a missing key, or a feature that our model does not have;
        it names the field.
    """
    return cls(**{**hf_config.read(hf), **run_options})

  def to_hf(self) -> dict[str, Any]:
    """The `config.json` of this model, for transformers 4 and 5 and SGLang."""
    return hf_config.write(self)
