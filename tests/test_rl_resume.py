"""A whole asynchronous run that is killed and resumed goes on with what its rollouts had."""

import collections
import os
import signal
import subprocess
import time

import pytest

from tests.test_rl_run import SMALL, arguments, identity, processes_of, rows, run


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_in_flight_when_all_was_killed_is_gone_on_with(model, tmp_path, num_workers):
  gin, receipts, out = tmp_path / "paying.gin", tmp_path / "receipts", tmp_path / "run"
  gin.write_text("from tests.environments import paying\n")
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 10,
    "rl.run.num_workers": num_workers,
    "rl.run.max_off_policy_steps": 8,  # nothing of what is gone on with is too old
    "worker.worker.max_tokens": 64,
    "worker.worker.journal_seconds": 0.5,
    "orchestrator.orchestrator.evaluation_tasks": 0,
    "filters.Filters.zero_advantage": False,
    "paying.Paying.receipts": str(receipts),
    "inference.embedded_server.options": {
      **SMALL["inference.embedded_server.options"],
      "context_length": 64,
    },
  }
  extra = ("--gin", str(gin), "--set", "rl.run.environments=[@paying.Paying()]")

  process = subprocess.Popen(arguments(out, settings, *extra), stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 200
  while not any(row["step"] >= 4 for row in rows(out, "orchestrator")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGKILL)  # not even a chance to say goodbye
  process.wait()
  while processes_of(out):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  left = list((out / "journal").glob("rollout_*"))
  paid = receipts.read_text().splitlines()
  dispatched = int((out / "rollouts" / "dispatched").read_text())
  assert len(left) >= 8

  result = run(out, settings, *extra, "--resume")
  assert result.returncode == 0, result.stdout + result.stderr
  every_row = rows(out, "orchestrator")
  assert [row["step"] for row in every_row] == list(range(1, 11))
  assert all(identity(row) for row in every_row)
  last = every_row[-1]
  assert last["dispatched"] >= dispatched and last["cancelled"] == 0 == last["stale"]
  # A payment is on disk before its rollout goes on; only one that was just made can be made again.
  twice = [
    name
    for name, count in collections.Counter(receipts.read_text().split("\n")).items()
    if name and count > 1
  ]
  assert len(twice) <= 32 and len(set(paid)) == len(paid)
  assert len(twice) <= max(1, len(left) // 8), (twice, len(left))
  assert not (out / "journal").exists()
