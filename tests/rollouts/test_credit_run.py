"""A whole run over a moving baseline: every process real; stopped and resumed, to the bit."""

import subprocess
import sys

import jax
import pytest

from intellect3 import rollout_log, telemetry
from intellect3.models import hf, presets, transformer
from tests.rollouts.helpers import all_records

FILE = "experiments/configs/runs/advantages/moving_baseline.gin"
SETTINGS = {
  "reverse_text.ReverseText.reward": "lcs",  # a model that was never trained gets some
  "rl.run.num_workers": 0,
  "rl.run.max_off_policy_steps": 0,
  "orchestrator.orchestrator.deterministic": True,
  "orchestrator.orchestrator.prompts_per_step": 16,
  "orchestrator.orchestrator.max_rollouts_in_flight": 32,
  "orchestrator.orchestrator.evaluation_tasks": 0,
  "trainer.trainer.row_length": 64,
  "trainer.trainer.micro_rows": 8,
  "trainer.trainer.checkpoint_every": 2,
  "inference.embedded_server.options": {
    "context_length": 32,
    "slots": 16,
    "prefill_rows": 8,
    "prefill_chunk": 8,
  },
}


def run(out, model, steps, *extra):
  bindings = {**SETTINGS, "rl.run.model_path": str(model), "rl.run.steps": steps}
  sets = [part for key, value in bindings.items() for part in ("--set", f"{key}={value!r}")]
  command = [sys.executable, "-m", "experiments.rl_run", "--gin", FILE, "--out", str(out)]
  result = subprocess.run([*command, *sets, *extra], capture_output=True, text=True, timeout=240)
  assert result.returncode == 0, result.stdout + result.stderr


def told(out):
  """By step: the baselines in the manifest, and each record's rollout, reward and advantage."""
  steps = {}
  for step in rollout_log.committed_steps(out / "rollouts"):
    manifest = rollout_log.read_manifest(out / "rollouts", step)
    records = all_records(out / "rollouts", manifest)
    trained = [(each.rollout_id, each.reward, each.advantage) for each in records]
    steps[step] = (manifest.scheduler_state["baselines"], trained)
  return steps


@pytest.mark.slow
def test_a_run_over_a_moving_baseline_resumes_in_the_same_bits(tmp_path):
  model = tmp_path / "model"
  config = presets.tiny()
  hf.save(model, config, transformer.init(config, jax.random.key(0)))
  run(tmp_path / "whole", model, 4)
  run(tmp_path / "broken", model, 2)
  run(tmp_path / "broken", model, 4, "--resume")
  whole = told(tmp_path / "whole")
  assert told(tmp_path / "broken") == whole
  baselines = [state["reverse_text"] for state, _ in whole.values()]
  assert len(set(baselines)) == 4
  for step in (2, 3, 4):  # each is compared with what was there when the batch began
    _, trained = whole[step]
    assert len(trained) == 16
    for _, reward, advantage in trained:
      assert advantage == reward - baselines[step - 2]
  rows = telemetry.read_metrics(telemetry.metrics_path(tmp_path / "broken", "orchestrator"))
  assert [row["baseline/reverse_text"] for row in rows] == baselines
