"""Runs whose servers change, and whose weights travel otherwise: every process real, few steps."""

import json
import os
import re
import signal
import subprocess
import time

import psutil
import pytest

from experiments import rl_run
from intellect3.rl import servers, serving
from intellect3.rl.checks import NotStarted
from tests.test_rl_run import SYNCHRONOUS, arguments, identity, processes_of, rows, run

ORCHESTRATOR = "http://127.0.0.1:8700"


def test_a_list_of_servers_is_read():
  text = "# of the run\nhttp://a:1\n\n  http://b:2/  # the second\n"
  assert servers.parse(text, ORCHESTRATOR) == ("http://a:1", "http://b:2")
  assert servers.parse("", ORCHESTRATOR) == ()


@pytest.mark.parametrize("text", ["a:1", "http://a:1\nhttp://a:1", ORCHESTRATOR])
def test_a_list_that_is_none_is_refused(text):
  with pytest.raises(NotStarted, match="server_urls"):
    servers.parse(text, ORCHESTRATOR)


def test_a_list_changes_while_the_run_goes_and_a_broken_one_is_not_taken(tmp_path, caplog):
  listed = servers.ServerList(tmp_path / "run", ["http://a:1"], ORCHESTRATOR)
  path = tmp_path / "run" / "servers.txt"
  assert listed() == ("http://a:1",) and "http://a:1\n" in path.read_text()
  path.write_text("http://a:1\nhttp://b:2\n")
  assert listed() == ("http://a:1", "http://b:2")
  path.write_text("http://a:1\nnonsense\n")
  assert listed() == listed() == ("http://a:1", "http://b:2")
  assert caplog.text.count("is not taken") == 1 and "nonsense" in caplog.text
  path.unlink()
  assert listed() == ("http://a:1", "http://b:2")
  path.write_text("http://b:2\n")
  assert listed() == ("http://b:2",)


@pytest.mark.parametrize(
  ("lag", "served"),
  [(0, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 0, 0, 1, 2, 3, 6]), (9, [0, 0, 0, 0, 0, 0, 6])],
)
def test_servers_lag_behind_but_for_the_last_version(lag, served):
  assert [serving.served_version(v, lag=lag, steps=6) for v in range(7)] == served


@pytest.mark.parametrize(("lag", "why"), [(3, r"max_off_policy_steps \(2\), got 3"), (-1, ">= 0")])
def test_a_lag_that_would_wait_for_ever_does_not_start(model, tmp_path, capsys, lag, why):
  settings = {"rl.run.model_path": str(model), "orchestrator.orchestrator.weights_lag": lag}
  code = rl_run.main(arguments(tmp_path / "run", settings)[3:])
  error = capsys.readouterr().err
  assert code == 2 and re.search(f"weights_lag: expected .*{why}", error), error


def test_with_lagging_weights_every_step_has_the_staleness_asked_for(model, tmp_path):
  out = tmp_path / "run"
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 6,
    "rl.run.max_off_policy_steps": 2,
    "orchestrator.orchestrator.weights_lag": 2,
  }
  result = run(out, settings)
  assert result.returncode == 0, result.stdout + result.stderr
  trained = rows(out, "trainer")
  assert [row["token_staleness_mean"] for row in trained] == [0, 1, 2, 2, 2, 2]
  assert [row["token_staleness_max"] for row in trained] == [0, 1, 2, 2, 2, 2]
  assert [row["step"] for row in rows(out, "evaluation")] == [0, 6]  # the newest, not v4
  log = (out / "logs" / "server_0.log").read_text()
  assert re.findall(r"v_(\d{6})", log)[-1] == "000006"
  assert "v_000005" not in log


@pytest.mark.slow
def test_weights_travel_as_tensors_and_are_calibrated(model, tmp_path):
  out = tmp_path / "run"
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 3,
    **SYNCHRONOUS,
    "orchestrator.orchestrator.sync_transport": "tensor",
    "orchestrator.orchestrator.sync_bucket_bytes": 100_000,
    "orchestrator.orchestrator.sync_mode": "retract",
    "orchestrator.orchestrator.canary_bound": None,
    "worker.worker.segment_tokens": 2,
    "trainer.trainer.weights_dtype": "bfloat16",
    "trainer.trainer.weights_shard_bytes": 100_000,
  }
  result = run(out, settings)
  assert result.returncode == 0, result.stdout + result.stderr
  log = (out / "logs" / "server_0.log").read_text()
  assert "new tensors as version 3" in log and "serving weights of" not in log
  assert (
    "canary bound calibrated at version 0: 0.0001"
    in (out / "logs" / "orchestrator.log").read_text()
  )
  for row in rows(out, "orchestrator")[1:]:
    assert 0 < row["weight_sync/canary_difference"] <= 1e-4
    assert row["weight_sync/load_seconds"] > 0
    per_gb = row["weight_sync/load_seconds"] / row["weight_sync/gigabytes"]
    assert row["weight_sync/load_seconds_per_gb"] == pytest.approx(per_gb)
  for row in rows(out, "trainer"):
    assert row["weights/gather_seconds_per_gb"] > 0
    assert row["mismatch_kl"] < 1e-2  # of weights that were rounded on their way
  summary = json.loads((out / "summary.json").read_text())
  for part in ("gather", "write", "load", "first_token"):
    assert summary[f"weight_{part}_seconds_per_gb"] > 0


def test_a_server_is_killed_comes_back_and_another_joins(model, tmp_path):
  out = tmp_path / "run"
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": 100_000,
    "rl.run.num_servers": 2,
    "orchestrator.orchestrator.server_poll_seconds": 0.2,
    "orchestrator.orchestrator.evaluation_tasks": 0,
  }
  with open(tmp_path / "output", "wb") as output:
    process = subprocess.Popen(arguments(out, settings), stdout=output, stderr=subprocess.STDOUT)
  deadline = time.monotonic() + 200

  def wait_for(count, after=0):
    """Waits for a step after `after` that began and ended with so many servers."""
    while True:
      assert process.poll() is None, (tmp_path / "output").read_text()
      assert time.monotonic() < deadline
      found = [r for r in rows(out, "orchestrator") if r["step"] > after and r["servers"] == count]
      if found:
        return found[-1]["step"]
      time.sleep(0.05)

  try:
    step = wait_for(2)
    victim = next(
      child
      for child in psutil.Process(process.pid).children()
      if "intellect3.inference.engine" in " ".join(child.cmdline())
    )
    victim.kill()
    step = wait_for(1, step)
    step = wait_for(2, step)  # started again, and brought to the weights of that time
    urls = servers.parse((out / "servers.txt").read_text(), ORCHESTRATOR)
    replace(out / "servers.txt", urls[:1])
    step = wait_for(1, step)
    replace(out / "servers.txt", urls)
    step = wait_for(2, step)
  finally:
    process.send_signal(signal.SIGINT)
    process.wait(60)
  last = rows(out, "orchestrator")[-1]
  assert identity(last) and last["errored"] == 0
  said = (tmp_path / "output").read_text()
  assert "was killed by SIGKILL" in said and "started again" in said
  steps = [row["step"] for row in rows(out, "trainer")]
  assert steps == list(range(1, len(steps) + 1))
  assert processes_of(out) == []


def replace(path, urls):
  temporary = path.with_suffix(".new")
  temporary.write_text("".join(f"{url}\n" for url in urls))
  os.replace(temporary, path)
