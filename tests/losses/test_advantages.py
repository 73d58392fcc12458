"""Group-mean advantages in NumPy and JAX, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import advantages


def test_by_hand_with_ragged_groups_in_any_order():
  rewards = np.array([1.0, 0.0, 0.5, 0.0, 2.0, 1.0])
  groups = np.array([7, 3, 7, 3, 7, 99])
  expected = [1 - 3.5 / 3, 0.0, 0.5 - 3.5 / 3, 0.0, 2 - 3.5 / 3, 0.0]
  np.testing.assert_allclose(advantages.group_mean(rewards, groups), expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
  members=st.lists(
    st.tuples(st.integers(-3, 3), st.floats(-100, 100, width=32)), min_size=1, max_size=40
  )
)
def test_against_a_loop(members):
  groups = np.array([group for group, _ in members])
  rewards = np.array([reward for _, reward in members], np.float64)
  expected = [reward - rewards[groups == group].mean() for group, reward in members]
  given_back = advantages.group_mean(rewards, groups)
  assert given_back.dtype == np.float64 and isinstance(given_back, np.ndarray)
  np.testing.assert_allclose(given_back, expected, atol=1e-9)
  for group in set(groups):
    assert abs(given_back[groups == group].sum()) < 1e-9


@settings(max_examples=50, deadline=None)
@given(reward=st.floats(-100, 100), size=st.integers(1, 30))
def test_equal_rewards_give_exactly_zero(reward, size):
  rewards = np.full(size + 2, reward)
  rewards[0] += 1
  groups = np.array([1, *([0] * size), 1])
  assert np.all(advantages.group_mean(rewards, groups)[1:-1] == 0)


def test_jax_in_jax_out_under_jit():
  rewards = jnp.float32([1.0, 0.0, 0.5])
  out = jax.jit(advantages.group_mean)(rewards, jnp.int32([1, 1, 2]))
  assert isinstance(out, jax.Array) and out.dtype == jnp.float32
  np.testing.assert_allclose(out, [0.5, -0.5, 0.0])


def test_wrong_arguments_are_named():
  rewards, groups = np.zeros(3), np.zeros(3, np.int32)
  with pytest.raises(ValueError, match=r"one shape \[N\], got \[3\] and \[2\]"):
    advantages.group_mean(rewards, groups[:2])
  with pytest.raises(ValueError, match="rewards_N: expected a floating dtype"):
    advantages.group_mean(groups, groups)
  with pytest.raises(ValueError, match="group_ids_N: expected an integer dtype"):
    advantages.group_mean(rewards, rewards)
  assert advantages.group_mean(rewards[:0], groups[:0]).shape == (0,)
