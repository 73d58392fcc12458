"""Weights that lie on the devices of several processes, brought to those that will write them.

Between the train state and `publish`. Every process enters the same collectives, one slice of one
array after the other: what all hosts hold at a time is that slice, and what a host keeps are the
tensors of its own files, so no host ever holds the model.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.models.config import ModelConfig
from intellect3.models.hf import layout, names, write
from intellect3.models.stored import shards
from intellect3.models.stored.shards import Deferred

Tensors = list[tuple[str, shards.Tensor]]


class Gathered(NamedTuple):
  """A model's tensors as one process has them.

  Attributes:
    tensors: all of them by name, in the order of the files; those of other processes' files have a
      shape and a dtype alone.
    dtype: that the embedding is stored in.
    nbytes: held here.
  """

  tensors: Tensors
  dtype: str
  nbytes: int


def gather(
  config: ModelConfig,
  params: Any,
  mesh: Mesh,
  *,
  dtype: str | None,
  shard_bytes: int,
  index: int,
  count: int,
) -> Gathered:
  """Brings to each process the tensors of its files; all processes call it together.

  Args:
    config: the model's.
    params: its parameters, jax.Arrays over all processes' devices.
    mesh: where they lie.
    dtype: to store; None keeps each array's. The router's correction bias keeps its own.
    shard_bytes: as `models.stored.shards.write` will get it.
    index: this process's number: files index, index + count, .. are its own.
    count: of processes.

  Raises:
    ValueError: a tensor that is this process's has finite values that `dtype` cannot hold.
  """
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  planned: Tensors = list(write.tensors(config, shapes, dtype))
  own = {
    name
    for number, shard in enumerate(shards.cut(planned, shard_bytes))
    if number % count == index
    for name, _ in shard
  }
  kinds = {name: tensor.dtype for name, tensor in planned}
  whole, layer = _slicers(mesh)
  held: dict[str, np.ndarray] = {}
  for entry in names.entries(config):
    leaf = layout.leaf(params, entry.path)
    slices = range(leaf.shape[0]) if entry.stack_axes else (None,)
    for number in slices:
      # Waited for, one by one: else they would pile up on the devices of those that keep none.
      piece = jax.block_until_ready(
        whole(leaf) if number is None else layer(leaf, np.int32(number))
      )
      mine = [(name, at) for name, at in _of_slice(config, entry, number) if name in own]
      if mine:
        host = np.asarray(piece.addressable_data(0))
        shape = names.stored_shape(entry, leaf.shape[entry.stack_axes :])
        for name, at in mine:
          part = Deferred(shape, host.dtype, _reader(entry, host[at[1:]], shape))
          held[name] = write.converted(name, part, np.dtype(kinds[name])).read()
      piece.delete()
  tensors: Tensors = [(name, held.get(name, tensor)) for name, tensor in planned]
  return Gathered(
    tensors,
    dtype or str(params["embedding"].dtype),
    sum(array.nbytes for array in held.values()),
  )


@functools.cache
def _slicers(mesh: Mesh) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
  """An array whole on every device, and so its part of a number; compiled once a run."""
  replicated = NamedSharding(mesh, PartitionSpec())
  return (
    jax.jit(lambda leaf: leaf, out_shardings=replicated),
    jax.jit(lambda leaf, number: leaf[number], out_shardings=replicated),
  )


def _of_slice(
  config: ModelConfig, entry: names.Entry, number: int | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
  for at in np.ndindex(names.stack_shape(config, entry)):
    if number is None or at[0] == number:
      yield names.name(config, entry, at), at


def _reader(
  entry: names.Entry, part: np.ndarray, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
  return lambda: layout.to_stored(entry, part).reshape(shape)
