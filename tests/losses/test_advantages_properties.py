"""What holds of advantages whatever the rewards: order, company, shift, scale, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import advantages


def moving(rewards_N, ids_N):
  """Agents by group id; some have a baseline, some have none yet."""
  xp = rewards_N.__array_namespace__()
  before_M = xp.asarray([float("nan"), 0.25, float("nan"), -1.0, 0.0], dtype=rewards_N.dtype)
  return advantages.moving_baseline(rewards_N, ids_N, before_M, decay=0.9)[0]


def relative(rewards_N, ids_N):
  """Lengths by reward, so that they move with the rollout."""
  xp = rewards_N.__array_namespace__()
  lengths_N = xp.astype(xp.abs(rewards_N) * 7, xp.int32)
  return advantages.relative_length_penalty(rewards_N, lengths_N, ids_N, coefficient=0.5)


FUNCTIONS = {
  "group_mean": advantages.group_mean,
  "group_standardised": advantages.group_standardised,
  "leave_one_out": advantages.leave_one_out,
  "mean_normalised": advantages.mean_normalised,
  "moving_baseline": moving,
  "relative_length_penalty": relative,
}
every = pytest.mark.parametrize("name", FUNCTIONS)
ROLLOUTS = st.lists(
  st.tuples(st.integers(0, 4), st.floats(-3, 3, width=32)), min_size=1, max_size=30
)


def arrays(rollouts, dtype=np.float64):
  return np.array([r for _, r in rollouts], dtype), np.array([g for g, _ in rollouts], np.int32)


@every
@settings(max_examples=40, deadline=None)
@given(rollouts=ROLLOUTS, data=st.data())
def test_the_order_of_rollouts_changes_no_bit(name, rollouts, data):
  rewards, ids = arrays(rollouts)
  order = np.array(data.draw(st.permutations(range(len(rollouts)))))
  np.testing.assert_array_equal(
    FUNCTIONS[name](rewards[order], ids[order]), FUNCTIONS[name](rewards, ids)[order]
  )


@every
@settings(max_examples=40, deadline=None)
@given(rollouts=ROLLOUTS)
def test_other_groups_change_no_bit(name, rollouts):
  rewards, ids = arrays(rollouts)
  whole = FUNCTIONS[name](rewards, ids)
  for group in set(ids.tolist()):
    own = ids == group
    np.testing.assert_array_equal(whole[own], FUNCTIONS[name](rewards[own], ids[own]))


def test_the_order_of_rollouts_moves_baselines_by_no_bit():
  rng = np.random.default_rng(0)
  rewards, ids = rng.normal(size=200), rng.integers(0, 5, 200)
  before = np.array([np.nan, 0.5, 0.0, np.nan, 3.0])
  _, after = advantages.moving_baseline(rewards, ids, before, decay=0.99)
  for _ in range(10):
    order = rng.permutation(200)
    _, again = advantages.moving_baseline(rewards[order], ids[order], before, decay=0.99)
    np.testing.assert_array_equal(again, after)


@pytest.mark.parametrize("name", list(FUNCTIONS)[:4])
@settings(max_examples=40, deadline=None)
@given(
  reward=st.floats(-100, 100),
  size=st.integers(1, 30),
  dtype=st.sampled_from(["float32", "float64"]),
)
def test_equal_rewards_give_exactly_zero(name, reward, size, dtype):
  rewards = np.full(size + 2, reward, dtype)
  rewards[0] += 1
  groups = np.array([1, *([0] * size), 1])
  assert np.all(FUNCTIONS[name](rewards, groups)[1:-1] == 0)


@pytest.mark.parametrize("name", ["group_mean", "group_standardised", "leave_one_out"])
@settings(max_examples=40, deadline=None)
@given(rollouts=ROLLOUTS, shift=st.floats(-50, 50))
def test_a_constant_on_all_rewards_does_not_matter(name, rollouts, shift):
  rewards, ids = arrays(rollouts)
  rewards = np.round(rewards, 3)  # standardising differences of a rounding's size would show it
  np.testing.assert_allclose(
    FUNCTIONS[name](rewards + shift, ids), FUNCTIONS[name](rewards, ids), rtol=1e-6, atol=1e-6
  )


@settings(max_examples=40, deadline=None)
@given(rollouts=ROLLOUTS, scale=st.sampled_from([0.5, 2.0, 16.0]))
def test_the_scale_of_rewards_carries_over_or_cancels(rollouts, scale):
  rewards, ids = arrays(rollouts)
  for name in ("group_mean", "leave_one_out"):  # powers of two scale without rounding
    np.testing.assert_array_equal(
      FUNCTIONS[name](scale * rewards, ids), scale * FUNCTIONS[name](rewards, ids)
    )
  np.testing.assert_array_equal(
    advantages.mean_normalised(scale * rewards, ids), advantages.mean_normalised(rewards, ids)
  )
  np.testing.assert_array_equal(
    advantages.group_standardised(scale * rewards, ids, epsilon=scale * 0.01),
    advantages.group_standardised(rewards, ids, epsilon=0.01),
  )


@settings(max_examples=40, deadline=None)
@given(rollouts=ROLLOUTS)
def test_leave_one_out_is_the_group_mean_times_g_over_g_minus_1(rollouts):
  rewards, ids = arrays(rollouts)
  sizes = np.array([np.sum(ids == group) for group in ids])
  factor = np.where(sizes > 1, sizes / np.maximum(sizes - 1, 1), 0.0)
  np.testing.assert_allclose(
    advantages.leave_one_out(rewards, ids), factor * advantages.group_mean(rewards, ids), rtol=1e-12
  )


def test_one_bad_reward_stays_in_its_group():
  rewards = np.array([1.0, np.nan, 0.0, 1.0, np.inf, 0.0])
  ids = np.array([0, 1, 0, 1, 2, 2])
  for name in list(FUNCTIONS)[:4]:
    with np.errstate(invalid="ignore"):
      given_back = FUNCTIONS[name](rewards, ids)
    np.testing.assert_array_equal(
      given_back[[0, 2]], FUNCTIONS[name](np.array([1.0, 0.0]), np.array([0, 0])), err_msg=name
    )
    assert np.isnan(given_back[[1, 3]]).all(), name


def sample(dtype):
  rng = np.random.default_rng(3)
  rewards = np.concatenate([rng.integers(0, 2, 40), rng.normal(size=21), [0.3] * 3]).astype(dtype)
  return rewards, np.concatenate([rng.integers(0, 4, 61), [4] * 3]).astype(np.int32)


@every
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jax_gives_what_numpy_gives_under_jit_too(name, dtype):
  rewards, ids = sample(dtype)
  expected = FUNCTIONS[name](rewards, ids)
  assert isinstance(expected, np.ndarray) and expected.dtype == dtype
  with jax.enable_x64(dtype == "float64"), jax.debug_nans(name != "moving_baseline"):
    for function in (FUNCTIONS[name], jax.jit(FUNCTIONS[name])):
      out = function(jnp.asarray(rewards), jnp.asarray(ids))
      assert isinstance(out, jax.Array) and out.dtype == dtype
      tolerance = 2e-6 if dtype == "float32" else 1e-14
      np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
      if name in list(FUNCTIONS)[:4]:
        assert np.all(np.asarray(out)[-3:] == 0)


def test_jax_moves_baselines_alike_and_marks_ids_it_cannot_refuse():
  rewards, ids = sample("float32")
  before = np.float32([np.nan, 0.5, 0.0, np.nan, 3.0, 7.0])
  function = functools.partial(advantages.moving_baseline, decay=0.9)
  expected, after = function(rewards, ids, before)
  given_back, moved = jax.jit(function)(rewards, ids, before)
  np.testing.assert_allclose(given_back, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(moved, after, rtol=1e-6, atol=1e-6)
  wrong = ids.copy()
  wrong[:2] = [-1, 6]
  given_back, moved = jax.jit(function)(rewards, wrong, before)
  assert np.flatnonzero(np.isnan(given_back)).tolist() == [0, 1]
  _, without = function(rewards[2:], ids[2:], before)
  np.testing.assert_allclose(moved, without, rtol=1e-6, atol=1e-6)
  with pytest.raises(ValueError, match="agent_ids_N: expected ids from 0 to 5, got -1"):
    function(jnp.asarray(rewards), jnp.asarray(wrong), jnp.asarray(before))


def test_memory_grows_with_the_rollouts_and_not_with_their_square():
  count = 4096
  shapes = (jax.ShapeDtypeStruct((count,), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32))
  compiled = jax.jit(advantages.leave_one_out).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * 4 * count
