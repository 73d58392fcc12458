"""Putting a host's batch on the devices, as the model's activations lie there."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.pipeline import packing

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that divide the rows of a batch."""

LENGTH_AXIS = "context"
"""Mesh axis that divides each row."""


def batch_shardings(mesh: Mesh, *, routed_experts: bool = False) -> packing.Batch:
  """The shardings of a batch, as a Batch of NamedSharding; also for `jax.jit`'s in_shardings.

  Args:
    mesh: with the axes `ROW_AXES` and `LENGTH_AXIS`.
    routed_experts: whether the batch has the fields of router replay; else theirs are None.
  """
  rows = NamedSharding(mesh, PartitionSpec(ROW_AXES, LENGTH_AXIS))
  scalar = NamedSharding(mesh, PartitionSpec())
  fields: dict[str, Any] = {field: rows for field in packing.Batch._fields}
  if not routed_experts:
    fields |= {"routed_experts": None, "experts_recorded": None}
  return packing.Batch(**{**fields, "step": scalar, "loss_tokens": scalar})


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
  shardings = batch_shardings(mesh, routed_experts=batch.routed_experts is not None)
  return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)
