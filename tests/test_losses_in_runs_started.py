"""Whole runs of losses as a user starts them: every process real, few steps."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from intellect3 import rollout_log, telemetry
from intellect3.models import hf, presets, transformer
from intellect3.rendering import tokenizer_files
from intellect3.training import scoring
from tests.rollouts.helpers import all_records

RUNS = pathlib.Path("experiments/configs/runs/losses")
SMALL = {
  "rl.run.num_workers": 0,
  "rl.run.steps": 3,
  "reverse_text.ReverseText.reward": "lcs",  # a fresh model has some of it
  "orchestrator.orchestrator.prompts_per_step": 4,
  "orchestrator.orchestrator.rollouts_per_prompt": 4,
  "orchestrator.orchestrator.max_rollouts_in_flight": 32,
  "orchestrator.orchestrator.evaluation_tasks": 0,
  "trainer.trainer.row_length": 64,
  "trainer.trainer.micro_rows": 4,
  "trainer.trainer.row_counts": (8,),
  "inference.embedded_server.options": {
    "context_length": 32,
    "slots": 16,
    "prefill_rows": 8,
    "prefill_chunk": 8,
  },
}


def made(directory, config, seed):
  hf.save(directory, config, transformer.init(config, jax.random.key(seed)))
  tokenizer_files.write_tokenizer(directory)
  return directory


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  return made(tmp_path_factory.mktemp("models") / "policy", presets.tiny(), 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """Of another family and size than the policy."""
  config = presets.tiny_qwen3(num_layers=1, num_dense_layers=1, embed_dim=32)
  return made(tmp_path_factory.mktemp("models") / "teacher", config, 1)


def run(out, file, settings):
  bindings = {**SMALL, **settings}
  sets = [part for key, value in bindings.items() for part in ("--set", f"{key}={value!r}")]
  command = [sys.executable, "-m", "experiments.rl_run", "--gin", str(RUNS / f"{file}.gin")]
  found = subprocess.run(
    [*command, "--out", str(out), *sets], capture_output=True, text=True, timeout=240
  )
  assert found.returncode == 0, found.stdout + found.stderr
  rows = telemetry.read_metrics(telemetry.metrics_path(out, "trainer"))
  assert [row["step"] for row in rows] == [1, 2, 3]
  for row in rows:
    assert np.isfinite(row["loss"]) and 0.0 < row["grad_norm"] < 100.0, row
    assert 0.0 < row["effective_sample_share"] <= 1.0 + 1e-6
  return rows


def logprobs_of(model, records):
  """The records' logprobs under a model, each record alone, padded."""
  config, params = hf.load(model)
  fn = jax.jit(scoring.make_logprob_fn(config, head_chunk_size=64))
  found = []
  for record in records:
    tokens = record.trajectory.tokens
    padded = np.zeros(32, np.int32)
    padded[: len(tokens)] = tokens
    found.append(np.asarray(fn(params, padded))[: len(tokens)])
  return found


def test_terms_token_weights_and_a_reference_of_another_family(policy, teacher, tmp_path):
  settings = {
    "rl.run.model_path": str(policy),
    "rl.run.max_off_policy_steps": 0,
    "token_weights.imitate.reward_threshold": 0.05,
    "token_weights.imitate.rl_weight": 0.5,
    "components.weighted_sum_loss.ref_kl_coefficient": 0.25,
    "trainer.trainer.reference_path": str(teacher),
  }
  rows = run(tmp_path / "run", "components", settings)
  log = tmp_path / "run" / "rollouts"
  imitated = 0
  for row in rows:
    manifest = rollout_log.read_manifest(log, row["step"])
    records = all_records(log, manifest)
    imitated += sum(record.token_weights["ce"].any() for record in records)
    assert row["reference_seconds"] > 0.0
    total = row["rl_loss"] + 0.1 * row["ce_loss"] + 0.25 * row["ref_kl_loss"]
    np.testing.assert_allclose(row["loss"], total, rtol=1e-4, atol=1e-6)
  assert imitated
  # Step 1 starts from the policy as it is on disk.
  records = all_records(log, rollout_log.read_manifest(log, 1))
  pairs = zip(records, logprobs_of(policy, records), logprobs_of(teacher, records), strict=True)
  differences, likelihoods = [], []
  for record, ours, theirs in pairs:
    mask = record.trajectory.loss_mask
    differences += list((ours - theirs)[mask])
    likelihoods += list(-(record.token_weights["ce"] * ours)[record.token_weights["ce"] != 0])
  np.testing.assert_allclose(rows[0]["reverse_kl"], np.mean(differences), rtol=1e-4)
  if likelihoods:
    np.testing.assert_allclose(rows[0]["ce_loss"], np.mean(likelihoods), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.stem for path in RUNS.glob("*.gin")))
def test_a_run_of_each_file(model, teacher, tmp_path, file):
  settings = {"rl.run.model_path": str(model)}
  if "reference_path" in (RUNS / f"{file}.gin").read_text():
    settings["trainer.trainer.reference_path"] = str(model if file == "kl_penalty" else teacher)
  rows = run(tmp_path / "run", file, settings)
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["steps"] == 3
  if file == "kl_penalty":
    assert abs(rows[0]["reverse_kl"]) < 1e-6 < rows[-1]["reverse_kl"]
  if file == "decoupled_clipped":
    assert all(row["masked_share"] == 0.0 for row in rows)
  if file == "reinforce":
    assert all(row["masked_share"] == row["sequence_masked_share"] == 0.0 for row in rows)
