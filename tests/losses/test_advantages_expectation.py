"""What the advantages' policy gradient is in expectation: exact, by enumerating a small bandit."""

import itertools

import numpy as np
import pytest

from intellect3.losses import advantages

POLICY = np.array([0.2, 0.3, 0.5])  # softmax over three arms: d log pi(a) / d logits = 1_a - pi


def expected_gradient(rewards, size, function):
  """E[(1/G) sum_i A_i d log pi(a_i)] over every group of `size` draws."""
  gradient = np.zeros(len(POLICY))
  for arms in itertools.product(range(len(POLICY)), repeat=size):
    arms = np.array(arms)
    scores = np.eye(len(POLICY))[arms] - POLICY
    advantage = function(rewards[arms], np.zeros(size, np.int64))
    gradient += np.prod(POLICY[arms]) * advantage @ scores / size
  return gradient


def policy_gradient(rewards):
  """d E[R] / d logits."""
  return POLICY * (rewards - POLICY @ rewards)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_leave_one_out_is_unbiased_and_the_group_mean_is_short_of_it_by_one_over_g(size):
  rewards = np.array([1.0, -0.5, 0.3])
  exact = policy_gradient(rewards)
  loo = expected_gradient(rewards, size, advantages.leave_one_out)
  np.testing.assert_allclose(loo, exact, rtol=1e-12)
  mean = expected_gradient(rewards, size, advantages.group_mean)
  np.testing.assert_allclose(mean, (size - 1) / size * exact, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_mean_normalised_is_the_likelihoods_expansion_up_to_g_minus_1_terms(size):
  solved = np.array([1.0, 0.0, 0.0])
  chance = POLICY @ solved
  # d pass@k / k = (1-p)^(k-1) dp
  terms = sum((1 - chance) ** (k - 1) for k in range(1, size))
  given_back = expected_gradient(solved, size, advantages.mean_normalised)
  np.testing.assert_allclose(given_back, terms * policy_gradient(solved), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("baseline", [0.0, 0.7, np.nan])
@pytest.mark.parametrize("size", [1, 3])
def test_a_moving_baseline_is_unbiased_known_or_not(size, baseline):
  rewards = np.array([1.0, -0.5, 0.3])

  def function(rewards_N, ids_N):
    return advantages.moving_baseline(rewards_N, ids_N, np.array([baseline]), decay=0.9)[0]

  given_back = expected_gradient(rewards, size, function)
  np.testing.assert_allclose(given_back, policy_gradient(rewards), rtol=1e-12)
