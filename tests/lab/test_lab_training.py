"""Training on stale data: whose data, which seed, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intellect3.lab import mismatch, policy, sweep, training
from intellect3.lab.training import Cell
from intellect3.losses import policy_gradient

SHAPE = {"prompts": 2, "vocabulary": 3, "length": 2, "features": 4, "solved_share": 0.3}
PROBLEMS = policy.make_problems(2, **SHAPE)
STEPS = 6


def watched_loss(logprobs, inference_logprobs, advantages, loss_mask, **arguments):
  """REINFORCE that also tells what it was given."""
  loss, _ = policy_gradient.reinforce_loss(
    logprobs, inference_logprobs, advantages, loss_mask, **arguments
  )
  return loss, {
    "inference_logprobs": inference_logprobs,
    "logprobs": jax.lax.stop_gradient(logprobs),
    "advantages": advantages,
  }


SETTINGS = training.Settings(
  steps=STEPS, group=4, optimizer=optax.sgd, mismatch=mismatch.gaussian, evaluate_every=2
)
CELLS = [Cell(0, 5.0), Cell(2, 5.0), Cell(0, 5.0, 0.4), Cell(0, 0.0)]


@pytest.fixture(scope="module")
def run():
  return training.train(PROBLEMS, watched_loss, cells=CELLS, settings=SETTINGS)


@pytest.mark.parametrize(("cell", "staleness"), [(0, 0), (1, 2)])
def test_step_n_is_sampled_by_version_n_minus_1_minus_staleness(run, cell, staleness):
  seed = 1
  prompts = jnp.repeat(jnp.arange(2), 4)
  keys = jax.random.split(jax.random.key(seed), STEPS)
  for step in range(1, STEPS + 1):
    behaviour = run.weights[cell, seed, max(step - 1 - staleness, 0)]
    logits = policy.logits(PROBLEMS[seed], behaviour)
    tokens = policy.sample(logits, prompts, jax.random.split(keys[step - 1])[1])
    trainer = policy.logits(PROBLEMS[seed], run.weights[cell, seed, step - 1])
    for name, who in (("inference_logprobs", logits), ("logprobs", trainer)):
      seen = run.metrics[name][cell, seed, step - 1]
      np.testing.assert_allclose(seen, policy.logprobs(who, prompts, tokens), atol=1e-5)


def test_versions_differ_so_that_the_above_can_tell(run):
  steps = np.abs(np.diff(run.weights[:2], axis=2)).max(axis=(3, 4))
  assert np.median(steps) > 0.05
  on_policy = run.metrics["logprobs"][0] - run.metrics["inference_logprobs"][0]
  assert np.abs(on_policy).max() < 1e-5


def test_a_server_with_mismatch_differs_without_staleness(run):
  difference = run.metrics["logprobs"][2] - run.metrics["inference_logprobs"][2]
  assert 0.1 < np.std(difference) < 0.8


def test_advantages_are_centred_by_prompt(run):
  groups = run.metrics["advantages"].reshape(*run.metrics["advantages"].shape[:3], 2, 4, 2)
  np.testing.assert_allclose(groups.mean(axis=4), 0, atol=1e-6)
  assert np.ptp(groups) > 0.5
  assert np.array_equal(groups[..., 0], groups[..., 1])


def test_returns_are_those_of_the_evaluated_versions(run):
  assert SETTINGS.evaluated.tolist() == [0, 2, 4, 6]
  assert run.returns_CSE.shape == run.entropies_CSE.shape == (4, 2, 4)
  for place, version in enumerate(SETTINGS.evaluated):
    want = policy.expected_return(PROBLEMS[1], run.weights[0, 1, version])
    np.testing.assert_allclose(run.returns_CSE[0, 1, place], want, rtol=1e-5)


def test_a_learning_rate_of_zero_changes_nothing(run):
  assert np.all(run.weights[3] == 0) and np.ptp(run.returns_CSE[3]) == 0


def test_seeds_differ_and_losses_share_them(run):
  assert not np.array_equal(run.weights[0, 0], run.weights[0, 1])
  # A cell is the same whatever stands beside it, and the first batch whatever the loss.
  alone = training.train(PROBLEMS[:1], watched_loss, cells=CELLS[1:2], settings=SETTINGS)
  np.testing.assert_allclose(alone.weights[0, 0], run.weights[1, 0], rtol=1e-4, atol=1e-5)


def test_a_seed_has_a_problem_of_its_own(run):
  # The first run is one of each problem; here both seeds have the second.
  same = training.train(PROBLEMS[1:] * 2, watched_loss, cells=CELLS[:1], settings=SETTINGS)
  np.testing.assert_allclose(same.weights[0, 1], run.weights[0, 1], rtol=1e-4, atol=1e-5)
  assert np.abs(same.weights[0, 0] - run.weights[0, 0]).max() > 0.05
  # Its samples are its own as well.
  assert np.abs(same.weights[0, 0] - same.weights[0, 1]).max() > 0.05


def test_it_learns():
  settings = training.Settings(steps=60, group=8, evaluate_every=60)
  run = training.train(
    PROBLEMS, policy_gradient.reinforce_loss, cells=[Cell(0, 0.2)], settings=settings
  )
  begin, end = run.returns_CSE[0].T
  np.testing.assert_allclose(begin, [problem.rewards_MS.mean() for problem in PROBLEMS], rtol=1e-5)
  assert np.all(end > 0.9)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: training.Settings(steps=0), "steps: expected at least 1, got 0"),
    (lambda: training.Settings(steps=10, evaluate_every=3), "evaluate_every: expected a divisor"),
    (lambda: training.train(PROBLEMS, None, cells=[], settings=SETTINGS), "cells"),
    (
      lambda: training.train([], None, cells=CELLS, settings=SETTINGS),
      "problems: expected problems of one shape, got none",
    ),
    (
      lambda: training.train(
        [*PROBLEMS, policy.make_problem(**(SHAPE | {"features": 5}))],
        None,
        cells=CELLS,
        settings=SETTINGS,
      ),
      r"problems: expected problems of one shape, got \[\(2, 2, 4, 4\), \(2, 2, 4, 5\)\]",
    ),
    (
      lambda: training.train(PROBLEMS, None, cells=[Cell(-1, 1.0)], settings=SETTINGS),
      "stalenesses of at least 0",
    ),
  ],
)
def test_what_cannot_be_run_raises(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_reading_a_sweep(run):
  told = []
  runs = sweep.run(
    PROBLEMS, {"a": watched_loss}, cells=CELLS, settings=SETTINGS, report=told.append
  )
  assert told[0].startswith("a: 4 x 2 runs in ")
  finals = {name: sweep.final_return(run) for name, run in runs.items()}
  assert np.array_equal(finals["a"], run.returns_CSE[:, :, 3])
  np.testing.assert_allclose(sweep.average_return(run), run.returns_CSE.mean(axis=2))
  taken = sweep.take(finals, CELLS, [CELLS[2], CELLS[0]])
  assert np.array_equal(taken["a"], finals["a"][[2, 0]])
  with pytest.raises(ValueError, match="wanted: expected cells of the sweep"):
    sweep.take(finals, CELLS, [Cell(9, 5.0)])
  assert sweep.unique([*CELLS, CELLS[1]]) == CELLS


def test_lines_of_a_sweep():
  values = {"a": np.array([[1.0, 3.0], [5.0, 5.0]]), "b": np.array([[0.0, 0.0], [0.1, 0.3]])}
  lines = sweep.series(values, [0, 4])
  assert lines["a"].mean.tolist() == [2, 5] and lines["a"].x.tolist() == [0, 4]
  assert sweep.means(values).tolist() == [[2, 5], [0, 0.2]]
  # Half of each seed's own reference: 0.2 and 0.4.
  failed = sweep.collapsed(
    {**values, "b": np.array([[0.3, 0.3], [0.1, 0.5]])}, np.array([0.4, 0.8])
  )
  assert failed["b"].tolist() == [[False, True], [True, False]]
  counted = sweep.counts(failed, [0, 4])
  assert counted["b"].mean.tolist() == [1, 1] and counted["a"].mean.tolist() == [0, 0]
  ahead = sweep.against({"masked_importance": values["b"], "a": values["a"]}, [0, 4])
  assert list(ahead) == ["a"]
  np.testing.assert_allclose(ahead["a"].mean, [2, 4.8])
  turned = sweep.beside({"new": lines, "old": lines})
  assert list(turned) == ["a", "b"] and list(turned["b"]) == ["new", "old"]
  assert turned["b"]["old"] is lines["b"]
  curves = sweep.curves({"a": np.arange(12.0).reshape(2, 2, 3)}, np.array([0, 5, 10]), [0, 16])
  assert list(curves["a"]) == ["0", "16"] and curves["a"]["16"].mean.tolist() == [7.5, 8.5, 9.5]
  with pytest.raises(ValueError, match=r"values\['a'\]: expected \[3, seeds\], got \[2, 2\]"):
    sweep.series(values, [0, 1, 2])
  assert sweep.baseline(["clipped", "masked_importance"]) == "masked_importance"
  assert sweep.baseline(["clipped", "cispo"]) == "clipped"
