"""Putting a host's batch on the devices, as the model's activations lie there."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.pipeline import packing

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that divide the rows of a batch."""

CONTEXT_AXIS = "context"
"""Mesh axis whose devices compute parts of the same rows; each has the whole rows, as along
`tensor`: they are small, and losses and masks look at whole rows."""


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Where arrays [rows, length, ..] of a batch lie."""
  return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def batch_shardings(mesh: Mesh, batch: packing.Batch) -> packing.Batch:
  """The shardings of a batch: rows as `row_sharding`, counts on every device.

  Args:
    mesh: with the axes `ROW_AXES`.
    batch: of arrays or of `jax.ShapeDtypeStruct`; fields that are None stay None.

  Returns:
    A Batch of NamedSharding; also for `jax.jit`'s in_shardings.
  """
  rows, scalar = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda leaf: rows if leaf.ndim else scalar, batch)


def check_rows(mesh: Mesh, *, micro_rows: int, row_length: int) -> None:
  """Raises ValueError where a micro-batch does not divide over the mesh."""
  shards = 1
  for axis in ROW_AXES:
    shards *= mesh.shape[axis]
  if micro_rows % shards:
    raise ValueError(
      f"micro_rows: expected a multiple of {' * '.join(ROW_AXES)} = {shards}, got {micro_rows}"
    )
  parts = 2 * mesh.shape[CONTEXT_AXIS]  # two blocks each, one early and one late
  if parts > 2 and row_length % parts:
    raise ValueError(
      f"row_length: expected a multiple of 2 * {CONTEXT_AXIS} = {parts}, got {row_length}"
    )


def own_share(mesh: Mesh) -> packing.Share:
  """The blocks of a batch's rows that this process's devices hold: those that it has to read."""
  count = 1
  for axis in ROW_AXES:
    count *= mesh.shape[axis]
  indices = row_sharding(mesh).addressable_devices_indices_map((count,))
  blocks = {index[0].indices(count)[0] for index in indices.values() if index is not None}
  return packing.Share(tuple(sorted(blocks)), count)


def place(batch: packing.Batch, mesh: Mesh) -> packing.Batch:
  """Moves a batch to the devices.

  Args:
    batch: NumPy, the rows of this process's share (`own_share`), block after block.
    mesh: with the axes `ROW_AXES`.

  Returns:
    The global batch of jax.Array.
  """
  share = own_share(mesh)
  at = {block: place for place, block in enumerate(share.blocks)}

  def put(sharding: NamedSharding, leaf: np.ndarray) -> jax.Array:
    if not leaf.ndim:
      return jax.make_array_from_callback((), sharding, lambda _: leaf)
    size = len(leaf) // len(share.blocks)
    shape = (size * share.num_blocks, *leaf.shape[1:])

    def part(index: Any) -> np.ndarray:
      place = at[index[0].indices(shape[0])[0] // size]
      return leaf[place * size : (place + 1) * size]

    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(put, batch_shardings(mesh, batch), batch)
