"""Advantages in NumPy: numbers worked by hand, and loops over the papers' equations in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import advantages

BY_GROUP = (
  advantages.group_mean,
  advantages.group_standardised,
  advantages.leave_one_out,
  advantages.mean_normalised,
)

GROUPED = st.lists(
  st.tuples(st.integers(-3, 3), st.floats(-100, 100, width=32)), min_size=1, max_size=40
)


def arrays(members):
  groups = np.array([group for group, _ in members])
  return np.array([reward for _, reward in members], np.float64), groups


def test_by_hand_with_ragged_groups_in_any_order():
  rewards = np.array([1.0, 0.0, 0.5, 0.0, 2.0, 1.0])
  groups = np.array([7, 3, 7, 3, 7, 99])
  mean = [1 - 3.5 / 3, 0.0, 0.5 - 3.5 / 3, 0.0, 2 - 3.5 / 3, 0.0]
  np.testing.assert_allclose(advantages.group_mean(rewards, groups), mean, rtol=1e-12)
  # Of group 7, the others' means are 1.25, 1.5 and 0.75; the squares' sum is 7/6.
  loo = [-0.25, 0.0, -1.0, 0.0, 1.25, 0.0]
  np.testing.assert_allclose(advantages.leave_one_out(rewards, groups), loo, rtol=1e-12)
  over_mean = [1 / (3.5 / 3) - 1, 0.0, 0.5 / (3.5 / 3) - 1, 0.0, 2 / (3.5 / 3) - 1, 0.0]
  np.testing.assert_allclose(advantages.mean_normalised(rewards, groups), over_mean, rtol=1e-12)
  for ddof in (0, 1):
    std = np.sqrt(7 / 6 / (3 - ddof)) + 0.25
    given_back = advantages.group_standardised(rewards, groups, epsilon=0.25, ddof=ddof)
    np.testing.assert_allclose(given_back, np.array(mean) / std, rtol=1e-12)


def loop(name, rewards, index, group):
  """The equation of one function for one rollout, over its group's members."""
  reward, mean = rewards[index], np.mean(rewards[group])
  if name == "group_mean":
    return reward - mean
  if name == "group_standardised":
    std = np.std(rewards[group], ddof=1) if len(group) > 1 else 0.0
    return (reward - mean) / (std + 1e-6)
  if name == "leave_one_out":
    others = [rewards[other] for other in group if other != index]
    return reward - np.mean(others) if others else 0.0
  return (reward - mean) / mean if mean > 0 else 0.0


@pytest.mark.parametrize("function", BY_GROUP)
@settings(max_examples=40, deadline=None)
@given(members=GROUPED)
def test_against_a_loop(function, members):
  rewards, groups = arrays(members)
  if function is advantages.mean_normalised:
    rewards = np.round(np.abs(rewards), 2)  # a mean near zero would amplify any rounding
  given_back = function(rewards, groups)
  assert given_back.dtype == np.float64 and isinstance(given_back, np.ndarray)
  for index, group in enumerate(groups):
    expected = loop(function.__name__, rewards, index, np.flatnonzero(groups == group))
    np.testing.assert_allclose(given_back[index], expected, rtol=1e-9, atol=1e-6)
  scale = max(1.0, np.max(np.abs(given_back)))
  for group in set(groups):
    assert abs(given_back[groups == group].sum()) < 1e-11 * scale * len(groups)


def test_a_mean_that_is_not_positive_gives_no_signal():
  rewards = np.array([-1.0, 1.0, 0.0, 0.0, -2.0, 1.0])
  assert np.all(advantages.mean_normalised(rewards, np.array([0, 0, 1, 1, 2, 2])) == 0)


def moving(rewards, agents, baselines, decay):
  """The equations of `moving_baseline`, rollout by rollout."""
  expected, after = [], list(baselines)
  for index, (reward, agent) in enumerate(zip(rewards, agents, strict=True)):
    baseline = baselines[agent]
    if np.isnan(baseline):
      others = [r for j, r in enumerate(rewards) if agents[j] == agent and j != index]
      baseline = np.mean(others) if others else 0.0
    expected.append(reward - baseline)
  for agent in set(agents):
    own = [r for r, other in zip(rewards, agents, strict=True) if other == agent]
    kept = 0.0 if np.isnan(baselines[agent]) else decay ** len(own)
    before = 0.0 if np.isnan(baselines[agent]) else baselines[agent]
    after[agent] = kept * before + (1 - kept) * np.mean(own)
  return expected, after


@settings(max_examples=60, deadline=None)
@given(
  members=st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, width=32)), max_size=20),
  baselines=st.lists(st.just(np.nan) | st.floats(-5, 5, width=32), min_size=4, max_size=6),
  decay=st.floats(0, 0.99),
)
def test_the_moving_baseline_against_a_loop(members, baselines, decay):
  rewards, agents = arrays(members)
  agents = agents.astype(np.int64)
  before = np.array(baselines)
  given_back, after = advantages.moving_baseline(rewards, agents, before, decay=decay)
  expected, moved = moving(rewards, agents, baselines, decay)
  np.testing.assert_allclose(given_back, expected, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(after, moved, rtol=1e-9, atol=1e-9)
  absent = np.setdiff1d(np.arange(len(before)), agents)
  np.testing.assert_array_equal(after[absent], before[absent])


def test_the_moving_baseline_is_the_mean_over_all_orders_of_the_papers_update():
  import itertools

  rewards, decay = [1.0, 0.0, 0.25], 0.9
  after = []
  for order in itertools.permutations(rewards):
    baseline = 0.5
    for reward in order:
      baseline = decay * baseline + (1 - decay) * reward
    after.append(baseline)
  _, moved = advantages.moving_baseline(
    np.array(rewards), np.zeros(3, np.int32), np.array([0.5]), decay=decay
  )
  np.testing.assert_allclose(moved, [np.mean(after)], rtol=1e-12)


def test_length_penalties_by_hand():
  rewards = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
  lengths = np.array([80, 90, 95, 100, 500])
  soft = advantages.length_penalty(
    rewards, lengths, max_length=100, buffer_length=20, coefficient=0.5
  )
  np.testing.assert_allclose(soft, [1.0, 0.75, -0.375, 0.5, -0.5], rtol=1e-12)
  # Kimi: 0.5 - (L - 80) / 420, and for the two that are wrong at most 0.
  relative = advantages.relative_length_penalty(rewards, lengths, coefficient=2.0)
  by_hand = [2.0, 2 - 20 / 420, 0.0, 2 - 40 / 420, -1.0]
  np.testing.assert_allclose(relative, by_hand, rtol=1e-12)
  groups = np.array([1, 2, 2, 0, 0])
  relative = advantages.relative_length_penalty(rewards, lengths, groups, coefficient=1.0)
  np.testing.assert_allclose(relative, [1.0, 1.5, -0.5, 1.5, -0.5], rtol=1e-12)
  level = advantages.relative_length_penalty(rewards, lengths * 0 + 7, groups, coefficient=1.0)
  np.testing.assert_array_equal(level, rewards)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64])
def test_lengths_may_be_unsigned(dtype):
  rewards, lengths = np.zeros(3), np.array([1, 50, 100], dtype)
  soft = advantages.length_penalty(rewards, lengths, max_length=100, buffer_length=50)
  np.testing.assert_allclose(soft, [0, 0, -1])
  relative = advantages.relative_length_penalty(rewards, lengths, coefficient=1.0)
  np.testing.assert_allclose(relative, [0, 0.5 - 49 / 99 - abs(0.5 - 49 / 99), -0.5])


@pytest.mark.parametrize(
  "function",
  [
    *BY_GROUP,
    lambda r, g: advantages.moving_baseline(r, g, np.zeros(2), decay=0.5),
    lambda r, g: advantages.length_penalty(r, g, max_length=2, buffer_length=1),
    lambda r, g: advantages.relative_length_penalty(r, g, coefficient=1.0),
  ],
)
def test_wrong_arguments_are_named(function):
  rewards, ids = np.zeros(3), np.zeros(3, np.int32)
  with pytest.raises(ValueError, match=r"one shape \[N\], got \[3\] and \[2\]"):
    function(rewards, ids[:2])
  with pytest.raises(ValueError, match=r"one shape \[N\], got \[1, 3\] and \[1, 3\]"):
    function(rewards[None], ids[None])
  with pytest.raises(ValueError, match="rewards_N: expected a floating dtype, got int32"):
    function(ids, ids)
  with pytest.raises(ValueError, match="_N: expected an integer dtype, got float64"):
    function(rewards, rewards)
  out = function(rewards[:0], ids[:0])
  assert (out[0] if isinstance(out, tuple) else out).shape == (0,)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda r, i: advantages.group_standardised(r, i, epsilon=0), "epsilon: expected finite and"),
    (lambda r, i: advantages.group_standardised(r, i, ddof=2), "ddof: expected 0 or 1, got 2"),
    (
      lambda r, i: advantages.moving_baseline(r, i, np.zeros(2), decay=1.0),
      r"decay: expected in \[0, 1\), got 1.0",
    ),
    (
      lambda r, i: advantages.moving_baseline(r, i, np.zeros((2, 1)), decay=0.5),
      r"baselines_M: expected float64\[M\], got float64\[2, 1\]",
    ),
    (
      lambda r, i: advantages.moving_baseline(r, i, np.zeros(2, np.float32), decay=0.5),
      r"baselines_M: expected float64\[M\], got float32\[2\]",
    ),
    (
      lambda r, i: advantages.moving_baseline(r, np.int32([0, 2, 1]), np.zeros(2), decay=0.5),
      "agent_ids_N: expected ids from 0 to 1, got 2",
    ),
    (
      lambda r, i: advantages.moving_baseline(r, i - 1, np.zeros(2), decay=0.5),
      "agent_ids_N: expected ids from 0 to 1, got -1",
    ),
    (
      lambda r, i: advantages.length_penalty(r, i, max_length=5, buffer_length=6),
      "buffer_length: expected from 1 to max_length 5, got 6",
    ),
    (
      lambda r, i: advantages.length_penalty(r, i, max_length=5, buffer_length=0),
      "buffer_length: expected from 1",
    ),
    (
      lambda r, i: advantages.length_penalty(
        r, i, max_length=5, buffer_length=1, coefficient=np.nan
      ),
      "coefficient: expected finite and >= 0, got nan",
    ),
    (
      lambda r, i: advantages.relative_length_penalty(r, i, coefficient=-1),
      "coefficient: expected finite and >= 0, got -1",
    ),
  ],
)
def test_wrong_parameters_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.zeros(3), np.zeros(3, np.int32))
