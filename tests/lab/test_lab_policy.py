"""The lab's small policy: enumeration, probabilities, samples, exact return."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.lab import mismatch, policy

PROBLEM = policy.make_problem(prompts=2, vocabulary=3, length=3, features=4, solved_share=0.2)
WEIGHTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def step_logprobs(weights, prompt, tokens):
  """Token by token, in float64, without any table."""
  result, previous = [], 3
  for position, token in enumerate(tokens):
    feature = PROBLEM.features_MTPD[prompt, position, previous].astype(np.float64)
    logits = feature @ weights.astype(np.float64)
    result.append(logits[token] - np.log(np.exp(logits).sum()))
    previous = token
  return result


def test_every_sequence_once():
  assert PROBLEM.sequences_ST.tolist() == [list(s) for s in itertools.product(range(3), repeat=3)]
  assert (PROBLEM.prompts, PROBLEM.vocabulary, PROBLEM.length) == (2, 3, 3)


def test_the_share_of_right_sequences():
  assert set(np.unique(PROBLEM.rewards_MS)) == {0.0, 1.0}
  # 27 sequences; the quantile 0.8 lies between the 21st and the 22nd.
  assert PROBLEM.rewards_MS.sum(axis=1).tolist() == [6.0, 6.0]
  assert not np.array_equal(PROBLEM.rewards_MS[0], PROBLEM.rewards_MS[1])


def test_logprobs_token_by_token():
  tokens = np.array([[0, 2, 1], [2, 2, 2]], np.int32)
  prompts = np.array([1, 0])
  got = policy.logprobs(policy.logits(PROBLEM, WEIGHTS), jnp.asarray(prompts), jnp.asarray(tokens))
  want = [step_logprobs(WEIGHTS, p, t) for p, t in zip(prompts, tokens, strict=True)]
  np.testing.assert_allclose(got, want, atol=1e-6)


def by_hand(weights):
  """Probabilities [2, 27] and return, in float64."""
  chances = np.array(
    [
      [np.exp(sum(step_logprobs(weights, prompt, s))) for s in PROBLEM.sequences_ST]
      for prompt in range(2)
    ]
  )
  return chances / 2, (chances * PROBLEM.rewards_MS).sum() / 2


def test_probabilities_return_and_entropy():
  chances, value = by_hand(WEIGHTS)
  got = policy.probabilities(PROBLEM, policy.logits(PROBLEM, WEIGHTS))
  np.testing.assert_allclose(got, chances.ravel(), rtol=1e-5)
  np.testing.assert_allclose(got.sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(policy.expected_return(PROBLEM, WEIGHTS), value, rtol=1e-5)
  entropy = -(2 * chances * np.log(2 * chances)).sum() / 2
  np.testing.assert_allclose(policy.entropy(PROBLEM, WEIGHTS), entropy, rtol=1e-5)
  uniform = policy.entropy(PROBLEM, policy.initial(PROBLEM))
  np.testing.assert_allclose(uniform, 3 * np.log(3), rtol=1e-5)


def test_entropy_of_a_certain_policy_is_zero():
  certain = policy.entropy(PROBLEM, 1e4 * WEIGHTS)
  assert np.isfinite(certain) and abs(certain) < 1e-3


def test_samples_follow_the_probabilities():
  logits = policy.logits(PROBLEM, WEIGHTS)
  prompts = jnp.repeat(jnp.arange(2), 20_000)
  tokens = np.asarray(policy.sample(logits, prompts, jax.random.key(0)))
  assert tokens.dtype == np.int32 and tokens.shape == (40_000, 3)
  index = np.asarray(prompts) * 27 + tokens @ [9, 3, 1]
  seen = np.bincount(index, minlength=54) / 40_000
  want = by_hand(WEIGHTS)[0].ravel()
  assert np.all(np.abs(seen - want) < 4.5 * np.sqrt(want / 40_000) + 1e-4)


def test_rewards_are_looked_up():
  prompts, tokens, rewards = policy.every_trajectory(PROBLEM)
  assert np.array_equal(policy.reward(PROBLEM, prompts, tokens), rewards)
  assert np.array_equal(rewards, PROBLEM.rewards_MS.ravel())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"prompts": 0}, "prompts: expected at least 1"),
    ({"vocabulary": 1}, "vocabulary: expected at least 2"),
    ({"length": 0}, "length: expected at least 1"),
    ({"features": 0}, "features: expected at least 1"),
    ({"solved_share": 1.0}, "solved_share: expected"),
    ({"vocabulary": 10, "length": 6}, "at most 50000 trajectories"),
  ],
)
def test_a_problem_that_cannot_be_raises(arguments, message):
  with pytest.raises(ValueError, match=message):
    policy.make_problem(**arguments)


LOGITS = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)


def test_problems_of_an_experiment_differ_and_stack():
  shape = {"prompts": 2, "vocabulary": 3, "length": 3, "features": 4, "solved_share": 0.2}
  first, second = problems = policy.make_problems(2, **shape)
  assert np.array_equal(first.features_MTPD, PROBLEM.features_MTPD)  # seeds count from 0
  assert not np.array_equal(first.rewards_MS, second.rewards_MS)
  assert not np.array_equal(first.features_MTPD, second.features_MTPD)
  stacked = policy.stack(problems)
  assert stacked.rewards_MS.shape == (2, 2, 27)
  got = jax.vmap(policy.expected_return, in_axes=(0, None))(stacked, WEIGHTS)
  want = [policy.expected_return(problem, WEIGHTS) for problem in problems]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
    policy.make_problems(0, **shape)


@pytest.mark.parametrize("function", [mismatch.bfloat16, mismatch.gaussian, mismatch.outliers(3.0)])
def test_no_amount_of_mismatch_is_exactly_none(function):
  assert np.array_equal(function(jnp.asarray(LOGITS), jax.random.key(0), 0.0), LOGITS)


def test_mismatches_are_as_large_as_they_say():
  key = jax.random.key(0)
  noise = mismatch.gaussian(jnp.asarray(LOGITS), key, 0.3) - LOGITS
  assert 0.28 < np.std(noise) < 0.32
  hit = np.asarray(mismatch.outliers(3.0)(jnp.asarray(LOGITS), key, 0.1)) - LOGITS
  moved = np.abs(hit) > 1e-6
  assert 0.08 < moved.mean() < 0.12
  np.testing.assert_allclose(np.abs(hit[moved]), 3.0, rtol=1e-5)
  assert 0.3 < (hit[moved] > 0).mean() < 0.7
  rounded = np.asarray(mismatch.bfloat16(jnp.asarray(LOGITS), key, 1.0))
  np.testing.assert_allclose(rounded, LOGITS.astype(jnp.bfloat16).astype(np.float32), rtol=1e-6)
  assert not np.array_equal(rounded, LOGITS)
  with pytest.raises(ValueError, match="size: expected at least 0"):
    mismatch.outliers(-1.0)
