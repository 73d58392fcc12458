"""The tensors of a checkpoint directory, and parts of them. No jax.

Place in the ring: under `models.hf`. A tensor's bytes are mapped while they are copied and no
longer: what a process holds is the copy, and of the file only the asked slices are read.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from intellect3.models.stored import formats, overflow
from intellect3.models.stored.formats import Place

_BLOCK_BYTES, _PAD_BYTES = 1 << 20, 64
_PLAIN: dict[int, type] = {2: np.uint16, 4: np.uint32, 8: np.uint64}

Directory = str | os.PathLike[str]


def scan(directory: Directory) -> tuple[dict[str, Place], dict[str, str]]:
  """The tensors of a directory, from its index or its single file, and what is wrong with them.

  Returns:
    Places by name, in the index's order, and the faults by the tensor's or file's name: those of
    `formats.scan`; a tensor that is not where the index says, or is where it does not say.

  Raises:
    ValueError: there is neither an index nor a single file, or the index is none.
  """
  directory = pathlib.Path(directory)
  index = directory / formats.INDEX
  if not index.is_file():
    if not (directory / formats.SINGLE).is_file():
      raise ValueError(f"{directory}: expected {formats.SINGLE} or {formats.INDEX}, found neither")
    return formats.scan(directory / formats.SINGLE)
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
    isinstance(file, str) and file == pathlib.PurePath(file).name for file in weight_map.values()
  ):
    raise ValueError(f"{index}: expected an object `weight_map` of file names")
  held: dict[str, dict[str, Place]] = {}
  faults: dict[str, str] = {}
  for file in dict.fromkeys(weight_map.values()):
    held[file], wrong = formats.scan(directory / file)
    faults |= wrong
  places = {}
  for name, file in weight_map.items():
    if name in held[file]:
      places[name] = held[file][name]
    else:
      faults.setdefault(name, f"missing: {name} (the index says it is in {file})")
  for file, tensors in held.items():
    for name in tensors:
      if weight_map.get(name) != file:
        faults[f"{file}:{name}"] = f"unexpected: {name} (in {file}, of which the index knows not)"
  return places, faults


def mapped(directory: Directory, place: Place) -> np.ndarray:
  """A tensor as it lies in its file, read-only; only what is used of it is read."""
  if not place.bytes:
    return np.empty(place.shape, place.dtype)
  path = pathlib.Path(directory) / place.file
  data = np.memmap(path, np.uint8, "r", offset=place.start, shape=(place.bytes,))
  return np.asarray(data).view(place.dtype).reshape(place.shape)


def read_into(
  out: np.ndarray, directory: Directory, place: Place, view: Callable[[np.ndarray], np.ndarray]
) -> float:
  """Copies a part of a tensor, converted to the dtype of where it goes; returns as `copy`.

  Args:
    out: where it goes.
    directory: of the checkpoint.
    place: of the tensor.
    view: tensor as stored -> view of out's shape (a slice, a transposition; no copy).
  """
  return copy(out, view(mapped(directory, place)))


def copy(out: np.ndarray, source: np.ndarray) -> float:
  """`out[...] = source`, several times as fast where a large source is a transposition.

  Returns:
    The largest size of a finite value that out's dtype cannot hold; 0.0 where it holds all.
  """
  with np.errstate(over="ignore"):  # it is returned
    _copy(out, source)
  return overflow.largest_lost(out, source)


def _copy(out: np.ndarray, source: np.ndarray) -> None:
  """Copies, at best speed.

  Blocks that fit in a cache are converted in the order in which they lie and turned from there; the
  rows of the block between are padded, since those of matrices whose width is a power of two would
  all fall on the same lines of the cache.
  """
  if out.dtype == source.dtype and out.dtype.itemsize in _PLAIN:
    # As integers: NumPy copies its own dtypes faster, and lets other threads run meanwhile.
    plain = _PLAIN[out.dtype.itemsize]
    out, source = out.view(plain), source.view(plain)
  if source.flags.c_contiguous or source.nbytes < _BLOCK_BYTES:
    out[...] = source
    return
  order = np.argsort([-stride for stride in source.strides], kind="stable")
  lying, turned = source.transpose(order), out.transpose(order)
  rest = lying.shape[1:]
  row = math.prod(rest)
  rows = max(1, _BLOCK_BYTES // (row * out.itemsize))
  between = np.empty((rows, row + _PAD_BYTES // out.itemsize), out.dtype)
  for start in range(0, len(lying), rows):
    part = lying[start : start + rows]
    block = between[: len(part), :row].reshape(len(part), *rest)
    block[...] = part
    turned[start : start + rows] = block


def same(directory: Directory, one: Place, other: Place, rows: Iterable[slice]) -> bool:
  """Whether two tensors hold the same values in the given ranges of their first axis."""
  if one.shape != other.shape:
    return False
  return all(
    np.array_equal(mapped(directory, one)[part], mapped(directory, other)[part]) for part in rows
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    ValueError: the file cannot be read or holds none; it names the file.
  """
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f"{path.name}: cannot be read: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path.name}: no valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path.name}: expected a JSON object, got {type(value).__name__}")
  return value
