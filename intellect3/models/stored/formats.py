"""The safetensors format: a header of names, dtypes, shapes and offsets before the bytes. No jax.

Place in the ring: under everything that reads or writes weights. A header is checked against the
file's size before a byte is read, so a file that was cut is found at once and in full.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Of weights, by safetensors' names."""
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


class Place(NamedTuple):
  """Where a tensor is.

  Attributes:
    file: its file's name in the directory.
    dtype: of its elements.
    shape: its shape.
    start: offset of its first byte in the file.
    bytes: its size.
  """

  file: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  bytes: int


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
  """A safetensors file's tensor entries, and the offset of its first tensor's bytes.

  Raises:
    ValueError: the file is no safetensors file.
  """
  prefix = file.read(8)
  size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
  if not 0 < size <= _MAX_HEADER:
    raise ValueError(f"{file.name}: expected a safetensors header, got {size} bytes of it")
  text = file.read(size)
  if len(text) < size:
    raise ValueError(f"{file.name}: truncated: the header ends after {len(text)} of {size} bytes")
  try:
    header = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file.name}: the safetensors header is not JSON") from error
  if not isinstance(header, dict):
    raise ValueError(
      f"{file.name}: the safetensors header: expected an object, got {type(header).__name__}"
    )
  header.pop("__metadata__", None)
  return header, 8 + size


def scan(path: str | os.PathLike[str]) -> tuple[dict[str, Place], dict[str, str]]:
  """The tensors of a file, and everything that is wrong with it.

  Returns:
    The tensors that are sound, in the file's order, and the faults: by the tensor's name an entry
    that is none, an unknown dtype, a tensor past the end of the file, or not right behind the one
    before it (they share bytes, or bytes are nobody's); by the file's name that it cannot be read,
    or holds more.
  """
  path = pathlib.Path(path)
  try:
    with open(path, "rb") as file:
      header, start = read_header(file)
      size = os.fstat(file.fileno()).st_size
  except OSError as error:
    return {}, {path.name: f"unreadable: {path.name}: {error.strerror}"}
  except ValueError as error:
    return {}, {path.name: f"unreadable: {path.name}: no safetensors file: {error}"}
  places: dict[str, Place] = {}
  faults: dict[str, str] = {}
  for name, entry in header.items():
    try:
      place = _place(path.name, start, entry)
    except ValueError as error:
      faults[name] = f"broken: {name} in {path.name}: {error}"
      continue
    if place.start + place.bytes > size:
      needed = place.start + place.bytes
      faults[name] = f"truncated: {name}: expected {path.name} to have {needed} bytes, got {size}"
      continue
    places[name] = place
  for name, fault in _misplaced(path.name, header, size - start).items():
    places.pop(name, None)
    faults.setdefault(name, fault)
  return places, faults


def _misplaced(file: str, header: Mapping[str, Any], size: int) -> dict[str, str]:
  """Tensors that do not follow each other without gap, and bytes after the last, as faults."""
  spans: list[tuple[int, int, str]] = []
  for name, entry in header.items():
    offsets: Any = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
      return {}  # that tensor is broken: where the others should be cannot be known
    spans.append((offsets[0], offsets[1], name))
  faults: dict[str, str] = {}
  end, last = 0, "the header"
  for first, stop, name in sorted(spans):
    if first != end:
      faults[name] = (
        f"misplaced: {name} in {file}: expected its bytes right behind {last}, at {end}, "
        f"got {first}"
      )
    if stop >= end:
      end, last = stop, name
  if size > end:
    faults[file] = f"unexpected: {size - end} bytes in {file} behind {last}"
  return faults


def _place(file: str, start: int, entry: Any) -> Place:
  given = set(entry) if isinstance(entry, dict) else entry
  if given != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"expected dtype, shape and data_offsets, got {given!r}")
  if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
    raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {entry['dtype']!r}")
  dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
  for field, numbers in (("shape", shape), ("data_offsets", offsets)):
    if not _are_sizes(numbers):
      raise ValueError(f"{field}: expected sizes, got {numbers!r}")
  size = math.prod(shape) * dtype.itemsize
  if len(offsets) != 2 or offsets[1] - offsets[0] != size:
    raise ValueError(f"data_offsets: expected {size} bytes apart, got {offsets}")
  return Place(file, dtype, tuple(shape), start + offsets[0], size)


def _are_sizes(numbers: Any) -> bool:
  return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
