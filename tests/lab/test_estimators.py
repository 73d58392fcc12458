"""Bias and variance of corrections against sums in float64 and finite differences."""

import collections
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from intellect3.lab import corrections, estimators, mismatch, policy, training
from intellect3.losses import policy_gradient

PROBLEM = policy.make_problem(prompts=2, vocabulary=3, length=2, features=3, solved_share=0.3)
OTHER = policy.make_problem(prompts=2, vocabulary=3, length=2, features=3, solved_share=0.3, seed=1)
RANDOM = np.random.default_rng(0)
TARGET = RANDOM.normal(size=(3, 3)).astype(np.float32)
BEHAVIOUR = TARGET + 2 * RANDOM.normal(size=(3, 3)).astype(np.float32)


def walk(weights, prompt, tokens):
  """Logprobs [T] and their gradients [T, D, V] of one trajectory, in float64."""
  logprobs, gradients, previous = [], [], 3
  for position, token in enumerate(tokens):
    feature = PROBLEM.features_MTPD[prompt, position, previous].astype(np.float64)
    logits = feature @ weights.astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum()
    logprobs.append(np.log(chances[token]))
    gradients.append(np.outer(feature, np.eye(3)[token] - chances))
    previous = token
  return np.array(logprobs), np.array(gradients)


def trajectories():
  for prompt in range(2):
    for number, tokens in enumerate(itertools.product(range(3), repeat=2)):
      yield prompt, tokens, float(PROBLEM.rewards_MS[prompt, number])


def returned(weights):
  """J, in float64."""
  return sum(np.exp(walk(weights, p, s)[0].sum()) * reward / 2 for p, s, reward in trajectories())


def exact_gradient():
  gradient, step = np.zeros((3, 3)), 1e-4
  for place in np.ndindex(3, 3):
    shift = np.zeros((3, 3))
    shift[place] = step
    there, back = TARGET.astype(np.float64) + shift, TARGET.astype(np.float64) - shift
    gradient[place] = (returned(there) - returned(back)) / (2 * step)
  return gradient


def oracle(token_weights):
  """The estimate of a loss that weights tokens by `token_weights`, in float64.

  It is called with the ratios of the tokens, their logprobs and the advantage.
  """
  behaviour = [walk(BEHAVIOUR, p, s)[0] for p, s, _ in trajectories()]
  chance = np.exp([logprobs.sum() for logprobs in behaviour]) / 2
  rewards = np.array([reward for _, _, reward in trajectories()])
  baseline = [2 * np.sum((chance * rewards)[:9]), 2 * np.sum((chance * rewards)[9:])]
  updates, weights, kept = [], [], []
  for (prompt, tokens, reward), inference_logprobs in zip(trajectories(), behaviour, strict=True):
    logprobs, gradients = walk(TARGET, prompt, tokens)
    advantage = reward - baseline[prompt]
    weight = token_weights(np.exp(logprobs - inference_logprobs), logprobs, advantage)
    updates.append(np.einsum("t,tdv->dv", weight, gradients) * advantage / 2)
    weights.append(weight)
    kept.append(np.mean(weight == 0))
  updates, weights = np.array(updates), np.array(weights)
  mean = np.einsum("s,sdv->dv", chance, updates)
  gradient = exact_gradient() / 2
  length = np.linalg.norm(gradient)
  spread = np.sum(chance * np.sum((updates - mean) ** 2, axis=(1, 2)))
  return {
    "bias": np.linalg.norm(mean - gradient) / length,
    "cosine": np.sum(mean * gradient) / np.linalg.norm(mean) / length,
    "norm": np.linalg.norm(mean) / length,
    "noise": np.sqrt(spread) / length,
    "effective_sample_share": (chance @ weights.mean(1)) ** 2 / (chance @ (weights**2).mean(1)),
    "masked_share": chance @ kept,
  }


def estimate(name):
  return estimators.estimate(
    PROBLEM, corrections.ALL[name], TARGET, policy.logits(PROBLEM, BEHAVIOUR)
  )


RULES = {
  "reinforce": lambda r, *_: np.ones_like(r),
  "masked_importance": lambda r, *_: np.where((r < 0.5) | (r > 5), 0, r),
  "truncated_importance": lambda r, *_: np.minimum(r, 2),
  corrections.REFERENCE: lambda r, *_: np.full_like(r, np.prod(r)),
}


@pytest.mark.parametrize("name", RULES)
def test_against_sums_in_float64(name):
  got = estimate(name)._asdict()
  for field, value in oracle(RULES[name]).items():
    np.testing.assert_allclose(got[field], value, rtol=2e-4, atol=2e-5, err_msg=field)


def test_the_cases_tell_the_corrections_apart():
  biases = {name: oracle(rule)["bias"] for name, rule in RULES.items()}
  assert biases.pop(corrections.REFERENCE) < 1e-6
  assert len({round(bias, 3) for bias in biases.values()}) == 3 and min(biases.values()) > 0.02
  assert oracle(RULES["masked_importance"])["masked_share"] > 0.05


@pytest.mark.parametrize("name", corrections.ALL)
def test_on_policy_none_is_biased(name):
  got = estimators.estimate(PROBLEM, corrections.ALL[name], TARGET, policy.logits(PROBLEM, TARGET))
  assert got.bias < 1e-4 and got.masked_share == 0 and got.sequence_masked_share == 0
  np.testing.assert_allclose([got.cosine, got.norm, got.effective_sample_share], 1, rtol=1e-4)


def kept_by_difference(ratios, logprobs, advantage):
  difference = np.exp(logprobs) - np.exp(logprobs) / ratios
  return np.where(difference > 0.2 if advantage > 0 else difference < -0.2, 0, ratios)


def test_a_penalty_is_no_weight():
  # The squared log ratio of DPPO pulls at tokens whatever their advantage.
  loss_fn = functools.partial(policy_gradient.probability_difference_loss, kl_tau=1.0)
  got = estimators.estimate(PROBLEM, loss_fn, TARGET, policy.logits(PROBLEM, BEHAVIOUR))
  want = oracle(kept_by_difference)
  for field in ("effective_sample_share", "masked_share"):
    np.testing.assert_allclose(getattr(got, field), want[field], rtol=2e-4)
  assert want["masked_share"] > 0.02 and abs(got.bias - want["bias"]) > 0.01


def test_the_exact_gradient_by_finite_differences():
  got = estimators.policy_gradient_of(PROBLEM, TARGET)
  np.testing.assert_allclose(got, exact_gradient() / 2, atol=1e-6)


SETTINGS = training.Settings(steps=4, evaluate_every=1, mismatch=mismatch.gaussian)


def test_a_study_looks_at_the_pairs_of_a_run():
  cells = [training.Cell(0, 0.3), training.Cell(2, 0.3), training.Cell(0, 0.3, 0.5)]
  loss_fn = corrections.ALL["reinforce"]
  problems = [PROBLEM, OTHER]
  got = estimators.study(
    problems, {"reinforce": loss_fn}, cells=cells, steps=[2, 4], settings=SETTINGS
  )["reinforce"]
  assert got.bias.shape == (3, 2)
  assert np.all(got.bias[0] < 1e-4)
  assert np.all(got.bias[2] > 1e-3)  # the server differs
  run = training.train(problems, loss_fn, cells=[training.Cell(0, 0.3)], settings=SETTINGS)
  of = jax.jit(functools.partial(estimators.estimate, loss_fn=loss_fn))
  for seed, problem in enumerate(problems):
    versions = run.weights[0, seed]
    pairs = [(versions[n], policy.logits(problem, versions[n - 2])) for n in (2, 4)]
    want = [
      of(problem, weights_DV=weights, server_logits_MTPV=server).bias for weights, server in pairs
    ]
    np.testing.assert_allclose(got.bias[1, seed], np.mean(want), rtol=1e-4)


def test_a_study_draws_a_mismatch_for_each_pair_and_the_same_for_all_losses():
  drawn = []

  def recorded(logits, key, amount):
    jax.debug.callback(
      lambda data, amount: drawn.append((*data.tolist(), float(amount))),
      jax.random.key_data(key),
      amount,
    )
    return logits + amount

  estimators.study(
    [PROBLEM, OTHER],
    {name: corrections.ALL[name] for name in ("reinforce", "masked_importance")},
    cells=[training.Cell(0, 0.3, 0.5), training.Cell(0, 0.3, 0.25)],
    steps=[2, 4],
    settings=dataclasses.replace(SETTINGS, mismatch=recorded),
  )
  jax.effects_barrier()
  of_study = collections.Counter(draw[:-1] for draw in drawn if draw[-1] != 0)
  # 2 cells x 2 seeds x 2 versions, each key once a loss.
  assert len(of_study) == 8 and set(of_study.values()) == {2}


@pytest.mark.parametrize(
  ("cells", "message"),
  [
    ([training.Cell(3, 0.3)], r"at most the least of steps \(2\), got 3"),
    ([training.Cell(0, 0.3), training.Cell(0, 0.1)], "one learning rate"),
  ],
)
def test_a_study_that_cannot_be_raises(cells, message):
  with pytest.raises(ValueError, match=message):
    estimators.study([PROBLEM], {}, cells=cells, steps=[2, 4], settings=SETTINGS)


def test_the_reference_weighs_by_its_own_segment():
  # Two trajectories in one row and apart are the same.
  random = np.random.default_rng(2)
  logprobs, inference_logprobs, advantages = -random.exponential(size=(3, 1, 6)).astype(np.float32)
  mask = np.ones((1, 6), bool)
  packed = np.array([[1, 1, 2, 2, 2, 2]], np.int32)

  def value(logprobs, *arrays, **arguments):
    loss, _ = corrections.trajectory_importance_loss(
      logprobs, *arrays, denominator=6.0, **arguments
    )
    return loss

  gradient = jax.grad(value)
  arrays = (logprobs, inference_logprobs, advantages, mask)
  both = gradient(*arrays, segment_ids=packed)
  alone = [gradient(*(array[:, part] for array in arrays)) for part in (slice(2), slice(2, 6))]
  np.testing.assert_allclose(both, np.concatenate(alone, axis=1), rtol=1e-5)
  ratio = np.exp((logprobs - inference_logprobs)[0, :2].sum())
  np.testing.assert_allclose(alone[0][0], -ratio * advantages[0, :2] / 6, rtol=1e-5)
