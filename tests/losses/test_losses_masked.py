"""What is not trained on never matters; what is trained on is always seen, and stays finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

EXAMPLES = [8, pytest.param(200, marks=pytest.mark.slow)]
JUNK = (np.nan, np.inf, -np.inf, 1e30, -1e30)
# Say themselves which tokens take part.
NOT_FREE = ("loss_mask", "segment_ids", "ce_weights")
# Where a log ratio has no bound of its own it is held to +-20, so this is the largest ratio.
LARGEST = np.exp(20.0)
# Arguments of the common signature that a loss has no use for.
UNREAD = {
  "reinforce": ("inference_logprobs",),
  "reverse_kl": ("advantages",),
  "penalty": ("advantages", "inference_logprobs"),
}


def floats(case):
  return ["logprobs", *(name for name in case.fields if name not in NOT_FREE)]


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_masked_positions_never_matter(case, examples):
  def holds(seed, junk, name):
    arrays = batches.batch(seed)
    given = house.denominators(case, arrays)
    dirty = {**arrays, name: np.where(house.trained(case, arrays), arrays[name], np.float32(junk))}
    before, after = house.run(case, arrays, **given), house.run(case, dirty, **given)
    np.testing.assert_array_equal(after.scalars, before.scalars)
    np.testing.assert_array_equal(after.gradient, before.gradient)

  names = st.sampled_from(floats(case))
  house.for_all(
    examples, holds, seed=st.integers(0, 10_000), junk=st.sampled_from(JUNK), name=names
  )


@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_padding_is_not_trained_on_even_if_masked_in(case):
  """Nor read: it holds NaN here."""
  arrays = batches.batch(1)
  padding = arrays["segment_ids"] == 0
  opened = {**arrays, "loss_mask": arrays["loss_mask"] | padding}
  for name in floats(case):
    opened[name] = np.where(padding, np.float32(np.nan), arrays[name])
  given = house.denominators(case, arrays)
  before, after = house.run(case, arrays, **given), house.run(case, opened, **given)
  np.testing.assert_array_equal(after.scalars, before.scalars)
  np.testing.assert_array_equal(after.gradient, before.gradient)
  # Nor does it count: the batch's own denominators are the same.
  np.testing.assert_array_equal(house.run(case, opened).scalars, house.run(case, arrays).scalars)


@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_without_a_trained_token_all_is_zero(case):
  arrays = batches.batch(1)
  arrays["loss_mask"] = np.zeros_like(arrays["loss_mask"])
  arrays["ce_weights"] = np.zeros_like(arrays["ce_weights"])
  whole = house.denominators(case, batches.batch(2))
  none = jax.tree.map(np.zeros_like, whole)  # counts of a whole batch without one
  for given in ({}, whole, none):
    result = house.run(case, arrays, **given)
    np.testing.assert_array_equal(result.scalars, 0)
    np.testing.assert_array_equal(result.gradient, 0)


READERS = tuple(case for case in house.PROPERTIES if case is not house.COMPONENTS)


@pytest.mark.parametrize("case", READERS, ids=str)
def test_a_nan_at_a_trained_token_is_seen(case):
  """A NaN compares as out of no bound, and out of every bound: neither may hide it."""
  for name in floats(case):
    for seed in (0, 1):
      arrays = batches.batch(seed)
      row, place = np.argwhere(house.trained(case, arrays))[3]
      arrays[name] = arrays[name].copy()
      arrays[name][row, place] = np.nan
      result = house.run(case, arrays, **house.denominators(case, arrays))
      reads = name not in UNREAD.get(case.oracle.__name__, ())
      assert np.isnan(result.loss) == reads, name
      # What the loss does not read the metrics do, but for advantages that are of no use.
      assert np.isnan(result.scalars).any() == (reads or name != "advantages"), name


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
@pytest.mark.parametrize("outside", [-1, batches.LENGTH + 1, 7_000_000])
def test_segment_ids_outside_the_row_make_the_loss_nan(case, outside):
  arrays = batches.batch(1)
  row, place = np.argwhere(house.trained(case, arrays))[0]
  ids = arrays["segment_ids"]
  ids = np.where((ids == ids[row, place]) & (np.arange(len(ids))[:, None] == row), outside, ids)
  result = house.run(case, {**arrays, "segment_ids": ids}, **house.denominators(case, arrays))
  assert np.isnan(result.loss)


def extreme(seed, dtype):
  """Logprobs from 0 to -1e4, independently in each array; every field is exact in `dtype`."""
  arrays = batches.batch(seed)
  rng = np.random.default_rng(seed)
  for name in ("logprobs", "inference_logprobs", "old_logprobs", "ref_logprobs"):
    anywhere = -(10.0 ** rng.uniform(-8, 4, arrays[name].shape))
    anywhere = np.where(rng.random(arrays[name].shape) < 0.2, 0.0, anywhere)
    anywhere = np.where(rng.random(arrays[name].shape) < 0.2, -1e4, anywhere)
    arrays[name] = jnp.asarray(anywhere, dtype)
  arrays["advantages"] = jnp.asarray(arrays["advantages"], dtype)
  return arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", (*house.DEFAULTS, *house.VARIANTS), ids=str)
def test_finite_for_all_logprobs(case, dtype):
  for seed in range(6):
    arrays = extreme(seed, dtype)
    result = house.run(case, arrays, **house.denominators(case, arrays))
    assert np.all(np.isfinite(result.scalars)), result
    assert np.all(np.isfinite(result.gradient.astype(np.float32)))
    assert result.loss.dtype == np.float32 and result.gradient.dtype == dtype
    if "importance_ratio" in result.metrics:
      assert 0 <= result.metrics["importance_ratio"] <= LARGEST * 1.0001
      assert 0 <= result.metrics["importance_ratio_squared"] <= LARGEST**2 * 1.0001
    for name, value in result.metrics.items():
      assert not name.endswith("share") or 0 <= value <= 1, name


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_no_nan_on_the_way(case):
  """`debug_nans` also sees a NaN that a `where` hides afterwards."""
  arrays, wild = batches.batch(1), extreme(2, "float32")
  function = jax.jit(house.plain(case))
  with jax.debug_nans(True):
    for one in (arrays, wild):
      result = house.run(case, one, function, **house.denominators(case, one))
      house.run(case, one, house.plain(case), **house.denominators(case, one))  # op by op
      assert np.all(np.isfinite(result.gradient))


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_half_precision_is_computed_in_float32(case):
  """bfloat16 inputs give what their values give in float32; the gradient is rounded once."""
  arrays = batches.batch(3)
  half = {
    name: jnp.asarray(array, jnp.bfloat16) if array.dtype == np.float32 else array
    for name, array in arrays.items()
  }
  wide = {
    name: np.asarray(array, np.float32) if array.dtype == jnp.bfloat16 else array
    for name, array in half.items()
  }
  low, high = (house.run(case, one, **house.denominators(case, arrays)) for one in (half, wide))
  np.testing.assert_allclose(low.scalars, high.scalars, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(low.gradient, high.gradient.astype(jnp.bfloat16))
