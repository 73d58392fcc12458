"""Names and layouts of Hugging Face checkpoints: one table per family, of shared parts.

Place in the ring: data for its neighbours, which read it in both directions. A new family is a line
of `TABLES`, and parts for what no other family has.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from intellect3.models.config import ModelConfig

DENSE, MOE = "dense_layers", "moe_layers"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYERS = "model.layers."
_LAYER = _LAYERS + "{layer}."


def _always(config: ModelConfig) -> bool:
  return True


class Entry(NamedTuple):
  """One kind of tensor.

  Attributes:
    hf: its name there, with `{layer}` and `{expert}` where there is one per layer or expert.
    path: its path in our params.
    inputs: of a linear map, how many leading axes of our kernel are inputs; there it is stored as
      [outputs, inputs], both flat. None: the same axes in the same order, flat beyond `hf_rank`.
    hf_rank: rank of the stored tensor.
    present: whether a model of some config has it.
    dtype: of the tensor with us, whatever the others have; None: as the others.
  """

  hf: str
  path: tuple[str, ...]
  inputs: int | None = None
  hf_rank: int = 2
  present: Callable[[ModelConfig], bool] = _always
  dtype: str | None = None

  @property
  def stack_axes(self) -> int:
    """Leading axes of our array that number layers and experts, one stored tensor for each."""
    return ("{layer}" in self.hf) + ("{expert}" in self.hf)


def _linear(hf: str, path: str, inputs: int = 1, present=_always) -> Entry:
  return Entry(hf, tuple(path.split("/")), inputs, 2, present)


def _vector(hf: str, path: str, present=_always, dtype: str | None = None) -> Entry:
  return Entry(hf, tuple(path.split("/")), None, 1, present, dtype)


def _attention(stack: str) -> Iterator[Entry]:
  theirs, ours = f"{_LAYER}self_attn.", f"{stack}/attention/"
  for name in "qkv":
    yield _linear(f"{theirs}{name}_proj.weight", f"{ours}{name}/kernel")
    yield _vector(f"{theirs}{name}_proj.bias", f"{ours}{name}/bias", lambda c: c.attention_bias)
  yield _linear(f"{theirs}o_proj.weight", f"{ours}o/kernel", inputs=2)
  for name in ("q_norm", "k_norm"):
    yield _vector(f"{theirs}{name}.weight", f"{ours}{name}/scale", lambda c: c.qk_norm)


def _norms(stack: str) -> Iterator[Entry]:
  yield _vector(f"{_LAYER}input_layernorm.weight", f"{stack}/attention_norm/scale")
  yield _vector(f"{_LAYER}post_attention_layernorm.weight", f"{stack}/mlp_norm/scale")


def _mlp(theirs: str, ours: str, leaf: str = "/kernel", present=_always) -> Iterator[Entry]:
  for name in ("gate", "up", "down"):
    yield _linear(f"{_LAYER}{theirs}.{name}_proj.weight", f"{ours}/{name}{leaf}", present=present)


_ENDS = (
  Entry(EMBEDDING, ("embedding",)),
  _vector("model.norm.weight", "final_norm/scale"),
  _linear(HEAD, "head", present=lambda c: not c.tie_embeddings),
)
_DENSE_LAYERS = (*_attention(DENSE), *_norms(DENSE), *_mlp("mlp", f"{DENSE}/mlp"))
_MOE_LAYERS = (
  *_attention(MOE),
  *_norms(MOE),
  *_mlp("mlp.experts.{expert}", f"{MOE}/moe/experts", leaf=""),
  _linear(f"{_LAYER}mlp.gate.weight", f"{MOE}/moe/router/kernel"),
)
_SHARED_EXPERTS = tuple(
  _mlp("mlp.shared_experts", f"{MOE}/moe/shared", present=lambda c: c.num_shared_experts > 0)
)
_CORRECTION_BIAS = _vector(
  f"{_LAYER}mlp.gate.e_score_correction_bias",
  f"{MOE}/moe/router/correction_bias",
  lambda c: c.router_bias,
  dtype="float32",
)

TABLES: Mapping[str, tuple[Entry, ...]] = {
  "glm4_moe": (*_ENDS, *_DENSE_LAYERS, *_MOE_LAYERS, *_SHARED_EXPERTS, _CORRECTION_BIAS),
  "qwen3": (*_ENDS, *_DENSE_LAYERS),
  "qwen3_moe": (*_ENDS, *_DENSE_LAYERS, *_MOE_LAYERS),
}


class Slot(NamedTuple):
  """One tensor of a checkpoint: its name there, its entry, and where in our stacked array."""

  name: str
  entry: Entry
  at: tuple[int, ...]


def entries(config: ModelConfig) -> tuple[Entry, ...]:
  """The kinds of tensors that a model has; one leaf of our params each."""
  return tuple(
    entry
    for entry in TABLES[config.family]
    if entry.present(config) and _layers(config, entry) != range(0)
  )


def slots(config: ModelConfig) -> Iterator[Slot]:
  """Every tensor of a checkpoint of this model, those of one leaf after each other."""
  for entry in entries(config):
    for at in itertools.product(*map(range, stack_shape(config, entry))):
      yield Slot(name(config, entry, at), entry, at)


def stack_shape(config: ModelConfig, entry: Entry) -> tuple[int, ...]:
  """Sizes of the axes of our array that number layers and experts."""
  layers = _layers(config, entry)
  if layers is None:
    return ()
  return (len(layers), config.num_experts)[: entry.stack_axes]


def name(config: ModelConfig, entry: Entry, at: tuple[int, ...]) -> str:
  """The stored name of the tensor at a place of our stacked array."""
  layers = _layers(config, entry)
  if layers is None:
    return entry.hf
  return entry.hf.format(layer=layers[at[0]], expert=at[-1])


def stored_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in a checkpoint of a tensor that has `shape` with us (stack axes taken off)."""
  if entry.inputs is not None:
    return (math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs]))
  return shape if len(shape) == entry.hf_rank else (math.prod(shape),)


def is_extra(name: str, config: ModelConfig) -> bool:
  """Whether a tensor belongs to a layer past the last: a multi-token prediction module."""
  layer = name.removeprefix(_LAYERS).split(".")[0]
  return name.startswith(_LAYERS) and layer.isdigit() and int(layer) >= config.num_layers


def repeats_embedding(name: str, config: ModelConfig) -> bool:
  """Whether a tensor is the head of a model whose head is its embedding."""
  return name == HEAD and config.tie_embeddings


def _layers(config: ModelConfig, entry: Entry) -> range | None:
  """The layers that a kind of tensor is of; None for one that belongs to no layer."""
  if entry.path[0] == DENSE:
    return range(config.num_dense_layers)
  if entry.path[0] == MOE:
    return range(config.num_dense_layers, config.num_layers)
  return None
