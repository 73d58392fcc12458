"""Rows of a batch as micro-batches and back: what the train step and the scoring step share."""

import jax


def split(array: jax.Array, micro_rows: int) -> jax.Array:
  """[rows, T, ..] -> [micro-batches, micro_rows, T, ..].

  Micro-batch i takes rows i, i + n, i + 2n, ...: where the rows lie in blocks over devices, every
  device then holds its share of every micro-batch, and nothing has to move.

  Raises:
    ValueError: rows that are no multiple of `micro_rows`.
  """
  rows, *rest = array.shape
  if rows % micro_rows:
    raise ValueError(f"rows: expected a multiple of micro_rows = {micro_rows}, got {rows}")
  return array.reshape(micro_rows, rows // micro_rows, *rest).swapaxes(0, 1)


def merge(array: jax.Array) -> jax.Array:
  """[micro-batches, micro_rows, T, ..] -> [rows, T, ..], the inverse of `split`."""
  count, micro_rows, *rest = array.shape
  return array.swapaxes(0, 1).reshape(count * micro_rows, *rest)
