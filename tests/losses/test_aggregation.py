"""The three means over tokens, by hand and against loops; and the sums over segments."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import aggregation, segments
from tests.losses import losses_batches as batches

constant = functools.partial(aggregation.constant, divisor=10.0)
MEANS = (aggregation.token_mean, aggregation.sequence_mean, constant)
# Two trajectories in one row, of 3 and of 1 trained tokens; then padding.
VALUES = np.float32([[1.0, 2.0, 6.0, 100.0, 5.0, np.nan]])
IDS = np.int32([[4, 4, 4, 4, 2, 0]])
MASK = np.array([[True, True, True, False, True, False]])


def test_by_hand():
  np.testing.assert_allclose(aggregation.token_mean(VALUES, MASK), 14 / 4)
  np.testing.assert_allclose(aggregation.token_mean(VALUES, MASK, denominator=7.0), 2.0)
  sequences = aggregation.sequence_mean(VALUES, MASK, segment_ids=IDS)
  np.testing.assert_allclose(sequences, ((1 + 2 + 6) / 3 + 5) / 2)
  sequences = aggregation.sequence_mean(VALUES, MASK, segment_ids=IDS, num_sequences=8.0)
  np.testing.assert_allclose(sequences, ((1 + 2 + 6) / 3 + 5) / 8)
  np.testing.assert_allclose(aggregation.sequence_mean(VALUES, MASK), 14 / 4)  # a row is one
  np.testing.assert_allclose(constant(VALUES, MASK), 1.4)


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_over_trajectories_against_a_loop(seed):
  arrays = batches.batch(seed)
  mask = arrays["loss_mask"] & (arrays["segment_ids"] != 0)
  means = [
    np.mean(arrays["advantages"][row, places][mask[row, places]].astype(float))
    for row, places in batches.trajectories(arrays)
    if mask[row, places].any()
  ]
  rest = {"segment_ids": arrays["segment_ids"]}
  found = aggregation.sequence_mean(arrays["advantages"], mask, **rest)
  np.testing.assert_allclose(found, np.mean(means), rtol=1e-5, atol=1e-6)
  found = aggregation.sequence_mean(arrays["advantages"], mask, **rest, num_sequences=100.0)
  np.testing.assert_allclose(found, np.sum(means) / 100, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mean", MEANS)
def test_half_precision_is_summed_in_float32(mean):
  ones = np.ones((4, 4096), jax.numpy.bfloat16)
  result = mean(ones, ones > 0, denominator=1.0, num_sequences=1.0)
  assert result.dtype == np.float32
  assert result == {aggregation.token_mean: 16384, aggregation.sequence_mean: 4}.get(mean, 1638.4)


@pytest.mark.parametrize("mean", MEANS)
def test_float64_stays_float64(mean):
  with jax.enable_x64(True):
    values = np.linspace(1, 2, 21).reshape(3, 7)
    result = mean(values, values > 0)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, values.sum() / (10 if mean is constant else 21), rtol=1e-14)


@pytest.mark.parametrize("mean", MEANS)
def test_nothing_is_zero(mean):
  assert mean(VALUES, MASK & False, segment_ids=IDS) == 0


def test_wrong_use_is_named():
  with pytest.raises(ValueError, match=r"num_sequences: expected .*, got None"):
    aggregation.sequence_mean(VALUES, MASK, segment_ids=IDS, denominator=4.0)
  for divisor in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match=rf"divisor: expected above 0.*, got {divisor}"):
      aggregation.constant(VALUES, MASK, divisor=divisor)
  with pytest.raises(ValueError, match=r"denominator: expected a scalar, got shape \[1\]"):
    aggregation.token_mean(VALUES, MASK, denominator=np.ones(1))
  with pytest.raises(ValueError, match=r"num_sequences: expected a scalar, got shape \[2\]"):
    aggregation.sequence_mean(VALUES, MASK, segment_ids=IDS, num_sequences=np.ones(2))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 9))
def test_segments_against_a_loop(seed, groups):
  rng = np.random.default_rng(seed)
  values = rng.standard_normal((2, 12)).astype(np.float32)
  mask = rng.random((2, 12)) < 0.5
  names = rng.choice(13, groups, replace=False)
  segment_ids = names[rng.integers(0, groups, (2, 12))].astype(np.int32)
  wanted = {name: np.zeros((2, 12)) for name in ("sum", "mean", "count")}
  wanted["min"] = np.full((2, 12), np.inf)
  for row in range(2):
    for token in range(12):
      peers = mask[row] & (segment_ids[row] == segment_ids[row, token])
      held = values[row][peers].astype(float)
      wanted["count"][row, token] = len(held)
      if len(held):
        wanted["sum"][row, token], wanted["mean"][row, token] = held.sum(), held.mean()
        wanted["min"][row, token] = held.min()
  dirty = np.where(mask, values, np.float32(np.nan))
  for name in ("sum", "mean", "min"):
    found = getattr(segments, f"segment_{name}")(dirty, mask, segment_ids)
    np.testing.assert_allclose(found, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
  np.testing.assert_array_equal(segments.segment_count(mask, segment_ids), wanted["count"])


def test_segments_without_ids_are_the_rows():
  values = np.float32([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
  mask = np.array([[True, False, True], [True, True, False]])
  np.testing.assert_array_equal(segments.segment_min(values, mask), [[2.0] * 3, [4.0] * 3])
  np.testing.assert_array_equal(segments.segment_sum(values, mask), [[5.0] * 3, [9.0] * 3])
  np.testing.assert_array_equal(segments.segment_mean(values, mask), [[2.5] * 3, [4.5] * 3])


def test_segment_ids_outside_are_nan_at_their_tokens_only():
  ids = np.int32([[1, -1, 4, 3]])
  ones = np.ones((1, 4), np.float32)
  for function in (segments.segment_sum, segments.segment_min, segments.segment_mean):
    np.testing.assert_array_equal(
      np.isnan(function(ones, ones > 0, ids)), [[False, True, False, False]]
    )
    np.testing.assert_array_equal(
      np.isnan(function(ones, ones > 0, ids + 1)), [[False, False, True, False]]
    )


def test_segment_ids_must_be_integers_of_the_same_shape():
  ones = np.ones((1, 2), np.float32)
  with pytest.raises(ValueError, match="segment_ids: expected an integer dtype, got float32"):
    segments.segment_min(ones, ones > 0, ones)
  with pytest.raises(ValueError, match=r"segment_ids: expected .*\[1, 2\], got \[1, 1\]"):
    segments.segment_sum(ones, ones > 0, np.ones((1, 1), np.int32))
