"""Rows long enough that sums over segments go by blocks of tokens.

Where few blocks hold more than one segment they are taken as one, else smaller blocks, else every
token by itself; all must be what a loop says, and no switch must show. A row that is no whole
number of blocks is filled up, and that must not show either.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import segments
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

SMALL, LARGE = min(segments.BLOCKS), max(segments.BLOCKS)
FIT = 3  # of a row so many of the large blocks may lie in several segments
LENGTH = FIT * LARGE * segments.MIXED
SMALL_FIT = LENGTH // SMALL // segments.MIXED
# A whole number of blocks; not; too short for large blocks; for any.
ODD, MIDDLE, SHORT = LENGTH - SMALL - 5, 2 * SMALL * segments.MIXED - 3, SMALL + 1
LENGTHS = (LENGTH, ODD, MIDDLE, SHORT)
BY_SEGMENT = tuple(
  case
  for case in house.ALL
  if case.name
  in ("masked_importance", "sequence_ratio", "geometric_masked", "reinforce-sequence_mean")
)


@jax.jit
def reduced(values, mask, ids):
  """All of them, in one compilation."""
  return {
    "sum": segments.segment_sum(values, mask, ids),
    "mean": segments.segment_mean(values, mask, ids),
    "min": segments.segment_min(values, mask, ids),
    "count": segments.segment_count(mask, ids),
  }


def cuts(rng, kind, length):
  """Where a row's segments end: so many cuts, or anywhere on the borders of blocks."""
  if kind == "borders":
    return SMALL * np.sort(rng.choice(np.arange(1, length // SMALL + 1), 6))
  most = {"few": FIT - 1, "some": FIT + 4, "many": 4 * SMALL_FIT, "whole": 0}[kind]
  return np.sort(rng.choice(np.arange(1, length), min(most, length - 1), replace=False))


def ids_of(rng, kinds, length=LENGTH):
  rows = []
  for kind in kinds:
    if kind == "scattered":
      rows.append(rng.integers(0, 7, length))
      continue
    lengths = np.diff(np.concatenate([[0], np.minimum(cuts(rng, kind, length), length), [length]]))
    names = rng.choice(length + 1, len(lengths), replace=False)
    rows.append(np.repeat(names, lengths))
  return np.stack(rows).astype(np.int32)


def by_loop(values, mask, ids):
  wanted = {name: np.zeros(values.shape) for name in ("sum", "mean", "count")}
  wanted["min"] = np.full(values.shape, np.inf)
  for row in range(len(values)):
    for segment in set(ids[row]):
      mine = ids[row] == segment
      held = values[row][mine & mask[row]].astype(float)
      wanted["count"][row, mine] = len(held)
      if len(held):
        wanted["sum"][row, mine], wanted["mean"][row, mine] = held.sum(), held.mean()
        wanted["min"][row, mine] = held.min()
  return wanted


def is_the_loop(found, values, mask, ids):
  for name, value in by_loop(values, mask, ids).items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", LENGTHS)
def test_segments_against_a_loop(length, examples):
  kind = st.sampled_from(["few", "some", "many", "borders", "whole", "scattered"])

  @settings(max_examples=examples, deadline=None)
  @given(seed=st.integers(0, 10_000), kinds=st.tuples(kind, kind))
  def holds(seed, kinds):
    rng = np.random.default_rng(seed)
    ids = ids_of(rng, kinds, length)
    values = rng.standard_normal(ids.shape).astype(np.float32)
    mask = rng.random(ids.shape) < rng.choice([0.05, 0.7])
    is_the_loop(reduced(np.where(mask, values, np.float32(np.nan)), mask, ids), values, mask, ids)

  holds()


def test_the_rows_are_what_the_tests_say():
  assert SMALL < LARGE and len(segments.BLOCKS) == 2
  assert FIT + 4 < SMALL_FIT and LARGE + MIDDLE < LARGE * segments.MIXED


@pytest.mark.parametrize("length", [LENGTH, ODD])
@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_as_many_mixed_blocks_as_fit_and_one_more(size, length):
  """One token of another segment in so many blocks; the filled-up last block may be one too."""
  fit = LENGTH // size // segments.MIXED
  for mixed in range(fit - 2, fit + 3):
    ids = np.ones((2, length), np.int32)
    ids[1, size * (np.arange(mixed) + 3) + 5] = 9
    values = np.arange(2 * length, dtype=np.float32).reshape(2, length) % 7
    is_the_loop(reduced(values, values < 5, ids), values, values < 5, ids)


@pytest.mark.parametrize("outside", [-1, LENGTH + 1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("mixed", [1, FIT + 1, SMALL_FIT + 1])
def test_ids_outside_are_nan_at_their_tokens_only(outside, mixed):
  for length in (LENGTH, ODD):
    ids = np.full((2, length), 5, np.int32)
    ids[0, (length // mixed) * np.arange(mixed) + 7] = outside  # in as many blocks, if they fit
    ids[1, length - SMALL :] = outside  # whole blocks, and beside what fills the row up
    ones = np.ones(ids.shape, np.float32)
    for name, found in reduced(ones, ones > 0, ids).items():
      np.testing.assert_array_equal(np.isnan(found), ids != 5, err_msg=f"{name} {length}")


def test_the_next_id_is_outside_although_rows_are_filled_up():
  """What fills a row up is a segment of nobody: its id, T + 1, is no valid one."""
  for length in (ODD, MIDDLE, SHORT):
    ids = np.full((2, length), 2, np.int32)
    ids[0, -3:] = length + 1
    ids[0, :3] = length
    ones = np.ones(ids.shape, np.float32)
    found = reduced(ones, ones > 0, ids)
    for name, value in found.items():
      np.testing.assert_array_equal(np.isnan(value), ids > length, err_msg=name)
    np.testing.assert_array_equal(found["sum"][0, :3], 3)


PACKED = {"large": (2, 600), "small": (7, 220), "token": (60, 30)}


@pytest.mark.parametrize("packed", PACKED.values(), ids=list(PACKED))
@pytest.mark.parametrize("case", BY_SEGMENT, ids=str)
def test_losses_against_the_definition(case, packed):
  length = ODD
  arrays = batches.batch(1, rows=2, length=length, packed=packed)
  for layout in (arrays, batches.repacked(arrays, np.random.default_rng(0), 2, length)):
    wanted, size = house.expected(case, layout)
    result = house.run(case, layout, **house.denominators(case, layout))
    np.testing.assert_allclose(result.loss, wanted.loss, atol=2e-5 * size, rtol=0)
    house.close(result.gradient, wanted.gradient)
    for name, value in wanted.metrics.items():
      house.close(result.metrics[name], value, scale=1e-2, err_msg=name)


def test_vmap_where_one_batch_fits_and_another_does_not():
  rng = np.random.default_rng(0)
  kinds = (("few", "whole"), ("some", "few"), ("many", "scattered"))
  ids = np.stack([ids_of(rng, pair) for pair in kinds])
  values = rng.standard_normal(ids.shape).astype(np.float32)
  found = jax.vmap(reduced)(values, values < 1, ids)
  for lane in range(len(kinds)):
    mine = {name: value[lane] for name, value in found.items()}
    is_the_loop(mine, values[lane], values[lane] < 1, ids[lane])


@pytest.mark.parametrize("length", [LENGTH, ODD])
def test_a_gradient_through_the_sums(length):
  """Of every way: each token's value counts once for every token of its segment."""
  rng = np.random.default_rng(0)
  gradient_of = jax.jit(
    jax.grad(lambda x, weights, *rest: (segments.segment_sum(x, *rest) * weights).sum())
  )
  for kinds in (("few", "whole"), ("few", "some"), ("many", "scattered")):
    ids = ids_of(rng, kinds, length)
    mask = rng.random(ids.shape) < 0.7
    weights = rng.standard_normal(ids.shape).astype(np.float32)
    gradient = gradient_of(np.where(mask, weights, np.nan), weights, mask, ids)
    wanted = by_loop(weights, mask | True, ids)["sum"]
    np.testing.assert_allclose(gradient, np.where(mask, wanted, 0), rtol=1e-4, atol=1e-4)
