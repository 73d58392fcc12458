"""Weights that travel in float32 though the model computes in less: twice the bytes, for nothing.

Place in the ring: beside it, over a program and its schedule.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from intellect3.planning import schedule
from intellect3.planning.collectives import Collective
from intellect3.planning.programs import Program

_SUMS = ("all-reduce", "reduce-scatter")
_EXCHANGES = ("all-to-all", "ragged-all-to-all")
_SUM_OF = re.compile(r"/(psum|reduce_scatter)\w*$")
_OPTIMIZER = "training/muon"


class Weight(NamedTuple):
  """A parameter, or one layer of a stack, as devices hold it.

  Attributes:
    name: its path.
    dims: the whole.
    local: a device's block.
    axes: mesh axes of more than one device that split each dimension.
  """

  name: str
  dims: tuple[int, ...]
  local: tuple[int, ...]
  axes: tuple[frozenset[str], ...]


def float32_weights(program: Program, line: schedule.Timeline) -> list[dict[str, Any]]:
  """The float32 weights that a step moves, where the model computes in less.

  Looked at is every collective but sums (`all-reduce`, `reduce-scatter`, and what XLA makes of
  one: gradients are summed in float32) and what the optimizer exchanges. A moved array is taken
  for a weight that is split over an axis of the collective and has its dimensions, in any order,
  neighbours merged or not, of the whole or of one layer of a stack. Each dimension may be a
  device's block, the whole, or between: heads, widths and experts stay split where others are
  gathered. A weight that an `all-reduce` moves, as zeros but for one device, is taken for a sum.
  """
  if program.config.dtype == "float32":
    return []
  weights = tuple(_weights(program))
  found: dict[str, dict[str, Any]] = {}
  for event in line.events:
    sums = event.collective.kind in _SUMS or _SUM_OF.search(event.source)
    if sums or _OPTIMIZER in event.file:
      continue
    for array in event.collective.arrays:
      if array.dtype != "f32":
        continue
      alike = {one: moves(one, array.dims, event.collective) for one in weights}
      best = max(alike.values(), default=0)
      if best:
        names = (one.name for one, like in alike.items() if like == best)
        weight = " or ".join(dict.fromkeys(names))
        row = found.setdefault(weight, {"weight": weight, "count": 0, "bytes": 0})
        row["count"] += event.times
        row["bytes"] += event.times * array.bytes
  return list(found.values())


def moves(weight: Weight, dims: Sequence[int], collective: Collective) -> int:
  """Whether a collective that handles an array of these dimensions moves the weight.

  What is gathered is larger than a device's block along an axis of the collective; whatever else
  is sent is the block or larger, in an exchange also the piece of it for one device.

  Returns:
    2: dimension by dimension this weight, gathered over these axes, or its block. 1: it may be, in
    another shape. 0: no, as for every array that has one dimension.
  """
  axes, size = set(collective.axes), collective.group_size
  exchanged = collective.kind in _EXCHANGES
  gathers = collective.kind == "all-gather"
  found = 0
  if sum(one > 1 for one in dims) < 2:
    return found
  for sizes in itertools.product(*map(_between, weight.local, weight.dims)):
    grown = [
      mine for mine, one, block in zip(weight.axes, sizes, weight.local, strict=True) if one > block
    ]
    if not axes & set().union(*(grown if gathers else weight.axes)):
      continue
    split = [
      (*sizes[:place], *parts, *sizes[place + 1 :])
      for place, one in enumerate(sizes)
      if one % size == 0
      for parts in (((size, one // size), (one // size,)) if exchanged else ((size, one // size),))
    ]
    if any(merges(each, dims) for each in (sizes, *split)):
      found = 1
      grew = math.prod(sizes) // math.prod(weight.local)
      over = frozenset().union(*grown)
      if sorted(sizes) == sorted(dims) and (grew, over) == (
        (size, axes) if gathers else (1, set())
      ):
        return 2
  return found


def merges(dims: Sequence[int], into: Sequence[int]) -> bool:
  """Whether dimensions, in any order and multiplied together at will, are those of `into`."""
  left = sorted((size for size in dims if size > 1), reverse=True)
  wanted = sorted((size for size in into if size > 1), reverse=True)
  if not left:
    return not wanted
  first, rest = left[0], left[1:]
  return any(
    size % first == 0 and merges(rest, [*wanted[:i], size // first, *wanted[i + 1 :]])
    for i, size in enumerate(wanted)
  )


def _weights(program: Program) -> Iterator[Weight]:
  """The matrices of a program, stacks also layer by layer; but the router computes in float32."""
  params = program.first.params if hasattr(program.first, "params") else program.first
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if leaf.ndim < 2 or "router" in name:
      continue
    shape = leaf.sharding.mesh.shape
    spec = (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))
    axes = tuple(
      frozenset(axis for axis in jax.tree.leaves(entry) if shape[axis] > 1) for entry in spec
    )
    local = leaf.sharding.shard_shape(leaf.shape)
    for first in range(2 if "layers" in name and leaf.ndim > 2 else 1):
      yield Weight(name, leaf.shape[first:], local[first:], axes[first:])


def _between(block: int, whole: int) -> list[int]:
  """The sizes of a dimension from a block of it to the whole, as gathers make them."""
  return [size for size in range(block, whole + 1, block) if whole % size == 0]
