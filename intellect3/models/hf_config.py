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
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}
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
    defaults={"tie_word_embeddings": False},
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
    require(key, hf.get(key, fixed) == fixed, repr(fixed), hf.get(key))
  kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
  require("layer_types", not kinds, "'full_attention' alone", sorted(kinds))
  values = {**family.defaults, **hf}
  # transformers 5 has another word for the same.
  values.setdefault("num_experts", hf.get("num_local_experts"))
  if values.get("head_dim") is None and values.get("num_attention_heads"):
    values["head_dim"] = values.get("hidden_size", 0) // values["num_attention_heads"]
  missing = [key for key in family.keys.values() if values.get(key) is None]
  rope = _rope(values, hf)
  missing += ["rope_theta"] if rope.get("rope_theta") is None else []
  if missing:
    raise ValueError(f"config.json: expected the keys {sorted(missing)}, got none of them")
  partial = float(rope.get("partial_rotary_factor", 1.0))
  if not family.writes_partial_rotary:
    require("partial_rotary_factor", partial == 1.0, f"1.0 in {name}", partial)
  fields = {field: values[key] for field, key in family.keys.items()}
  if family.lists_dense_layers:
    fields["num_dense_layers"] = _dense_layers(values.get("mlp_only_layers") or [])
  fields.setdefault("num_dense_layers", fields["num_layers"])
  dtype = hf.get("dtype", hf.get("torch_dtype")) or "float32"
  return {
    "family": name,
    **family.constants,
    **fields,
    "rope_theta": float(rope["rope_theta"]),
    "partial_rotary_factor": partial,
    "dtype": dtype,
    "param_dtype": dtype,
  }


def _rope(values: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
  """The rotary options, wherever they stand; a scaling raises."""
  rope = dict(values)
  for place in ("rope_scaling", "rope_parameters"):
    nested = hf.get(place) or {}
    require(place, isinstance(nested, Mapping), "an object", nested)
    kind = nested.get("rope_type", nested.get("type", "default"))
    require(f"{place}.rope_type", kind == "default", "'default'", kind)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = {key: value for key, value in nested.items() if key not in known}
    require(place, not unknown, f"no other keys than {sorted(known)}", unknown)
    rope.update(nested)
  return rope


def _dense_layers(listed: list[int]) -> int:
  """How many of the first layers are dense."""
  first = list(range(len(listed)))
  require("mlp_only_layers", sorted(listed) == first, f"the first layers, {first}", listed)
  return len(listed)


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
)
