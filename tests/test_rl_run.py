"""Whole runs, as a user starts them: every process real, small sizes, few steps.

The model is warmed up once for the session; runs share XLA's compilation cache.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import safetensors.numpy

from experiments import rl_run
from intellect3 import rollout_log, telemetry, types
from tests.rollouts.helpers import all_records

DEMO = "experiments/configs/runs/demo.gin"

SMALL = {
  "rl.run.num_workers": 0,
  "orchestrator.orchestrator.prompts_per_step": 4,
  "orchestrator.orchestrator.rollouts_per_prompt": 4,
  "orchestrator.orchestrator.max_rollouts_in_flight": 32,
  "orchestrator.orchestrator.evaluation_tasks": 8,
  "trainer.trainer.row_length": 64,
  "trainer.trainer.micro_rows": 8,
  "trainer.trainer.checkpoint_every": 4,
  "inference.embedded_server.options": {
    "context_length": 32,
    "slots": 16,
    "prefill_rows": 8,
    "prefill_chunk": 8,
  },
}
SYNCHRONOUS = {
  "rl.run.max_off_policy_steps": 0,
  "orchestrator.orchestrator.deterministic": True,
}


def arguments(out, settings, *extra):
  bindings = {**SMALL, **settings}
  sets = [part for key, value in bindings.items() for part in ("--set", f"{key}={value!r}")]
  return [
    sys.executable,
    "-m",
    "experiments.rl_run",
    "--gin",
    DEMO,
    "--out",
    str(out),
    *sets,
    *extra,
  ]


def run(out, settings, *extra, timeout=240):
  return subprocess.run(
    arguments(out, settings, *extra), capture_output=True, text=True, timeout=timeout
  )


@pytest.fixture
def run_here(capsys):
  """Calls the command in this process; for runs that do not start."""

  def call(out, settings, *extra):
    code = rl_run.main(arguments(out, settings, *extra)[3:])
    return code, capsys.readouterr().err

  return call


def rows(out, name):
  return telemetry.read_metrics(telemetry.metrics_path(out, name))


def identity(row):
  ended = sum(row[key] for key in ("trained", "filtered", "stale", "cancelled", "errored"))
  return row["dispatched"] == ended + row["in_flight"]


def processes_of(out):
  found = []
  for process in psutil.process_iter(["cmdline", "status"]):
    command = " ".join(process.info["cmdline"] or [])
    if str(out) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
      found.append(command)
  return found


def final_weights(out, step):
  return safetensors.numpy.load_file(out / "weights" / f"v_{step:06d}" / "model.safetensors")


@pytest.fixture(scope="session")
def asynchronous(model, tmp_path_factory):
  """One asynchronous run with workers as processes that several tests look at."""
  out = tmp_path_factory.mktemp("runs") / "asynchronous"
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 8,
    "rl.run.num_workers": 2,
    "filters.Filters.zero_advantage": True,
    "filters.Filters.truncated": True,
    "worker.worker.max_new_tokens": 5,  # too few for some words and their end: truncations
  }
  result = run(out, settings)
  assert result.returncode == 0, result.stdout + result.stderr
  return out, result


def test_a_run_learns_nothing_wrong_about_itself(asynchronous):
  out, result = asynchronous
  summary = json.loads((out / "summary.json").read_text())
  assert summary["steps"] == 8 and summary["in_flight"] == 0
  assert summary["max_staleness"] <= 2
  assert summary["eval_tasks"] == 8
  assert identity(summary)
  assert [row["step"] for row in rows(out, "trainer")] == list(range(1, 9))
  for row in rows(out, "orchestrator"):
    assert identity(row)
  assert re.search(r"^8 steps in \d+ s: reward", result.stdout, re.MULTILINE)
  assert (out / "curves.png").stat().st_size > 10_000
  assert "⟦" in (out / "logs" / "samples_worker_0.txt").read_text()
  assert list((out / "metrics" / "tensorboard").rglob("events.out.*"))
  assert processes_of(out) == []


def test_filters_fire_through_the_run(asynchronous):
  out, _ = asynchronous
  last = rows(out, "orchestrator")[-1]
  assert last["ended/filtered/zero_advantage"] > 0
  assert last["ended/filtered/truncated"] > 0


def test_the_log_holds_what_was_trained_and_the_trainer_counted_the_same(asynchronous):
  out, _ = asynchronous
  for row in rows(out, "trainer"):
    manifest = rollout_log.read_manifest(out / "rollouts", row["step"])
    records = all_records(out / "rollouts", manifest)
    assert row["loss_tokens"] == sum(int(r.trajectory.loss_mask.sum()) for r in records)
    groups = {}
    for record in records:
      groups.setdefault(record.group_id, set()).add(record.task_id)
      versions = record.trajectory.policy_versions
      sampled = versions != types.NOT_SAMPLED
      assert np.all(row["step"] - 1 - versions[sampled] <= 2)
      assert np.all(versions[sampled] <= row["step"] - 1)
    assert all(len(tasks) == 1 for tasks in groups.values())


@pytest.fixture(scope="module")
def interrupted(model, tmp_path_factory):
  """A synchronous run that Ctrl-C ended after its second step: directory, exit code, error."""
  out = tmp_path_factory.mktemp("runs") / "interrupted"
  settings = {"rl.run.model_path": str(model), "rl.run.steps": 500, **SYNCHRONOUS}
  settings["rl.run.replay_routed_experts"] = True
  process = subprocess.Popen(
    arguments(out, settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  deadline = time.monotonic() + 200
  while not any(row["step"] >= 2 for row in rows(out, "trainer")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGINT)
  return out, process.wait(60), process.stderr.read()


def test_on_policy_logprobs_and_experts_agree_with_the_server_that_sampled(interrupted):
  out, _, _ = interrupted
  for row in rows(out, "trainer"):
    assert row["token_staleness_max"] == 0
    assert 0 <= row["mismatch_kl"] < 1e-8
    assert row["masked_share"] == 0
    assert row["router_agreement"] > 0.999
  (record, *_) = all_records(out / "rollouts", rollout_log.read_manifest(out / "rollouts", 1))
  experts = record.trajectory.routed_experts
  assert experts.shape == (len(record.trajectory.tokens) - 1, 1, 2) and experts.dtype == np.uint8


def test_ctrl_c_ends_all(interrupted):
  out, code, error = interrupted
  assert code == 130
  assert error.strip().splitlines()[-1] == "interrupted"
  assert processes_of(out) == []


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_ends_in_the_same_bits(model, tmp_path):
  steps = 10
  settings = {"rl.run.model_path": str(model), "rl.run.steps": steps, **SYNCHRONOUS}
  whole = tmp_path / "whole"
  result = run(whole, settings)
  assert result.returncode == 0, result.stdout + result.stderr

  broken = tmp_path / "broken"
  process = subprocess.Popen(arguments(broken, settings), stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 200
  while not any(row["step"] >= 6 for row in rows(broken, "trainer")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGKILL)  # not even a chance to say goodbye
  process.wait()
  while processes_of(broken):
    assert time.monotonic() < deadline
    time.sleep(0.05)

  result = run(broken, settings, "--resume")
  assert result.returncode == 0, result.stdout + result.stderr
  assert [row["step"] for row in rows(broken, "trainer")] == list(range(1, steps + 1))
  for name, tensor in final_weights(whole, steps).items():
    np.testing.assert_array_equal(final_weights(broken, steps)[name], tensor, err_msg=name)
  for row in rows(broken, "orchestrator"):
    assert identity(row)


@pytest.mark.parametrize("rule", ["drop", pytest.param("mask", marks=pytest.mark.slow)])
def test_pools_and_staleness_rules_fire_through_the_run(model, tmp_path, rule):
  gin = tmp_path / "slow.gin"
  gin.write_text("from tests.environments import two_turns\n")
  out = tmp_path / "run"
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 12,
    "worker.worker.max_tokens": 64,
    "orchestrator.orchestrator.staleness_rule": rule,
    "rl.run.max_off_policy_steps": 1,
    "orchestrator.orchestrator.evaluation_tasks": 0,
    "filters.Filters.zero_advantage": False,
    "difficulty.Pools.easy_threshold": 0.7,
    "difficulty.Pools.hard_threshold": 0.05,
    "difficulty.Pools.hard_fraction": 0.5,
  }
  options = {**SMALL["inference.embedded_server.options"], "context_length": 64}
  result = run(
    out,
    {**settings, "inference.embedded_server.options": options},
    *("--gin", str(gin)),
    *("--set", "rl.run.environments=[@two_turns.TwoTurns()]"),
  )
  assert result.returncode == 0, result.stdout + result.stderr
  last = rows(out, "orchestrator")[-1]
  assert last["pool/hard"] + last["pool/easy"] > 0
  assert last["errored"] == last["ended/errored/RuntimeError"] > 0
  assert sum(row["rollouts_spanning_versions"] for row in rows(out, "orchestrator")) > 0
  masked = 0
  for step in rollout_log.committed_steps(out / "rollouts"):
    for record in all_records(out / "rollouts", rollout_log.read_manifest(out / "rollouts", step)):
      trajectory = record.trajectory
      sampled = trajectory.policy_versions != types.NOT_SAMPLED
      stale = sampled & (trajectory.policy_versions < step - 2)
      assert not np.any(trajectory.loss_mask & stale)
      masked += int(np.sum(sampled & ~trajectory.loss_mask))
  if rule == "drop":
    assert last["stale"] > 0 and masked == 0
  else:
    assert masked > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("verify", "tensor", "reason"),
  [
    (True, "model.norm.weight", "fingerprints of v_[0-9]+ differ from its manifest: model.norm.w"),
    (False, "model.layers.1.mlp.experts.3.down_proj.weight", "canary"),
  ],
)
def test_a_corrupted_tensor_fences_the_server_and_the_run_says_so(
  model, tmp_path, verify, tensor, reason
):
  out = tmp_path / "run"
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 200,
    "orchestrator.orchestrator.verify_fingerprints": verify,
  }
  process = subprocess.Popen(
    arguments(out, settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  deadline = time.monotonic() + 200
  while not any(row["step"] >= 2 for row in rows(out, "trainer")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  # From now on every published version loses one tensor between trainer and server.
  while process.poll() is None and time.monotonic() < deadline:
    for version in sorted((out / "weights").glob("v_*"))[-1:]:
      try:
        corrupt(version / "model.safetensors", tensor)
      except (FileNotFoundError, ValueError):
        continue  # pruned meanwhile
    time.sleep(0.001)
  error = process.stderr.read()
  assert process.returncode == 1
  assert re.search(rf"http://127\.0\.0\.1:\d+: weights v\d+: {reason}", error), error
  assert "no server is left" in error
  assert processes_of(out) == []


def corrupt(path, tensor):
  data = path.read_bytes()
  header = int.from_bytes(data[:8], "little")
  entries = json.loads(data[8 : 8 + header])
  start, end = entries[tensor]["data_offsets"]
  with path.open("r+b") as file:
    file.seek(8 + header + start)
    file.write(np.full((end - start) // 4, 0.01, np.float32).tobytes())


def test_an_existing_run_is_not_overwritten(asynchronous, run_here):
  out, _ = asynchronous
  code, error = run_here(out, {"rl.run.model_path": "unused"})
  assert code == 2
  assert "a run is there already; give --resume" in error


@pytest.mark.slow  # test_supervisor.py holds what the supervisor does, quickly
@pytest.mark.parametrize("name", ["trainer", "server_0"])
def test_a_child_that_dies_ends_the_run_and_is_named(model, tmp_path, name):
  out = tmp_path / "run"
  settings = {"rl.run.model_path": str(model), "rl.run.steps": 500, "rl.run.server_restarts": 0}
  process = subprocess.Popen(
    arguments(out, settings),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 200
  while not any(row["step"] >= 1 for row in rows(out, "trainer")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  marker = "--role trainer" if name == "trainer" else "intellect3.inference.engine"
  (victim,) = [
    child for child in psutil.Process(process.pid).children() if marker in " ".join(child.cmdline())
  ]
  victim.kill()
  assert process.wait(60) == 1
  assert re.search(rf"error: {name} was killed by SIGKILL.*{name}\.log", process.stderr.read())
  assert processes_of(out) == []


def test_the_paths_of_this_module_exist():
  assert pathlib.Path(DEMO).exists()
