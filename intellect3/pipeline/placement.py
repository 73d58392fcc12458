"""Putting a host's batch on the devices, as the model's activations lie there."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.pipeline import packing

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that divide the rows of a batch."""

LENGTH_AXIS = "context"
"""Mesh axis that divides each row."""


def batch_shardings(mesh: Mesh) -> packing.Batch:
  """The shardings of a batch, as a Batch of NamedSharding; also for `jax.jit`'s in_shardings."""
  rows = NamedSharding(mesh, PartitionSpec(ROW_AXES, LENGTH_AXIS))
  scalar = NamedSharding(mesh, PartitionSpec())
  arrays = {field: rows for field in packing.Batch._fields}
  return packing.Batch(**{**arrays, "step": scalar, "loss_tokens": scalar})  # type: ignore[arg-type]


def check_rows(mesh: Mesh, *, micro_rows: int, row_length: int) -> None:
  """Raises ValueError where a micro-batch does not divide over the mesh."""
  shards = 1
  for axis in ROW_AXES:
    shards *= mesh.shape[axis]
  if micro_rows % shards:
    raise ValueError(
      f"micro_rows: expected a multiple of {' * '.join(ROW_AXES)} = {shards}, got {micro_rows}"
    )
  if row_length % mesh.shape[LENGTH_AXIS]:
    raise ValueError(
      f"row_length: expected a multiple of {LENGTH_AXIS} = {mesh.shape[LENGTH_AXIS]}, "
      f"got {row_length}"
    )


def place(batch: packing.Batch, mesh: Mesh) -> packing.Batch:
  """Moves a batch to the devices.

  Args:
    batch: NumPy, this process's rows (equal blocks in process order).
    mesh: with the axes `ROW_AXES` and `LENGTH_AXIS`.

  Returns:
    The global batch of jax.Array.
  """
  return packing.Batch(
    *(
      jax.make_array_from_process_local_data(sharding, array)
      for sharding, array in zip(batch_shardings(mesh), batch, strict=True)
    )
  )
