"""Putting a host's batch on the devices, as the model's activations lie there."""

import jax
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


def place(batch: packing.Batch, mesh: Mesh) -> packing.Batch:
  """Moves a batch to the devices.

  Args:
    batch: NumPy, this process's rows (equal blocks in process order).
    mesh: with the axes `ROW_AXES`.

  Returns:
    The global batch of jax.Array.
  """
  shardings = batch_shardings(mesh, batch)
  return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)
