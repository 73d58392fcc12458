"""Orbax's arrays, read and written one tensor at a time.

Orbax saves trees of arrays that are all in memory. Here Orbax still writes the checkpoint (its
directory, metadata and commit), but a leaf of the tree is only a description: the handler of such
leaves writes one tensor after the other into the leaf's array, each a chunk of its own. The result
is what `StandardCheckpointer.save` would have written, in smaller chunks; any Orbax restores it.
"""

import asyncio
import json
import math
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

METADATA = "_METADATA"
CHUNK_BYTES = 64 << 20
"""Most bytes of a chunk."""
FILE_BYTES = 32 << 20
"""Bytes of small chunks that are gathered before they are written to a file."""

Path = tuple[str, ...]


class Leaf:
  """An array that is written part by part."""

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype: np.dtype,
    stack_axes: int,
    parts: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]],
  ):
    """Describes an array.

    Args:
      shape: of the whole.
      dtype: of its elements.
      stack_axes: leading axes along which every index is a chunk of its own.
      parts: makes the parts, each with its index along the stack axes; in any order, every one
        once.
    """
    self.shape, self.dtype, self.stack_axes, self.parts = shape, np.dtype(dtype), stack_axes, parts
    self.ndim, self.size = len(shape), math.prod(shape)
    self.nbytes = self.size * self.dtype.itemsize


class _LeafHandler(ocp.type_handlers.NumpyHandler):
  """Writes `Leaf`s as NumPy arrays are written, one part at a time."""

  def __init__(self) -> None:
    super().__init__(deepcopy_host_arrays=False)
    self._alone = asyncio.Lock()

  async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context):
    # Overrides what writes an array whole; were it called otherwise, a `Leaf` could not be written.
    store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
    async with self._alone:  # leaves after each other
      gathered, transaction = 0, ts.Transaction()
      for at, part in value.parts():
        await store.with_transaction(transaction)[at].write(part)
        gathered += part.nbytes
        if gathered >= FILE_BYTES:
          await transaction.commit_async()
          gathered, transaction = 0, ts.Transaction()
      await transaction.commit_async()


def write(directory: pathlib.Path, leaves: Mapping[Path, Leaf]) -> None:
  """Writes a tree of leaves as an Orbax checkpoint.

  Args:
    directory: is made.
    leaves: by path in the nested dict that a restore gives.
  """
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  save_args = jax.tree.map(
    lambda leaf: ocp.SaveArgs(
      shard_axes=tuple(range(leaf.stack_axes)), chunk_byte_size=CHUNK_BYTES
    ),
    tree,
  )
  # Orbax warns of a registry without handlers of jax.Array.
  registry = ocp.type_handlers.create_type_handler_registry(
    (Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  # Random bits of weights hardly compress, and trying takes longer than writing.
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


class Array:
  """An array of an Orbax checkpoint, of which parts are read."""

  def __init__(self, store: ts.TensorStore):
    """Wraps an open array."""
    self._store = store
    self._held: tuple[tuple[int, ...], np.ndarray] | None = None
    self._lock = threading.Lock()

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the whole."""
    return tuple(self._store.shape)

  @property
  def dtype(self) -> np.dtype:
    """Of its elements."""
    return np.dtype(self._store.dtype.numpy_dtype)

  def read(self, at: tuple[int, ...]) -> np.ndarray:
    """The part at an index along the leading axes.

    Chunks are read whole; what is left of one is held for the next call, as indices go upwards.
    """
    chunk = self._store.chunk_layout.read_chunk.shape or self.shape
    rows = [int(size or 1) for size in chunk[: len(at)]]
    if len(at) == 2 and rows[0] > 1:
      rows[1] = self.shape[1]  # experts go round faster than layers
    if all(row == 1 for row in rows):
      return np.asarray(self._store[at].read().result())
    first = tuple(place // row * row for place, row in zip(at, rows, strict=True))
    with self._lock:
      if self._held is None or self._held[0] != first:
        self._held = None
        block = tuple(
          slice(start, min(start + row, size))
          for start, row, size in zip(first, rows, self.shape, strict=False)
        )
        self._held = (first, np.asarray(self._store[block].read().result()))
      inside = tuple(place - start for place, start in zip(at, first, strict=True))
      part = self._held[1][inside]
      last = tuple(place + 1 == size for place, size in zip(at, self.shape, strict=False))
      if all(last):
        self._held = None
    return part


class Tree(NamedTuple):
  """Attributes: directory, of one Orbax checkpoint; arrays by their path, opened when needed."""

  directory: pathlib.Path
  names: Mapping[Path, str]
  use_ocdbt: bool
  use_zarr3: bool

  def open(self, path: Path) -> Array:
    """Opens an array.

    Raises:
      ValueError: it cannot be opened.
    """
    base = self.directory.absolute().as_posix()
    name = self.names[path]
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{base}/{name}/"}
    if self.use_ocdbt:
      kvstore = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{name}/"}
    driver = "zarr3" if self.use_zarr3 else "zarr"
    try:
      return Array(ts.open({"driver": driver, "kvstore": kvstore}, read=True).result())
    except ValueError as error:
      raise ValueError(f"{self.directory}: {name}: {str(error).splitlines()[0]}") from error


def tree(directory: pathlib.Path) -> Tree:
  """The arrays of an Orbax checkpoint, from its metadata.

  Raises:
    ValueError: the metadata cannot be read.
  """
  try:
    metadata = json.loads((directory / METADATA).read_text())
    names: dict[Path, str] = {}
    for entry in metadata["tree_metadata"].values():
      path = tuple(str(key["key"]) for key in entry["key_metadata"])
      names[path] = ".".join(path)
    return Tree(
      directory, names, bool(metadata.get("use_ocdbt", True)), bool(metadata.get("use_zarr3"))
    )
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{directory}: no readable Orbax checkpoint: {error}") from error
