"""Writes a model's tensors as safetensors shards, several at a time. No jax.

Between host memory (or another checkpoint) and the disk: exported models, published versions and
conversions are written here. A shard's header is made from names, dtypes and shapes alone; then its
tensors are read, written and fingerprinted one after the other by a thread of its own. So a tensor
that is made only when it is asked for (`Deferred`) is held one per thread.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from intellect3.models.stored.formats import INDEX, NAMES, SINGLE

SHARD_BYTES = 5_000_000_000
THREADS = 4


class Deferred(NamedTuple):
  """A tensor that is made when it is written.

  Attributes:
    shape: its shape.
    dtype: of its elements.
    read: makes it; called once, from any thread.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Its size."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Tensor = np.ndarray | Deferred
Report = Callable[[str, int], None]
"""Told a tensor's name and bytes once it is written, from any thread."""


class Written(NamedTuple):
  """What was written.

  Attributes:
    fingerprints: crc32 of each tensor's bytes, by name; of the shards written here.
    dtypes: each tensor's dtype in safetensors' spelling, by name; of all shards.
    files: bytes of each file written here, by name.
  """

  fingerprints: dict[str, int]
  dtypes: dict[str, str]
  files: dict[str, int]


def write(
  directory: str | os.PathLike[str],
  tensors: Iterable[tuple[str, Tensor]],
  *,
  shard_bytes: int = SHARD_BYTES,
  threads: int = THREADS,
  report: Report | None = None,
  part: tuple[int, int] = (0, 1),
) -> Written:
  """Writes tensors into a directory as Hugging Face lays them out.

  Args:
    directory: is there, and holds no tensors.
    tensors: names and arrays, drawn one at a time.
    shard_bytes: most bytes of a shard of more than one tensor.
    threads: shards written at a time.
    report: told of every tensor that is written.
    part: (i, n): of the shards, i, i + n, .. are written here and the others by other processes,
      which draw the same names and shapes; the tensors of those are not read. The index is part
      0's.

  Returns:
    Fingerprints and dtypes. One shard is `model.safetensors`; several are
    `model-00001-of-00003.safetensors` and so on, with an index.

  Raises:
    ValueError: no room or no thread, a dtype that is not published, a name that comes twice, no
      tensors at all.
    OSError: a file cannot be written.
  """
  for field, value in (("shard_bytes", shard_bytes), ("threads", threads)):
    if value < 1:
      raise ValueError(f"{field}: expected at least 1, got {value}")
  root = pathlib.Path(directory)
  fingerprints: dict[str, int] = {}
  dtypes: dict[str, str] = {}
  size = 0
  holds: list[Sequence[str]] = []  # names of each shard
  pending: collections.deque[concurrent.futures.Future[dict[str, int]]] = collections.deque()
  tell = report or _silent
  index, parts = part
  with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="shards") as pool:
    for shard in cut(tensors, shard_bytes):
      if len(pending) >= threads:
        fingerprints |= pending.popleft().result()
      for name, tensor in shard:
        if name in dtypes:
          raise ValueError(f"{name}: expected each tensor once, got it twice")
        dtypes[name] = _dtype_name(name, tensor)
        size += tensor.nbytes
      if len(holds) % parts == index:
        pending.append(pool.submit(_write_shard, root / _temporary(len(holds)), shard, tell))
      holds.append([name for name, _ in shard])
    for future in pending:
      fingerprints |= future.result()
  if not holds:
    raise ValueError("tensors: expected at least one, got none")
  weight_map: dict[str, str] = {}
  files: dict[str, int] = {}
  for number, names in enumerate(holds):
    file = _name(number, len(holds))
    weight_map |= dict.fromkeys(names, file)
    if number % parts == index:
      (root / _temporary(number)).rename(root / file)
      files[file] = (root / file).stat().st_size
  if len(holds) > 1 and index == 0:
    table = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (root / INDEX).write_text(json.dumps(table, indent=1) + "\n")
  return Written(fingerprints, dtypes, files)


def flush(path: pathlib.Path) -> None:
  """Waits until a file's bytes, or a directory's entries, are on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _silent(name: str, size: int) -> None:
  pass


def cut(
  tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
  """The shards that `write` would make of these tensors."""
  shard: list[tuple[str, Tensor]] = []
  size = 0
  for name, tensor in tensors:
    if shard and size + tensor.nbytes > shard_bytes:
      yield shard
      shard, size = [], 0
    shard.append((name, tensor))
    size += tensor.nbytes
  if shard:
    yield shard


def _write_shard(
  path: pathlib.Path, shard: Sequence[tuple[str, Tensor]], report: Report
) -> dict[str, int]:
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in shard:
    offsets = [end, end + tensor.nbytes]
    header[name] = {
      "dtype": _dtype_name(name, tensor),
      "shape": list(tensor.shape),
      "data_offsets": offsets,
    }
    end += tensor.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
  fingerprints = {}
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in shard:
      data = _bytes(name, tensor)
      fingerprints[name] = zlib.crc32(data)
      file.write(data)
      report(name, tensor.nbytes)
    file.flush()
    os.fsync(file.fileno())
  return fingerprints


def _bytes(name: str, tensor: Tensor) -> memoryview:
  array = tensor.read() if isinstance(tensor, Deferred) else tensor
  if array.shape != tensor.shape or array.dtype != tensor.dtype:
    raise ValueError(
      f"{name}: expected {tensor.dtype}{list(tensor.shape)}, got {array.dtype}{list(array.shape)}"
    )
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _dtype_name(name: str, tensor: Tensor) -> str:
  if tensor.dtype not in NAMES:
    known = ", ".join(str(dtype) for dtype in NAMES)
    raise ValueError(f"{name}: expected one of {known}, got {tensor.dtype}")
  return NAMES[tensor.dtype]


def _temporary(number: int) -> str:
  return f"shard_{number:05d}.part"


def _name(number: int, count: int) -> str:
  if count == 1:
    return SINGLE
  return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
