"""Whether two checkpoints hold the same tensors, and where they do not, by how much."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from intellect3.models.stored.shards import Deferred
from tools.checkpoints.opened import Opened
from tools.checkpoints.progress import Progress

_BLOCK = 1 << 24
"""Elements that are compared at a time."""


class Kind(NamedTuple):
  """Tensors of one kind: all layers and experts.

  Attributes:
    tensors: how many there are on both sides.
    differing: names of those whose values differ.
    largest: the largest difference between two values; infinite where one is not a number.
    dtypes: how they are stored on either side, where that is not the same.
  """

  tensors: int
  differing: tuple[str, ...]
  largest: float
  dtypes: tuple[str, str] | None


class Comparison(NamedTuple):
  """Attributes: kinds by their pattern; faults, a line each: absent or misshapen tensors."""

  kinds: dict[str, Kind]
  faults: tuple[str, ...]

  @property
  def same(self) -> bool:
    """Whether both hold the same tensors with the same values."""
    return not self.faults and not any(kind.differing for kind in self.kinds.values())


def compare(one: Opened, other: Opened, progress: Progress) -> Comparison:
  """Compares every tensor, one at a time.

  Values are compared, bitwise where both are stored in one dtype; a dtype that can hold the
  other's values makes no difference, and is said.
  """
  first, second = ({**side.tensors, **side.extras} for side in (one, other))
  faults = [f"only in {one.root}: {name}" for name in first if name not in second]
  faults += [f"only in {other.root}: {name}" for name in second if name not in first]
  kinds: dict[str, Kind] = {}
  for name, tensor in first.items():
    if name not in second:
      continue
    twin = second[name]
    if tensor.shape != twin.shape:
      faults.append(
        f"{name}: {list(tensor.shape)} in {one.root}, {list(twin.shape)} in {other.root}"
      )
      continue
    differs, largest = _difference(tensor, twin)
    pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
    kind = kinds.get(pattern, Kind(0, (), 0.0, None))
    dtypes = kind.dtypes
    if tensor.dtype != twin.dtype:
      dtypes = (str(tensor.dtype), str(twin.dtype))
    differing = (*kind.differing, name) if differs else kind.differing
    kinds[pattern] = Kind(kind.tensors + 1, differing, max(kind.largest, largest), dtypes)
    progress.add(name, tensor.nbytes)
  return Comparison(kinds, tuple(faults))


def _difference(one: Deferred, other: Deferred) -> tuple[bool, float]:
  """Whether values differ, and the largest difference."""
  differs, largest = False, 0.0
  for a, b in _blocks(one.read(), other.read()):
    if a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)):
      continue
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    # Infinities of one sign are the same value, though their difference is none.
    with np.errstate(invalid="ignore"):
      gaps = np.where(wide_a == wide_b, 0.0, np.abs(wide_a - wide_b))
    gap = float(np.max(np.where(np.isnan(gaps), np.inf, gaps), initial=0.0))
    largest = max(largest, gap)
    # Zeros of two signs are equal and not the same bits.
    differs = differs or gap > 0 or a.dtype == b.dtype
  return differs, largest


def _blocks(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  flat_one, flat_other = (np.ascontiguousarray(array).reshape(-1) for array in (one, other))
  for start in range(0, flat_one.size, _BLOCK):
    yield flat_one[start : start + _BLOCK], flat_other[start : start + _BLOCK]
