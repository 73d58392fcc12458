"""The demo as `make demo` runs it, whole: does the policy learn what the README says it learns?"""

import json
import subprocess
import sys

import pytest

RUNS = "experiments/configs/runs"

KEYS = {
  *("reward_start", "reward_end", "eval_start", "eval_end", "steps", "wall_seconds", "rl_seconds"),
  *("dispatched", "trained", "filtered", "stale", "cancelled", "errored", "in_flight"),
  *("max_staleness", "mean_staleness", "mean_mismatch_kl", "generated_tokens_per_second"),
  *("trained_tokens_per_second", "trainer_idle_share", "weight_sync_seconds_median"),
  "rollouts_spanning_versions",
}


def run(module, gin, out, *extra):
  command = [sys.executable, "-m", f"experiments.{module}", "--gin", f"{RUNS}/{gin}"]
  result = subprocess.run(
    [*command, "--out", str(out), *extra], capture_output=True, text=True, timeout=900
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory):
  out = tmp_path_factory.mktemp("demo") / "sft"
  run("sft_run", "demo_sft.gin", out)
  return f"rl.run.model_path='{out / 'model'}'"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_demo_learns_from_stale_samples(warm_up, tmp_path):
  summary = run("rl_run", "demo.gin", tmp_path / "rl", "--set", warm_up)
  assert summary.keys() >= KEYS
  assert summary["reward_start"] <= 0.5 and summary["reward_end"] >= 0.9
  assert summary["eval_tasks"] >= 256 and summary["eval_end"] >= 0.9
  assert 0 < summary["mean_staleness"] <= summary["max_staleness"] <= 2
  assert summary["rollouts_spanning_versions"] > 0
  assert summary["in_flight"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_short_synchronous_run_gains_on_held_out_tasks(warm_up, tmp_path):
  settings = ("rl.run.steps=60", "rl.run.max_off_policy_steps=0")
  sets = [part for setting in (warm_up, *settings) for part in ("--set", setting)]
  summary = run("rl_run", "demo.gin", tmp_path / "rl", *sets)
  assert summary["eval_end"] - summary["eval_start"] >= 0.3
  assert summary["max_staleness"] == 0
