"""Names and layouts of Hugging Face checkpoints: one table per family.

Place in the ring: data for `hf`, which reads it in both directions.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from intellect3.models.config import ModelConfig


def _always(config: ModelConfig) -> bool:
  return True


class Entry(NamedTuple):
  """One kind of tensor.

  Attributes:
    hf: its name there, with `{layer}` and `{expert}` where there is one per layer or expert.
    path: its path in our params, without the stack's name.
    stack: `dense_layers`, `moe_layers` (our arrays lead with the layer), or None.
    inputs: of a linear map, how many leading axes of our kernel are inputs; there it is stored as
      [outputs, inputs], both flat. None: the same axes in the same order, flat beyond `hf_rank`.
    hf_rank: rank of the stored tensor.
    present: whether a model of some config has it.
  """

  hf: str
  path: tuple[str, ...]
  stack: str | None = None
  inputs: int | None = None
  hf_rank: int = 2
  present: Callable[[ModelConfig], bool] = _always


def _linear(hf: str, path: str, stack: str, inputs: int = 1, present=_always) -> Entry:
  return Entry(hf, tuple(path.split("/")), stack, inputs, 2, present)


def _vector(hf: str, path: str, stack: str | None = None, present=_always) -> Entry:
  return Entry(hf, tuple(path.split("/")), stack, None, 1, present)


def _glm4_moe() -> tuple[Entry, ...]:
  entries = [
    Entry("model.embed_tokens.weight", ("embedding",)),
    _vector("model.norm.weight", "final_norm/scale"),
    Entry("lm_head.weight", ("head",), inputs=1, present=lambda c: not c.tie_embeddings),
  ]
  layer = "model.layers.{layer}."
  has_bias = lambda c: c.attention_bias  # noqa: E731
  has_qk_norm = lambda c: c.qk_norm  # noqa: E731
  has_shared = lambda c: c.num_shared_experts > 0  # noqa: E731
  for stack in ("dense_layers", "moe_layers"):
    for name in "qkv":
      linear, ours = f"{layer}self_attn.{name}_proj.", f"attention/{name}/"
      entries.append(_linear(linear + "weight", ours + "kernel", stack))
      entries.append(_vector(linear + "bias", ours + "bias", stack, has_bias))
    entries.append(_linear(layer + "self_attn.o_proj.weight", "attention/o/kernel", stack, 2))
    for name in ("q_norm", "k_norm"):
      norm = f"{layer}self_attn.{name}.weight"
      entries.append(_vector(norm, f"attention/{name}/scale", stack, has_qk_norm))
    entries.append(_vector(layer + "input_layernorm.weight", "attention_norm/scale", stack))
    entries.append(_vector(layer + "post_attention_layernorm.weight", "mlp_norm/scale", stack))
  for name in ("gate", "up", "down"):
    linear = f"{name}_proj.weight"
    entries += [
      _linear(f"{layer}mlp.{linear}", f"mlp/{name}/kernel", "dense_layers"),
      _linear(f"{layer}mlp.experts.{{expert}}.{linear}", f"moe/experts/{name}", "moe_layers"),
      _linear(
        f"{layer}mlp.shared_experts.{linear}",
        f"moe/shared/{name}/kernel",
        "moe_layers",
        present=has_shared,
      ),
    ]
  gate = layer + "mlp.gate."
  return (
    *entries,
    _linear(gate + "weight", "moe/router/kernel", "moe_layers"),
    _vector(gate + "e_score_correction_bias", "moe/router/correction_bias", "moe_layers"),
  )


TABLES: dict[str, tuple[Entry, ...]] = {"glm4_moe": _glm4_moe()}


class Slot(NamedTuple):
  """One tensor of a checkpoint: its name there, its entry, and where in our stacked array."""

  name: str
  entry: Entry
  at: tuple[int, ...]


def slots(config: ModelConfig) -> Iterator[Slot]:
  """Every tensor of a checkpoint of this model."""
  ranges = {
    "dense_layers": range(config.num_dense_layers),
    "moe_layers": range(config.num_dense_layers, config.num_layers),
  }
  for entry in TABLES[config.family]:
    if not entry.present(config):
      continue
    if entry.stack is None:
      yield Slot(entry.hf, entry, ())
      continue
    for index, layer in enumerate(ranges[entry.stack]):
      if "{expert}" in entry.hf:
        for expert in range(config.num_experts):
          yield Slot(entry.hf.format(layer=layer, expert=expert), entry, (index, expert))
      else:
        yield Slot(entry.hf.format(layer=layer), entry, (index,))


def stored_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in a checkpoint of a tensor that has `shape` with us (stack axes taken off)."""
  if entry.inputs is not None:
    return (math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs]))
  return shape if len(shape) == entry.hf_rank else (math.prod(shape),)


def is_ignored(name: str, config: ModelConfig) -> bool:
  """Whether a checkpoint may hold this tensor though our model has no use for it.

  Layers past the last are multi-token prediction modules; a tied head repeats the embedding.
  """
  if name == "lm_head.weight":
    return config.tie_embeddings
  prefix = "model.layers."
  layer = name.removeprefix(prefix).split(".")[0]
  return name.startswith(prefix) and layer.isdigit() and int(layer) >= config.num_layers
