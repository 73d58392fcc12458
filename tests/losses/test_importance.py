"""Ratios, the KL estimate and the minimum over segments, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import importance


def test_mismatch_kl_is_accurate_where_the_policies_nearly_agree():
  d = np.float32([[1e-6, -1e-6, 1e-4, -1e-4, 0.0]])
  expected = np.expm1(d.astype(np.float64)) - d.astype(np.float64)
  # exp(d) - d - 1 would be off by 1e-8, more than the value itself.
  error = np.abs(importance.mismatch_kl(d) - expected)
  assert np.all(error <= 1e-7 * np.abs(d)), error


def test_ratio_is_one_where_masked():
  logprobs = np.float32([[0.0, np.nan]])
  ratio = importance.importance_ratio(
    logprobs, logprobs - np.float32(1), np.array([[True, False]])
  )  # fmt: skip
  np.testing.assert_allclose(ratio, [[np.e, 1.0]], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 9))
def test_segment_min_against_a_loop(seed, groups):
  rng = np.random.default_rng(seed)
  values = rng.standard_normal((2, 12)).astype(np.float32)
  mask = rng.random((2, 12)) < 0.5
  names = rng.choice(10**6, groups, replace=False)
  segment_ids = names[rng.integers(0, groups, (2, 12))].astype(np.int32)
  expected = np.full((2, 12), np.inf)
  for row in range(2):
    for token in range(12):
      peers = mask[row] & (segment_ids[row] == segment_ids[row, token])
      if peers.any():
        expected[row, token] = values[row][peers].min()
  np.testing.assert_array_equal(importance.segment_min(values, mask, segment_ids), expected)


def test_segment_min_without_ids_is_the_rows():
  values = np.float32([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
  mask = np.array([[True, False, True], [True, True, False]])
  expected = [[2.0] * 3, [4.0] * 3]
  np.testing.assert_array_equal(importance.segment_min(values, mask), expected)


def test_segment_ids_must_be_integers():
  with pytest.raises(ValueError, match="segment_ids: expected an integer dtype, got float32"):
    importance.segment_min(jnp.ones((1, 2)), jnp.ones((1, 2), bool), jnp.ones((1, 2)))
