"""The benchmark of the losses measures every loss, on batches like the trainer's, and says so."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.losses import policy_gradient
from tools.benchmarks import losses


@pytest.fixture(scope="module")
def inputs():
  return losses.make_inputs(rows=2, length=96, segments=4, seed=0)


def test_packed_rows_have_prompts_padding_and_global_counts(inputs):
  ids, mask = np.asarray(inputs.segment_ids), np.asarray(inputs.loss_mask)
  for row in range(2):
    assert sorted(set(ids[row])) == [0, 1, 2, 3, 4] and np.all(
      np.diff(np.flatnonzero(ids[row])) == 1
    )
    for segment in range(1, 5):
      first = np.flatnonzero(ids[row] == segment)[0]
      assert not mask[row, first]  # nothing predicts a trajectory's first token
      assert np.ptp(np.asarray(inputs.advantages)[row][ids[row] == segment]) == 0
  assert not np.any(mask & (ids == 0))
  assert inputs.denominator == mask.sum()
  trained = {(row, segment) for row, segment in zip(*np.nonzero(mask), strict=True)}
  assert inputs.num_sequences == len({(row, ids[row, at]) for row, at in trained})
  weights = np.asarray(inputs.weights)
  assert inputs.component_denominators.rl == (mask & (weights != 0)).sum()
  assert inputs.component_denominators.ce == (weights != 0).sum()
  for logprobs in (inputs.logprobs, inputs.inference_logprobs, inputs.old_logprobs):
    assert np.all(np.asarray(logprobs) <= 0)


def test_every_policy_gradient_loss_is_measured():
  exported = [
    name.removesuffix("_loss")
    for name, value in vars(policy_gradient).items()
    if inspect.isfunction(value)
  ]
  assert len(exported) >= 8 and set(exported) <= set(losses.cases())


def test_a_run_prints_a_table_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
  few = {name: losses.cases()[name] for name in ("reinforce", "cispo")}
  monkeypatch.setattr(losses, "cases", lambda: few)
  monkeypatch.setattr(losses, "LIMIT", 1e9)
  path = tmp_path / "build" / "losses.json"
  size = ["--rows", "2", "--length", "96", "--segments", "4", "--turns", "3"]
  assert losses.main([*size, "--json", str(path)]) == 0
  told = json.loads(path.read_text())
  assert told["baseline"] == "reinforce" and told["rows"] == 2 and told["turns"] == 3
  figures = told["figures"]
  for ratio in ("ratio", "fastest_ratio", "temporaries_ratio"):
    assert figures["reinforce"][ratio] == 1
  assert figures["cispo"]["seconds"] > 0 and figures["cispo"]["temporaries_bytes"] > 0
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].startswith("| loss with its gradient") and printed[2].startswith(
    "| reinforce |"
  )

  monkeypatch.setattr(losses, "LIMIT", 0.0)
  assert losses.main(size) == 1
  assert "above 0 times reinforce: reinforce, cispo" in capsys.readouterr().err


def test_measuring_without_a_baseline_or_broken_losses_is_refused(inputs):
  case = losses.cases()["reinforce"]
  with pytest.raises(ValueError, match="expected 'reinforce' among the cases, got \\['other'\\]"):
    losses.measure({"other": case}, inputs, 2)
  with pytest.raises(ValueError, match="turns: expected at least 2, got 1"):
    losses.measure({"reinforce": case}, inputs, 1)

  def broken(inputs):
    loss, metrics = case(inputs)
    return loss * float("nan"), metrics

  with pytest.raises(RuntimeError, match="reinforce: expected a finite loss and gradient, got nan"):
    losses.measure({"reinforce": broken}, inputs, 2)

  def infinitely_steep(inputs):
    return jnp.sqrt(jnp.sum(inputs.logprobs - jax.lax.stop_gradient(inputs.logprobs))), {}

  with pytest.raises(RuntimeError, match="reinforce: expected a finite loss and gradient, got 0"):
    losses.measure({"reinforce": infinitely_steep}, inputs, 2)
