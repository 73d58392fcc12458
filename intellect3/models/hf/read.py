"""Checkpoints in: whole on the host, or slice by slice straight to where the slices belong.

Place in the ring: runs start here. On many hosts each process reads of the files what its devices
own and nothing else; transpositions, head splits and the stacks of layers and experts are undone
while a tensor is copied, so that nothing is held but the arrays and one slice.
"""

import concurrent.futures
import dataclasses
import itertools
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.models.hf import layout, names
from intellect3.models.hf.source import Source, check_head, open_source
from intellect3.models.stored import directory as stored
from intellect3.models.stored import overflow
from intellect3.models.stored.directory import Directory

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Bytes; a CPU device takes an array so aligned as it is, and copies any other."""

_PARALLEL_BYTES, _THREADS = 64 << 20, 8
"""Arrays from this size on are read by so many threads, each a tensor at a time."""

Index = tuple[slice, ...]


def load(
  directory: Directory, *, dtype: str | None = None, **run_options: Any
) -> tuple[ModelConfig, transformer.Params]:
  """Reads a checkpoint directory: `config.json` and safetensors, single or sharded.

  Args:
    directory: its path.
    dtype: dtype to convert the tensors to; None keeps the file's. The router's correction bias is
      always float32.
    **run_options: fields of ModelConfig that the file does not hold, as in `ModelConfig.from_hf`.

  Returns:
    The config, its `param_dtype` being the tensors' (also its `dtype`), and the params with NumPy
    leaves.

  Raises:
    ValueError: for a missing or broken file, an unknown family, a head that should repeat the
      embedding and does not, tensors of several dtypes in one stack; one that lists every missing,
      unexpected, misshapen and broken tensor; and one that lists every tensor with finite values
      that `dtype` cannot hold.
  """
  source = open_source(directory, **run_options)
  _say_extras(source)
  params: transformer.Params = {}
  overflows: list[str] = []
  for entry in names.entries(source.config):
    whole = (slice(None),) * len(layout.leaf_shape(source.config, entry))
    kind = leaf_dtype(entry, dtype or stored_dtype(source, entry))
    layout.put(params, entry.path, read(source, entry, whole, kind, overflows))
  overflow.refuse(overflows)
  name = str(params["embedding"].dtype)
  return dataclasses.replace(source.config, param_dtype=name, dtype=name), params


def load_sharded(
  directory: Directory, config: ModelConfig, shardings: Any, *, dtype: str | None = None
) -> transformer.Params:
  """Reads a checkpoint straight to the devices, each process only the slices that it owns.

  Like `jax.make_array_from_callback`, but one device's shard after the other: beside the arrays the
  host holds the shard that is on its way.

  Args:
    directory: of the checkpoint.
    config: of `check`.
    shardings: tree of `jax.sharding.Sharding`, one per leaf, as of `sharding.specs`.
    dtype: as in `load`.

  Returns:
    The params, committed to their shardings.

  Raises:
    ValueError: as `load`.
  """
  source = open_source(directory)
  for field in ("family", "num_layers", "num_dense_layers", "num_experts", "tie_embeddings"):
    expected, given = getattr(config, field), getattr(source.config, field)
    if expected != given:
      raise ValueError(f"{directory}: {field}: expected {expected!r}, got {given!r}")
  _say_extras(source)
  params: transformer.Params = {}
  overflows: list[str] = []
  for entry in names.entries(config):
    kind = leaf_dtype(entry, dtype or stored_dtype(source, entry))
    shape, sharding = layout.leaf_shape(config, entry), layout.leaf(shardings, entry.path)
    shards = []
    held: tuple[Index, np.ndarray] | None = None
    # Devices that hold the same slice come one after the other.
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in sorted(indices.items(), key=lambda item: _order(item[1], shape)):
      if held is None or held[0] != index:
        held = (index, read(source, entry, index, kind, overflows))
      shards.append(jax.block_until_ready(jax.device_put(held[1], device)))
    array = jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=kind)
    layout.put(params, entry.path, array)
  overflow.refuse(overflows)
  return params


def leaf_dtype(entry: names.Entry, dtype: Any) -> np.dtype:
  """The dtype of a leaf where the others are of `dtype`."""
  return np.dtype(entry.dtype or dtype)


def stored_dtype(source: Source, entry: names.Entry) -> np.dtype:
  """The dtype in which a leaf's tensors are stored.

  Raises:
    ValueError: there are several.
  """
  stack = names.stack_shape(source.config, entry)
  found = {
    source.places[names.name(source.config, entry, at)].dtype
    for at in itertools.product(*map(range, stack))
  }
  if len(found) > 1:
    raise ValueError(
      f"{source.root}: {entry.hf}: expected one dtype (or one to convert to), "
      f"got {sorted(map(str, found))}"
    )
  return found.pop()


def read(
  source: Source,
  entry: names.Entry,
  index: Index,
  dtype: np.dtype,
  overflows: list[str] | None = None,
) -> np.ndarray:
  """A part of one of our arrays, from the tensors that hold it.

  Args:
    source: the checkpoint.
    entry: the kind of tensor.
    index: a slice (step 1) per axis of our array, as `jax.Array` shards have it.
    dtype: to convert to.
    overflows: gets a line for every tensor with finite values that dtype cannot hold, for
      `overflow.refuse`.

  Returns:
    A new array.

  Raises:
    ValueError: without `overflows`, there is such a tensor.
  """
  shape = layout.leaf_shape(source.config, entry)
  ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
  axes = entry.stack_axes
  lines: list[str] = []
  out = _aligned(tuple(map(len, ranges)), dtype)

  def fill(at: tuple[int, ...]) -> None:
    where = tuple(place - ids.start for place, ids in zip(at, ranges[:axes], strict=True))
    name = names.name(source.config, entry, at)
    largest = stored.read_into(
      out[where],
      source.root,
      source.places[name],
      lambda tensor: layout.to_ours(entry, tensor, shape[axes:])[index[axes:]],
    )
    if largest:
      lines.append(overflow.line(name, dtype, largest))

  every = itertools.product(*ranges[:axes])
  if out.nbytes < _PARALLEL_BYTES:
    for at in every:
      fill(at)
  else:
    with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
      for _ in pool.map(fill, every):
        pass
  if overflows is None:
    overflow.refuse(lines)
  else:
    overflows += lines
  if source.repeated_head and entry.path == ("embedding",):
    first, last, _ = index[0].indices(shape[0])
    check_head(source, first, last)
  return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % _ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


def _order(index: Index, shape: tuple[int, ...]) -> list[int]:
  return [part.indices(size)[0] for part, size in zip(index, shape, strict=True)]


def _say_extras(source: Source) -> None:
  if source.extras:
    logger.info(
      "%s: %d tensors (%.3f GB) of layers past the last (multi-token prediction) are not used",
      pathlib.Path(source.root).name,
      len(source.extras),
      source.extra_bytes / 1e9,
    )
