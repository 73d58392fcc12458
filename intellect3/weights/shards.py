"""Writes a model's tensors as safetensors shards, several at a time.

Between the trainer's host memory and the disk. Each shard is written, flushed to disk and
fingerprinted by a thread of its own while the next ones are put together; what waits to be written
is never more than a shard for each thread.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from intellect3.weights import tensors as formats

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in formats.DTYPES.items()}


class Written(NamedTuple):
  """What was written.

  Attributes:
    fingerprints: crc32 of each tensor's bytes, by name.
    dtypes: each tensor's dtype in safetensors' spelling, by name.
  """

  fingerprints: Mapping[str, int]
  dtypes: Mapping[str, str]


def write(
  directory: str | os.PathLike[str],
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  shard_bytes: int,
  threads: int,
) -> Written:
  """Writes tensors into a directory as Hugging Face lays them out.

  Args:
    directory: is there, and holds no tensors.
    tensors: names and arrays, drawn one at a time.
    shard_bytes: most bytes of a shard of more than one tensor.
    threads: shards written at a time.

  Returns:
    Fingerprints and dtypes. One shard is `model.safetensors`; several are
    `model-00001-of-00003.safetensors` and so on, with an index.

  Raises:
    ValueError: no room or no thread, a dtype that is not published, no tensors at all.
    OSError: a file cannot be written.
  """
  for field, value in (("shard_bytes", shard_bytes), ("threads", threads)):
    if value < 1:
      raise ValueError(f"{field}: expected at least 1, got {value}")
  root = pathlib.Path(directory)
  fingerprints: dict[str, int] = {}
  dtypes: dict[str, str] = {}
  holds: list[Sequence[str]] = []  # names of each shard
  pending: collections.deque[concurrent.futures.Future[dict[str, int]]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="shards") as pool:
    for shard in _cut(tensors, shard_bytes):
      if len(pending) >= threads:
        fingerprints |= pending.popleft().result()
      dtypes |= {name: _dtype_name(name, array) for name, array in shard}
      pending.append(pool.submit(_write_shard, root / _temporary(len(holds)), shard))
      holds.append([name for name, _ in shard])
    for future in pending:
      fingerprints |= future.result()
  if not holds:
    raise ValueError("tensors: expected at least one, got none")
  weight_map: dict[str, str] = {}
  for number, names in enumerate(holds):
    file = _name(number, len(holds))
    (root / _temporary(number)).rename(root / file)
    weight_map |= dict.fromkeys(names, file)
  if len(holds) > 1:
    size = sum((root / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (root / INDEX).write_text(json.dumps(index, indent=1) + "\n")
  return Written(fingerprints, dtypes)


def flush(path: pathlib.Path) -> None:
  """Waits until a file's bytes, or a directory's entries, are on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _cut(
  tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
  shard: list[tuple[str, np.ndarray]] = []
  size = 0
  for name, array in tensors:
    if shard and size + array.nbytes > shard_bytes:
      yield shard
      shard, size = [], 0
    shard.append((name, array))
    size += array.nbytes
  if shard:
    yield shard


def _write_shard(path: pathlib.Path, shard: Sequence[tuple[str, np.ndarray]]) -> dict[str, int]:
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, array in shard:
    offsets = [end, end + array.nbytes]
    header[name] = {
      "dtype": _dtype_name(name, array),
      "shape": list(array.shape),
      "data_offsets": offsets,
    }
    end += array.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
  fingerprints = {}
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, array in shard:
      data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
      fingerprints[name] = zlib.crc32(data)
      file.write(data)
    file.flush()
    os.fsync(file.fileno())
  return fingerprints


def _dtype_name(name: str, array: np.ndarray) -> str:
  if array.dtype not in _NAMES:
    known = ", ".join(str(dtype) for dtype in _NAMES)
    raise ValueError(f"{name}: expected one of {known}, got {array.dtype}")
  return _NAMES[array.dtype]


def _temporary(number: int) -> str:
  return f"shard_{number:05d}.part"


def _name(number: int, count: int) -> str:
  if count == 1:
    return "model.safetensors"
  return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
