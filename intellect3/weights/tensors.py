"""Reads single tensors of a published version, for those who send them on. No jax, no torch."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from intellect3.weights import manifest as manifests

DTYPES: Mapping[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Of published tensors, by safetensors' names."""


class Place(NamedTuple):
  """Where a tensor is.

  Attributes:
    file: its file's name in the version's directory.
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


def index(directory: str | os.PathLike[str]) -> dict[str, Place]:
  """Where each tensor of a version is, in the order of the files.

  Raises:
    ValueError: a file that is no safetensors file, or a dtype that no version is published in.
  """
  places = {}
  for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
    with open(path, "rb") as file:
      header, start = manifests.read_header(file)
    for name, entry in header.items():
      if entry["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name}: expected one of {list(DTYPES)}, got {entry['dtype']}")
      first, last = entry["data_offsets"]
      places[name] = Place(
        path.name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first, last - first
      )
  return places


def read(
  directory: str | os.PathLike[str], places: Mapping[str, Place], names: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
  """Some tensors of a version.

  Args:
    directory: the version's.
    places: from `index`.
    names: of the tensors.

  Returns:
    (name, array) in the order of `names`.

  Raises:
    OSError: the version is gone. ValueError: a file that ends too early.
  """
  tensors = []
  for name in names:
    place = places[name]
    with open(pathlib.Path(directory) / place.file, "rb") as file:
      file.seek(place.start)
      data = file.read(place.bytes)
    if len(data) != place.bytes:
      raise ValueError(f"{place.file}: {name}: expected {place.bytes} bytes, got {len(data)}")
    tensors.append((name, np.frombuffer(data, place.dtype).reshape(place.shape)))
  return tensors
