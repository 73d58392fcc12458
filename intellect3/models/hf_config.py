"""Hugging Face's `config.json`, one description per family, read and written.

Place in the ring: under `ModelConfig.from_hf` and `.to_hf`. What a file asks for and our model does
not compute must not load: it raises and names the key.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from intellect3.models.checks import require

if TYPE_CHECKING:
  from intellect3.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How a family writes its config.

  Attributes:
    architecture: the class of transformers that computes it.
    keys: field of ModelConfig -> key, where the two hold the same.
    defaults: keys that a file may leave out, with what that means.
    fixed: keys of which our model computes one value only; a file may leave them out.
    constants: fields of ModelConfig that are so in every model of the family.
    also: keys that are written and not read.
    writes_partial_rotary: whether `partial_rotary_factor` is one of its options; 1 otherwise.
    lists_dense_layers: whether `mlp_only_layers` says which layers have no experts.
  """

  architecture: str
  keys: Mapping[str, str]
  defaults: Mapping[str, Any]
  fixed: Mapping[str, Any]
  constants: Mapping[str, Any]
  also: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  writes_partial_rotary: bool = False
  lists_dense_layers: bool = False


_DENSE_KEYS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_dim": "intermediate_size",
  "rms_norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
  "max_positions": "max_position_embeddings",
}
_MOE_KEYS = {
  "expert_mlp_dim": "moe_intermediate_size",
  "num_experts_per_token": "num_experts_per_tok",
  "norm_topk_prob": "norm_topk_prob",
}
_FLAGS = ("tie_embeddings", "norm_topk_prob", "attention_bias", "qk_norm")
_NUMBERS = ("rms_norm_eps", "routed_scaling_factor")
_FIXED = {
  "hidden_act": "silu",
  "attention_dropout": 0.0,
  **dict.fromkeys(("quantization_config", "compression_config")),
  **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping")),
}
# A bias in these families is one of the output projection too, which ours does not have.
_QWEN3_FIXED = {**_FIXED, "attention_bias": False, "use_sliding_window": False}
_QWEN3_CONSTANTS = {"qk_norm": True, "router_scores": "softmax", "router_bias": False}

FAMILIES: Mapping[str, Family] = {
  "glm4_moe": Family(
    architecture="Glm4MoeForCausalLM",
    keys={
      **_DENSE_KEYS,
      **_MOE_KEYS,
      "num_dense_layers": "first_k_dense_replace",
      "num_experts": "n_routed_experts",
      "num_expert_groups": "n_group",
      "num_groups_per_token": "topk_group",
      "num_shared_experts": "n_shared_experts",
      "routed_scaling_factor": "routed_scaling_factor",
      "attention_bias": "attention_bias",
      "qk_norm": "use_qk_norm",
    },
    defaults={
      "use_qk_norm": False,
      "attention_bias": False,
      "tie_word_embeddings": False,
      "n_group": 1,
      "topk_group": 1,
      "partial_rotary_factor": 0.5,
    },
    fixed={**_FIXED, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    constants={"router_scores": "sigmoid", "router_bias": True},
    also={"num_nextn_predict_layers": 0},
    writes_partial_rotary=True,
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    keys=_DENSE_KEYS,
    defaults={"tie_word_embeddings": False, "head_dim": 128},
    fixed=_QWEN3_FIXED,
    constants=_QWEN3_CONSTANTS,
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    keys={**_DENSE_KEYS, **_MOE_KEYS, "num_experts": "num_experts"},
    defaults={"tie_word_embeddings": False, "norm_topk_prob": False},
    fixed={**_QWEN3_FIXED, "decoder_sparse_step": 1},
    constants=_QWEN3_CONSTANTS,
    lists_dense_layers=True,
  ),
}


def read(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of ModelConfig that a `config.json` says, as transformers 4 or 5 write it.

  Raises:
    ValueError: for an unknown family, a missing key, or a feature that our model does not have; it
      names the key.
  """
  name = hf.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise ValueError(f"model_type: expected one of {tuple(FAMILIES)}, got {name!r}")
  family = FAMILIES[name]
  for key, fixed in family.fixed.items():
    require(key, hf.get(key) in (None, fixed), repr(fixed), hf.get(key))
  values = {**family.defaults, **hf}
  for key, other in _TWINS.items():
    values.setdefault(key, hf.get(other))
    same = hf.get(other) in (None, values[key])
    require(other, same, f"{values[key]!r} as {key}", hf.get(other))
  if values.get("head_dim") is None and "head_dim" not in family.defaults:
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
      values["head_dim"] = width // heads
  values |= _rope(hf)
  missing = [key for key in (*family.keys.values(), "rope_theta") if values.get(key) is None]
  if missing:
    raise ValueError(f"config.json: expected a value of {sorted(missing)}, got none")
  for field, key in (*family.keys.items(), ("rope_theta", "rope_theta")):
    _check_type(field, key, values[key])
  partial = values.get("partial_rotary_factor", 1.0)
  _check_type("partial_rotary_factor", "partial_rotary_factor", partial)
  if not family.writes_partial_rotary:
    require("partial_rotary_factor", partial == 1.0, f"1.0 in {name}", partial)
  fields = {field: values[key] for field, key in family.keys.items()}
  fields.setdefault("num_dense_layers", _dense_layers(family, hf, fields["num_layers"]))
  _check_layers(hf, family.keys.get("num_dense_layers", "mlp_only_layers"), fields)
  dtype = hf.get("dtype", hf.get("torch_dtype")) or "float32"
  return {
    "family": name,
    **family.constants,
    **fields,
    "rope_theta": float(values["rope_theta"]),
    "partial_rotary_factor": float(partial),
    "dtype": dtype,
    "param_dtype": dtype,
  }


_TWINS = {"num_experts": "num_local_experts"}
"""transformers 4's word -> transformers 5's."""


def _check_type(field: str, key: str, value: Any) -> None:
  if field in _FLAGS:
    require(key, isinstance(value, bool), "true or false", value)
    return
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if field in (*_NUMBERS, "rope_theta", "partial_rotary_factor"):
    require(key, number, "a number", value)
  else:
    require(key, number and isinstance(value, int) and value >= 0, "an integer >= 0", value)


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The rotary options, wherever they stand; a scaling raises."""
  options = ("rope_theta", "partial_rotary_factor")
  rope = {key: hf[key] for key in options if hf.get(key) is not None}
  for place in ("rope_scaling", "rope_parameters"):
    nested = hf.get(place) or {}
    require(place, isinstance(nested, Mapping), "an object", nested)
    kind = nested.get("rope_type") or nested.get("type") or "default"
    require(f"{place}.rope_type", kind == "default", "'default'", kind)
    known = {"rope_type", "type", *options}
    unknown = {key: value for key, value in nested.items() if key not in known}
    require(place, not unknown, f"no other keys than {sorted(known)}", unknown)
    for key in options:
      if nested.get(key) is not None:
        expected, given = rope.setdefault(key, nested[key]), nested[key]
        require(f"{place}.{key}", given == expected, f"{expected!r} as elsewhere", given)
  return rope


def _dense_layers(family: Family, hf: Mapping[str, Any], layers: int) -> int:
  """How many of the first layers are dense: all, or as `mlp_only_layers` lists them."""
  if not family.lists_dense_layers:
    return layers
  listed = hf.get("mlp_only_layers") or []
  plain = isinstance(listed, list) and all(isinstance(layer, int) for layer in listed)
  first = plain and sorted(listed) == list(range(len(listed)))
  require("mlp_only_layers", first, "the first layers, each once", listed)
  return len(listed)


def _check_layers(hf: Mapping[str, Any], dense_key: str, fields: Mapping[str, Any]) -> None:
  """Layers that are told one by one must be the layers that we compute."""
  layers, dense = fields["num_layers"], fields["num_dense_layers"]
  require(dense_key, dense <= layers, f"at most num_hidden_layers ({layers})", hf.get(dense_key))
  for key, expected in (
    ("layer_types", ["full_attention"] * layers),
    ("mlp_layer_types", ["dense"] * dense + ["sparse"] * (layers - dense)),
  ):
    given = hf.get(key)
    holds = given is None or given == expected
    require(key, holds, f"{layers} entries, of {sorted(set(expected))} in this order", given)


def write(config: "ModelConfig") -> dict[str, Any]:
  """The `config.json` of a model, for transformers 4 and 5 and SGLang.

  Raises:
    ValueError: where the model has an option that its family does not; it names the field.
  """
  family = FAMILIES[config.family]
  rope = {"rope_theta": config.rope_theta}
  if family.writes_partial_rotary:
    rope["partial_rotary_factor"] = config.partial_rotary_factor
  hf = {
    "architectures": [family.architecture],
    "model_type": config.family,
    **{key: getattr(config, field) for field, key in family.keys.items()},
    **{key: value for key, value in family.fixed.items() if value is not None},
    **rope,
    "rope_parameters": {"rope_type": "default", **rope},
    "initializer_range": 0.02,
    "use_cache": True,
    "dtype": config.param_dtype,
    **family.also,
  }
  if family.lists_dense_layers:
    hf["mlp_only_layers"] = list(range(config.num_dense_layers))
  fields = dataclasses.fields(config)
  said = {**{field.name: field.default for field in fields}, **read(hf)}
  for name in (field.name for field in fields if field.name not in _RUN_FIELDS):
    given = getattr(config, name)
    require(name, given == said[name], f"{said[name]!r} in {config.family}", given)
  return hf


# Of how a model is run, not of what it is.
_RUN_FIELDS = (
  *("dtype", "param_dtype", "remat_policy"),
  *("attention", "grouped_matmul", "expert_block_size"),
  *("expert_exchange", "expert_receive_rows"),
)
