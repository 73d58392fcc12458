"""Conversions that make infinities of numbers: found while copying, told tensor by tensor. No jax.

Place in the ring: under whatever converts weights to a dtype of a smaller range (float16 ends at
65504). Such a checkpoint looks whole and is not; it is refused, naming every tensor.
"""

import functools
from collections.abc import Sequence

import ml_dtypes
import numpy as np

_BITS: dict[int, type] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_BLOCK = 1 << 18
"""Elements that are looked at together: they stay in a cache."""
_NAMED = 50
"""Tensors that an error names at most."""


def largest_lost(out: np.ndarray, source: np.ndarray) -> float:
  """The largest size of a finite value that became infinite in a conversion; 0.0 where none did.

  Looks only where out's dtype ends before source's.

  Args:
    out: converted, floating point.
    source: of the same shape.
  """
  if out.dtype == source.dtype or _largest(out.dtype) >= _largest(source.dtype):
    return 0.0
  # Exponents as integers: many times as fast as `isfinite` of these dtypes.
  plain = _BITS[out.dtype.itemsize]
  flat: np.ndarray = out.reshape(-1).view(plain)
  infinite: np.ndarray = np.full((), np.inf, out.dtype).view(plain)
  starts = range(0, flat.size, _BLOCK)
  if not any(((flat[start : start + _BLOCK] & infinite) == infinite).any() for start in starts):
    return 0.0
  lost = np.abs(source[np.isinf(out) & np.isfinite(source)].astype(np.float64))
  return float(lost.max(initial=0.0))


def line(name: str, dtype: np.dtype, largest: float) -> str:
  """What is told of a tensor in which a value of size `largest` became infinite as `dtype`."""
  return f"{name}: {dtype} holds up to {_largest(dtype):.6g}, got {largest:.6g}"


def refuse(lines: Sequence[str]) -> None:
  """Raises one ValueError where there are lines of `line`; it lists them, or the first of many."""
  if not lines:
    return
  told = sorted(set(lines))
  rest = [f"and {len(told) - _NAMED} more"] if len(told) > _NAMED else []
  raise ValueError(
    f"dtype: expected one that holds the tensors' values, got one too small for {len(told)}:\n  "
    + "\n  ".join([*told[:_NAMED], *rest])
  )


@functools.cache
def _largest(dtype: np.dtype) -> float:
  return float(ml_dtypes.finfo(dtype).max)
