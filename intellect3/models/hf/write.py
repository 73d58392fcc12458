"""Checkpoints out: sharded, one tensor per writing thread in memory, whole or not at all.

Place in the ring: exported models are written here; `weights.publish` writes versions from the same
tensors with the same writer.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.models.hf import companions, layout, names
from intellect3.models.hf.source import count_extra_layers, open_source
from intellect3.models.stored import aside, directory, overflow, shards
from intellect3.models.stored.directory import Directory
from intellect3.models.stored.shards import Deferred

_FETCH_BYTES = 256 << 20
"""Arrays up to this size leave a device whole, larger ones tensor by tensor."""


def to_hf(config: ModelConfig, params: transformer.Params) -> Iterator[tuple[str, np.ndarray]]:
  """The checkpoint's tensors, one at a time, by name; contiguous NumPy arrays.

  Args:
    config: of the model.
    params: nested dict of NumPy or (addressable) JAX arrays.

  Raises:
    ValueError: a leaf's shape does not fit the config.
  """
  for name, tensor in tensors(config, params):
    yield name, tensor.read()


def tensors(
  config: ModelConfig,
  params: transformer.Params,
  dtype: str | None = None,
  overflows: list[str] | None = None,
) -> Iterator[tuple[str, Deferred]]:
  """The checkpoint's tensors by name, made when they are asked for.

  Args:
    config: of the model.
    params: nested dict of NumPy or (addressable) JAX arrays.
    dtype: to convert to; None keeps each leaf's. The router's correction bias keeps its own.
    overflows: gets a line for every tensor made that has finite values which the dtype cannot hold,
      for `overflow.refuse`. Without it the first of them raises when it is made.

  Raises:
    ValueError: a leaf's shape does not fit the config.
  """
  for entry in names.entries(config):
    given = layout.leaf(params, entry.path)
    expected = layout.leaf_shape(config, entry)
    if tuple(given.shape) != expected:
      path = "/".join(entry.path)
      raise ValueError(f"{path}: expected {list(expected)}, got {list(given.shape)}")
    if isinstance(given, jax.Array) and given.nbytes <= _FETCH_BYTES:
      given = np.asarray(jax.device_get(given))
    kind = np.dtype(entry.dtype or dtype or given.dtype)
    shape = names.stored_shape(entry, expected[entry.stack_axes :])
    for at in np.ndindex(names.stack_shape(config, entry)):
      name = names.name(config, entry, at)
      yield name, converted(name, _part(entry, given, at, shape), kind, overflows)


def converted(
  name: str, tensor: Deferred, kind: np.dtype, overflows: list[str] | None = None
) -> Deferred:
  """A tensor of another dtype; the arguments as of `tensors`."""

  def make() -> np.ndarray:
    out = np.empty(tensor.shape, kind)
    largest = directory.copy(out, tensor.read())
    if largest:
      line = overflow.line(name, kind, largest)
      if overflows is None:
        overflow.refuse([line])
      else:
        overflows.append(line)
    return out

  return Deferred(tensor.shape, kind, make)


def _part(entry: names.Entry, array: Any, at: tuple[int, ...], shape: tuple[int, ...]) -> Deferred:
  def make() -> np.ndarray:
    return layout.to_stored(entry, np.asarray(jax.device_get(array[at]))).reshape(shape)

  return Deferred(shape, np.dtype(array.dtype), make)


def save(
  directory: Directory,
  config: ModelConfig,
  params: transformer.Params,
  *,
  dtype: str | None = None,
  source: Directory | None = None,
  extras: str = "drop",
  shard_bytes: int = shards.SHARD_BYTES,
  threads: int = shards.THREADS,
) -> None:
  """Writes a checkpoint directory: `config.json`, safetensors, and what travels along.

  Everything is written aside and moved into place at the end, `config.json` last.

  Args:
    directory: made if it is not there. A checkpoint in it is replaced; other files stay.
    config: of the model.
    params: nested dict of arrays.
    dtype: dtype to convert to, e.g. `bfloat16`; None keeps the leaves'. The router's correction
      bias stays float32.
    source: the checkpoint directory that the model came from: its tokenizer, template and
      generation config are copied, those of them that it has, and what its `config.json` holds
      that our config does not say.
    extras: `keep` copies from the source the tensors of multi-token prediction layers too; `drop`
      leaves them.
    shard_bytes: most bytes of a file of more than one tensor.
    threads: files written at a time.

  Raises:
    ValueError: a leaf's shape does not fit the config, source or extras are not as they should, or
      tensors have finite values that `dtype` cannot hold (it lists them).
  """
  companions.check(source, extras)
  stored = dtype or str(params["embedding"].dtype)

  def fill(room: pathlib.Path) -> None:
    overflows: list[str] = []
    every, extra_layers = tensors(config, params, dtype, overflows), 0
    if source is not None and companions.has_extras(source):
      opened = open_source(source)
      every = itertools.chain(every, companions.extra_tensors(opened, extras))
      extra_layers = count_extra_layers(opened.raw) if extras == "keep" else 0
    shards.write(room, every, shard_bytes=shard_bytes, threads=threads)
    overflow.refuse(overflows)
    companions.write_config(room, config, stored, source, extra_layers)
    if source is not None:
      companions.copy_files(source, room)

  aside.write(directory, fill)
