"""The description of a model: its family, its sizes, and how to run it.

Place in the ring: made by a preset or read from a checkpoint's `config.json`; every part that runs
or sizes the model takes it. A frozen, hashable value: fit for static arguments of `jax.jit`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

FAMILIES = ("glm4_moe",)
DTYPES = ("float32", "bfloat16", "float16")

# Field of ModelConfig -> key of a Hugging Face glm4_moe config.json, where the two hold the same.
_HF_KEYS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_dense_layers": "first_k_dense_replace",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_dim": "intermediate_size",
  "expert_mlp_dim": "moe_intermediate_size",
  "num_experts": "n_routed_experts",
  "num_experts_per_token": "num_experts_per_tok",
  "num_shared_experts": "n_shared_experts",
  "routed_scaling_factor": "routed_scaling_factor",
  "norm_topk_prob": "norm_topk_prob",
  "rms_norm_eps": "rms_norm_eps",
  "attention_bias": "attention_bias",
  "qk_norm": "use_qk_norm",
  "tie_embeddings": "tie_word_embeddings",
  "max_positions": "max_position_embeddings",
}
# Keys that a file may leave out, with what the family means then.
_HF_DEFAULTS = {"use_qk_norm": False, "attention_bias": False, "tie_word_embeddings": False}
# What our model computes; a file that asks for something else must not load.
_HF_FIXED = {"hidden_act": "silu", "n_group": 1, "topk_group": 1, "attention_dropout": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A model of some family.

  Attributes:
    family: `glm4_moe`.
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
    num_shared_experts: experts every token uses; one MLP of so many times F.
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
    remat_policy: what the backward pass recomputes; see `transformer.REMAT_POLICIES`.
    attention: implementation of `kernels.attention`.
    grouped_matmul: implementation of `kernels.grouped_matmul`.
    expert_block_size: most rows of a block of the `blocked` grouped matmul.
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
  expert_mlp_dim: int
  num_experts: int
  num_experts_per_token: int
  num_shared_experts: int = 1
  routed_scaling_factor: float = 1.0
  norm_topk_prob: bool = True
  rope_theta: float = 1e6
  partial_rotary_factor: float = 0.5
  rms_norm_eps: float = 1e-5
  attention_bias: bool = True
  qk_norm: bool = False
  tie_embeddings: bool = False
  max_positions: int = 131072
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat_policy: str = "full"
  attention: str = "plain"
  grouped_matmul: str = "blocked"
  expert_block_size: int = 64

  def __post_init__(self) -> None:
    """Raises ValueError naming the field, what was expected and what was given."""
    _require("family", self.family in FAMILIES, f"one of {FAMILIES}", self.family)
    for field in ("dtype", "param_dtype"):
      value = getattr(self, field)
      _require(field, value in DTYPES, f"one of {DTYPES}", value)
    for field in (
      *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
      *("mlp_dim", "expert_mlp_dim", "num_experts", "num_experts_per_token", "max_positions"),
      "expert_block_size",
    ):
      value = getattr(self, field)
      _require(field, isinstance(value, int) and value >= 1, "an integer of at least 1", value)
    for field in ("routed_scaling_factor", "rope_theta", "partial_rotary_factor", "rms_norm_eps"):
      value = getattr(self, field)
      _require(field, isinstance(value, int | float) and value >= 0, "a number >= 0", value)
    for field in ("num_dense_layers", "num_shared_experts"):
      value = getattr(self, field)
      _require(field, isinstance(value, int) and value >= 0, "an integer >= 0", value)
    _require(
      "num_dense_layers",
      self.num_dense_layers <= self.num_layers,
      f"0 to num_layers ({self.num_layers})",
      self.num_dense_layers,
    )
    _require(
      "num_heads",
      self.num_heads % self.num_kv_heads == 0,
      f"a multiple of num_kv_heads ({self.num_kv_heads})",
      self.num_heads,
    )
    _require(
      "num_experts_per_token",
      self.num_experts_per_token <= self.num_experts,
      f"at most num_experts ({self.num_experts})",
      self.num_experts_per_token,
    )
    _require(
      "partial_rotary_factor",
      0 <= self.partial_rotary_factor <= 1 and self.rotary_dim % 2 == 0,
      f"0 to 1, rotating an even number of the {self.head_dim} head dims",
      self.partial_rotary_factor,
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
      ValueError: for an unknown family, a missing key, or a feature that our model does not have.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
      raise ValueError(f"model_type: expected one of {FAMILIES}, got {family!r}")
    if family == "glm4_moe":
      for key, fixed in _HF_FIXED.items():
        _require(key, hf.get(key, fixed) == fixed, repr(fixed), hf.get(key))
    rope = {**hf, **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require("rope_type", rope_type == "default", "'default'", rope_type)
    values = {**_HF_DEFAULTS, **hf}
    # transformers' own default of this family, where a file leaves it out.
    rope.setdefault("partial_rotary_factor", 0.5)
    if values.get("head_dim") is None and "num_attention_heads" in values:
      values["head_dim"] = values.get("hidden_size", 0) // values["num_attention_heads"]
    missing = [key for key in _HF_KEYS.values() if values.get(key) is None]
    missing += ["rope_theta"] if rope.get("rope_theta") is None else []
    if missing:
      raise ValueError(f"config.json: expected the keys {sorted(missing)}, got none of them")
    dtype = hf.get("dtype", hf.get("torch_dtype")) or "float32"
    return cls(
      family=family,
      **{
        "rope_theta": float(rope["rope_theta"]),
        "partial_rotary_factor": float(rope["partial_rotary_factor"]),
        "dtype": dtype,
        "param_dtype": dtype,
        **{field: values[key] for field, key in _HF_KEYS.items()},
        **run_options,
      },
    )

  def to_hf(self) -> dict[str, Any]:
    """The `config.json` of this model, for transformers 4 and 5 and SGLang."""
    rope = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
    return {
      "architectures": ["Glm4MoeForCausalLM"],
      "model_type": self.family,
      **{key: getattr(self, field) for field, key in _HF_KEYS.items()},
      **_HF_FIXED,
      **rope,
      "rope_parameters": {"rope_type": "default", **rope},
      "num_nextn_predict_layers": 0,
      "initializer_range": 0.02,
      "use_cache": True,
      "dtype": self.param_dtype,
    }


def _require(field: str, holds: bool, expected: str, given: Any) -> None:
  if not holds:
    raise ValueError(f"{field}: expected {expected}, got {given!r}")
