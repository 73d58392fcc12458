"""Weights that travel in float32 though the model computes in less: twice the bytes, for nothing.

Place in the ring: beside it, over a program and its schedule.
"""

from collections.abc import Sequence
from typing import Any

import jax

from intellect3.planning import schedule
from intellect3.planning.programs import Program


def float32_weights(program: Program, line: schedule.Timeline) -> list[dict[str, Any]]:
  """The float32 weights that a step gathers, where the model computes in less.

  A gathered array is taken for a weight that is sharded over an axis of the gather and has its
  dimensions, whole or one layer of a stack, in any order, neighbours merged or not.
  """
  if program.config.dtype == "float32":
    return []
  params = program.first.params if hasattr(program.first, "params") else program.first
  weights: list[tuple[str, tuple[int, ...], set[str]]] = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if leaf.ndim < 2 or "router" in name:
      continue  # the router computes in float32
    axes = set(jax.tree.leaves(tuple(leaf.sharding.spec)))
    for dims in (leaf.shape, leaf.shape[1:]) if "layers" in name else (leaf.shape,):
      if len(dims) > 1:
        weights.append((name, dims, axes))
  found: dict[str, dict[str, Any]] = {}
  for event in line.events:
    if event.collective.kind != "all-gather":
      continue
    for array in event.collective.arrays:
      names = [
        name
        for name, dims, axes in weights
        if array.dtype == "f32" and axes & set(event.collective.axes) and merges(dims, array.dims)
      ]
      if names:
        weight = " or ".join(dict.fromkeys(names))
        row = found.setdefault(weight, {"weight": weight, "count": 0, "bytes": 0})
        row["count"] += event.times
        row["bytes"] += event.times * array.bytes
  return list(found.values())


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
