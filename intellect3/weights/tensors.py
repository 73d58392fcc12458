"""Reads single tensors of a published version, for those who send them on. No jax, no torch."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from intellect3.models.stored import formats
from intellect3.models.stored.formats import Place


def index(directory: str | os.PathLike[str]) -> dict[str, Place]:
  """Where each tensor of a version is, in the order of the files.

  Raises:
    ValueError: a file that is no safetensors file, or is cut, or a dtype that no version is
      published in.
  """
  places: dict[str, Place] = {}
  for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
    found, faults = formats.scan(path)
    if faults:
      raise ValueError(f"{directory}: " + "; ".join(faults.values()))
    places |= found
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
