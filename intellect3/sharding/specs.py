"""Shardings of whole trees of parameters.

Place in the ring: the trainer's `jit` takes its in and out shardings from here, the checkpointer
the layout to restore to.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from intellect3.sharding.rules import Rules, axes_of, to_spec


def tree_shardings(logical_tree: Any, shapes: Any, mesh: Mesh, rules: Rules) -> Any:
  """A `NamedSharding` for every leaf.

  Args:
    logical_tree: tree of tuples of logical axis names (or None), one name per dimension.
    shapes: tree of the same structure; leaves have a `shape`.
    mesh: the mesh.
    rules: the table of the layout.

  Raises:
    ValueError: naming every tensor with a dimension that does not divide by its mesh axes, that
      lies on an axis which the mesh has not, or with another number of names than dimensions; and
      as `to_spec`.
  """
  problems: list[str] = []

  def sharding(path: tuple[Any, ...], leaf: Any, logical_axes: tuple[str | None, ...]):
    tensor = jax.tree_util.keystr(path, simple=True, separator="/")
    if len(logical_axes) != len(leaf.shape):
      problems.append(f"{tensor}: expected {len(leaf.shape)} axis names, got {logical_axes}")
    try:
      spec = to_spec(logical_axes, rules)
    except ValueError as error:
      raise ValueError(f"{tensor} {tuple(leaf.shape)}: {error}") from error
    for name, size, entry in zip(logical_axes, leaf.shape, spec, strict=False):
      mesh_axes = axes_of(entry)
      unknown = [axis for axis in mesh_axes if axis not in mesh.shape]
      if unknown:
        problems.append(
          f"{tensor}: expected {name} on axes of the mesh {tuple(mesh.axis_names)}, "
          f"got {unknown[0]!r}"
        )
        continue
      parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
      if size % parts:
        problems.append(
          f"{tensor}: expected {name} to divide by {parts} "
          f"({' * '.join(f'{axis} {mesh.shape[axis]}' for axis in mesh_axes)}), "
          f"got {size} of {tuple(leaf.shape)}"
        )
    return None if problems else NamedSharding(mesh, spec)

  shardings = jax.tree_util.tree_map_with_path(sharding, shapes, logical_tree)
  if problems:
    raise ValueError("sharding:\n  " + "\n  ".join(problems))
  return shardings
