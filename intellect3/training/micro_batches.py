"""Rows of a batch as micro-batches and back: what the train step and the scoring step share."""

import jax


def check(rows: int, micro_rows: int, parts: int) -> None:
  """Raises ValueError where rows are no whole micro-batches, or those not the same on all devices.

  Args:
    rows: of the batch.
    micro_rows: of a micro-batch.
    parts: in how many parts the mesh divides rows.
  """
  if rows % micro_rows:
    raise ValueError(f"rows: expected a multiple of micro_rows = {micro_rows}, got {rows}")
  if micro_rows % parts:
    raise ValueError(
      f"micro_rows: expected a multiple of the {parts} parts of the mesh, got {micro_rows}"
    )


def split(array: jax.Array, micro_rows: int) -> jax.Array:
  """[rows, T, ..] -> [micro-batches, micro_rows, T, ..].

  Micro-batch i takes rows i, i + n, i + 2n, ...
  """
  rows, *rest = array.shape
  return array.reshape(micro_rows, rows // micro_rows, *rest).swapaxes(0, 1)


def merge(array: jax.Array) -> jax.Array:
  """[micro-batches, micro_rows, T, ..] -> [rows, T, ..], the inverse of `split`."""
  count, micro_rows, *rest = array.shape
  return array.swapaxes(0, 1).reshape(count * micro_rows, *rest)
