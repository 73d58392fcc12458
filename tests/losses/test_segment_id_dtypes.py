"""Segment ids of any integer dtype: also of one that cannot hold the row's length.

An int8 row of 200 tokens has ids up to 127 only, and 200 is no int8: nothing may be cast to the
dtype of the ids, or a valid id becomes one outside, and one outside a valid id.
"""

import jax
import numpy as np
import pytest

from intellect3.losses import segments
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

# Lengths that the dtype can hold, and that it cannot.
LENGTHS = (
  ("int8", 100), ("int8", 200), ("int8", 300), ("uint8", 200), ("uint8", 300), ("int16", 300),
  ("int16", 65_536), ("uint16", 65_536), ("int64", 300),
)  # fmt: skip
reductions = {name: getattr(segments, f"segment_{name}") for name in ("sum", "mean", "min")}


@jax.jit
def reduced(values, mask, ids):
  """All four, in one compilation."""
  found = {name: reduce(values, mask, ids) for name, reduce in reductions.items()}
  return {**found, "count": segments.segment_count(mask, ids)}


def packed(dtype, length):
  """Ids [2, length]: runs in one row, scattered in the other; 0, the largest, few others."""
  most = min(np.iinfo(dtype).max, length)
  names = np.array([0, 1, most // 2 + 1, most - 1, most])
  rng = np.random.default_rng(length)
  ends = np.sort(rng.choice(np.arange(1, length), len(names) - 1, replace=False))
  runs = np.repeat(rng.permutation(names), np.diff([0, *ends, length]))
  return np.stack([runs, rng.choice(names, length)]).astype(dtype)


@pytest.mark.parametrize(("dtype", "length"), LENGTHS)
def test_sums_over_segments(dtype, length):
  """Against a sum over each id's tokens, the ids compared as they are."""
  with jax.enable_x64("64" in dtype):
    ids = packed(dtype, length)
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 9, ids.shape).astype(np.float32)  # sums are exact in any order
    mask = rng.random(ids.shape) < 0.6
    mask |= np.diff(ids, axis=1, prepend=0) != 0  # each id has a token of the mask
    found = jax.tree.map(np.asarray, reduced(values, mask, ids))
  for row in range(2):
    for segment in np.unique(ids[row]):
      mine = ids[row] == segment
      held = values[row][mine & mask[row]].astype(float)
      wanted = {"sum": held.sum(), "mean": held.mean(), "min": held.min(), "count": len(held)}
      for name, value in wanted.items():
        np.testing.assert_allclose(
          found[name][row][mine], value, rtol=1e-6, err_msg=f"{name} of {segment}"
        )


# Cast to a wider unsigned dtype by way of the own width, -1 is 255 or 65,535: within the row.
OUTSIDE = (
  ("int8", 300, (-1, -100, -128)), ("int8", 100, (-1, 101, 127)), ("uint8", 200, (201, 255)),
  ("int16", 300, (-1, 301, 2**15 - 1)), ("int16", 65_536, (-1, -(2**15))),
  ("uint16", 300, (301, 2**16 - 1)), ("uint32", 300, (301, 2**31, 2**32 - 1)),
  ("int64", 300, (-1, 2**32, 2**32 + 1, -(2**32) + 1, 2**63 - 1)),
  ("uint64", 300, (301, 2**32 + 1, 2**63 + 1, 2**64 - 1)),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "length", "outside"), OUTSIDE)
def test_an_id_outside_is_nan_at_its_tokens_only(dtype, length, outside):
  for one in outside:
    ids = np.ones((2, length), dtype)
    ids[0, [3, length - 1]] = ids[1, : length // 2] = one
    ones = np.ones(ids.shape, np.float32)
    with jax.enable_x64("64" in dtype):
      for name, found in reduced(ones, ones > 0, ids).items():
        np.testing.assert_array_equal(np.isnan(found), ids != 1, err_msg=f"{name} {one}")


# Each of a segment's minimum, its mean, or none.
LOSSES = (
  ("masked_importance", "int8", 200), ("masked_importance", "uint16", 65_536),
  ("sequence_ratio", "uint8", 300), ("sequence_ratio", "int16", 65_536),
  ("negative_log_likelihood", "int8", 200),
)  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "length"), LOSSES)
def test_losses(name, dtype, length):
  """What ids of int32 give is what the same ids of another dtype give; one outside is seen."""
  case = next(case for case in house.DEFAULTS if case.name == name)
  arrays = batches.batch(2, rows=2, length=length, packed=(4, length // 4))
  most = min(np.iinfo(dtype).max, length)
  for row in range(2):
    kinds = np.setdiff1d(arrays["segment_ids"][row], [0])
    for segment, fitting in zip(kinds, (1, most // 2 + 1, most - 1, most), strict=False):
      arrays["segment_ids"][row][arrays["segment_ids"][row] == segment] = -fitting
  arrays["segment_ids"] = np.abs(arrays["segment_ids"])
  given = house.denominators(case, arrays)
  wanted = house.run(case, arrays, **given)
  narrow = {**arrays, "segment_ids": arrays["segment_ids"].astype(dtype)}
  assert np.isfinite(wanted.loss) and wanted.loss != 0
  found = house.run(case, narrow, **given)
  np.testing.assert_allclose(found.scalars, wanted.scalars, rtol=1e-6)
  house.close(found.gradient, wanted.gradient, rtol=1e-6)
  if np.iinfo(dtype).min < 0:
    row, place = np.argwhere(house.trained(case, arrays))[0]
    narrow["segment_ids"][row, place] = -1
    assert np.isnan(house.run(case, narrow, **given).loss)


def test_numpy_ids_of_64_bits_without_64_bits_in_jax():
  """NumPy's own integers; jax cuts 2^32 + 1 off to 1, which would be a valid id."""
  ids = np.array([[1, 1, 2, 2**32 + 1, -(2**32) + 2]], np.int64)
  values, mask = np.float32([[1, 2, 4, 8, 16]]), np.ones((1, 5), bool)
  found = segments.segment_sum(values, mask, ids)
  np.testing.assert_array_equal(found, [[3, 3, 4, np.nan, np.nan]])
