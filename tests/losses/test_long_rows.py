"""Rows long enough that sums over segments go by blocks of tokens.

Where few blocks hold more than one segment they are taken as one, else every token by itself; both
must be what a loop says, and the switch must not show.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import segments
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

BLOCK, FIT = segments.BLOCK, 2  # of a row so many blocks may lie in several segments
LENGTH = FIT * BLOCK * segments.MIXED
BY_SEGMENT = tuple(
  case
  for case in house.ALL
  if case.name
  in ("masked_importance", "sequence_ratio", "geometric_masked", "reinforce-sequence_mean")
)
reductions = {
  name: jax.jit(getattr(segments, f"segment_{name}")) for name in ("sum", "mean", "min")
}


def cuts(rng, kind):
  """Where a row's segments end: in few blocks, in many, on the blocks' borders, nowhere."""
  if kind == "few":
    return np.sort(rng.choice(np.arange(1, LENGTH), 2, replace=False))
  if kind == "many":
    return np.sort(rng.choice(np.arange(1, LENGTH), 20, replace=False))
  if kind == "borders":
    return BLOCK * np.sort(rng.choice(np.arange(1, LENGTH // BLOCK), 6, replace=False))
  return np.array([], int)


def ids_of(rng, kinds):
  rows = []
  for kind in kinds:
    if kind == "scattered":
      rows.append(rng.integers(0, 7, LENGTH))
      continue
    lengths = np.diff(np.concatenate([[0], cuts(rng, kind), [LENGTH]]))
    names = rng.choice(LENGTH + 1, len(lengths), replace=False)
    rows.append(np.repeat(names, lengths))
  return np.stack(rows).astype(np.int32)


def by_loop(values, mask, ids):
  wanted = {name: np.zeros(values.shape) for name in ("sum", "mean")}
  wanted["min"] = np.full(values.shape, np.inf)
  for row in range(len(values)):
    for segment in set(ids[row]):
      mine = ids[row] == segment
      held = values[row][mine & mask[row]].astype(float)
      if len(held):
        wanted["sum"][row, mine], wanted["mean"][row, mine] = held.sum(), held.mean()
        wanted["min"][row, mine] = held.min()
  return wanted


@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_segments_against_a_loop(examples):
  kind = st.sampled_from(["few", "many", "borders", "whole", "scattered"])

  @settings(max_examples=examples, deadline=None)
  @given(seed=st.integers(0, 10_000), kinds=st.tuples(kind, kind))
  def holds(seed, kinds):
    rng = np.random.default_rng(seed)
    ids = ids_of(rng, kinds)
    values = rng.standard_normal(ids.shape).astype(np.float32)
    mask = rng.random(ids.shape) < rng.choice([0.05, 0.7])
    wanted = by_loop(values, mask, ids)
    for name, reduce in reductions.items():
      found = reduce(np.where(mask, values, np.float32(np.nan)), mask, ids)
      np.testing.assert_allclose(found, wanted[name], rtol=1e-5, atol=2e-5, err_msg=name)

  holds()


def test_the_rows_are_long_enough():
  assert LENGTH % BLOCK == 0 and LENGTH // BLOCK // segments.MIXED == FIT


def test_as_many_mixed_blocks_as_fit_and_one_more():
  for mixed in range(FIT + 2):
    ids = np.ones((2, LENGTH), np.int32)
    for block in range(mixed):
      ids[1, BLOCK * (block + 3) + 5] = 9
    values = np.arange(2 * LENGTH, dtype=np.float32).reshape(2, LENGTH) % 7
    wanted = by_loop(values, values < 5, ids)
    for name, reduce in reductions.items():
      np.testing.assert_allclose(reduce(values, values < 5, ids), wanted[name], rtol=1e-6)


@pytest.mark.parametrize("outside", [-1, LENGTH + 1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("mixed", [1, FIT + 1])
def test_ids_outside_are_nan_at_their_tokens_only(outside, mixed):
  ids = np.full((2, LENGTH), 5, np.int32)
  ids[0, BLOCK * np.arange(mixed) + 40] = outside
  ones = np.ones(ids.shape, np.float32)
  for name, reduce in reductions.items():
    np.testing.assert_array_equal(np.isnan(reduce(ones, ones > 0, ids)), ids != 5, err_msg=name)
  whole = np.where(np.arange(LENGTH) // BLOCK == 4, outside, ids[1])[None].astype(np.int32)
  found = reductions["sum"](ones[:1], ones[:1] > 0, whole)
  np.testing.assert_array_equal(np.isnan(found), whole != 5)


@pytest.mark.parametrize("packed", [(2, 600), (60, 30)], ids=["by_block", "by_token"])
@pytest.mark.parametrize("case", BY_SEGMENT, ids=str)
def test_losses_against_the_definition(case, packed):
  arrays = batches.batch(1, rows=2, length=LENGTH, packed=packed)
  for layout in (arrays, batches.repacked(arrays, np.random.default_rng(0), 2, LENGTH)):
    wanted, size = house.expected(case, layout)
    result = house.run(case, layout, **house.denominators(case, layout))
    np.testing.assert_allclose(result.loss, wanted.loss, atol=2e-5 * size, rtol=0)
    house.close(result.gradient, wanted.gradient)
    for name, value in wanted.metrics.items():
      house.close(result.metrics[name], value, scale=1e-2, err_msg=name)


def test_vmap_where_one_batch_fits_and_another_does_not():
  rng = np.random.default_rng(0)
  ids = np.stack([ids_of(rng, ("few", "whole")), ids_of(rng, ("many", "scattered"))])
  values = rng.standard_normal(ids.shape).astype(np.float32)
  for name, reduce in reductions.items():
    found = jax.vmap(reduce)(values, values < 1, ids)
    for lane in range(2):
      wanted = by_loop(values[lane], values[lane] < 1, ids[lane])[name]
      np.testing.assert_allclose(found[lane], wanted, rtol=1e-5, atol=2e-5, err_msg=name)


def test_a_gradient_through_the_sums():
  """Of both ways: each token's value counts once for every token of its segment."""
  rng = np.random.default_rng(0)
  for kinds in (("few", "borders"), ("many", "scattered")):
    ids = ids_of(rng, kinds)
    mask = rng.random(ids.shape) < 0.7
    weights = rng.standard_normal(ids.shape).astype(np.float32)
    gradient = jax.grad(lambda x: (reductions["sum"](x, mask, ids) * weights).sum())(weights)  # noqa: B023
    wanted = by_loop(weights, mask | True, ids)["sum"]
    np.testing.assert_allclose(gradient, np.where(mask, wanted, 0), rtol=1e-4, atol=1e-4)
