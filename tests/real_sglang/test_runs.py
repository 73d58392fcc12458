"""Whole runs of the demo's configuration against servers that run already, by `--set` alone."""

import contextlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from intellect3 import telemetry
from intellect3.rl import checks
from tests.real_sglang import remote
from tools.sglang import environment

DEMO = "experiments/configs/runs/demo.gin"
SMALL = {
  "rl.run.num_workers": 1,
  "orchestrator.orchestrator.prompts_per_step": 4,
  "orchestrator.orchestrator.rollouts_per_prompt": 4,
  "orchestrator.orchestrator.max_rollouts_in_flight": 32,
  "orchestrator.orchestrator.evaluation_tasks": 8,
  "trainer.trainer.micro_rows": 8,
}
KINDS = (
  pytest.param("engine", marks=pytest.mark.slow),
  pytest.param("sglang", marks=pytest.mark.real_sglang),
)


def command(out, model, urls, steps, **settings):
  bindings = {
    **SMALL,
    "rl.run.model_path": str(model),
    "rl.run.server_urls": list(urls),
    "rl.run.steps": steps,
    **settings,
  }
  sets = [part for key, value in bindings.items() for part in ("--set", f"{key}={value!r}")]
  return [
    *(sys.executable, "-m", "experiments.rl_run", "--gin", DEMO, "--out", str(out)),
    *sets,
  ]


def metrics(out, name):
  return telemetry.read_metrics(telemetry.metrics_path(out, name))


@pytest.fixture(params=KINDS)
def start(request, model, tmp_path):
  """Starts servers of one kind with the model: `urls, servers = start(2)`; `.kill()` ends one."""
  if request.param == "sglang":
    reason = environment.why_not_ready(environment.DEFAULT_DIRECTORY)
    if reason:
      pytest.skip(reason)
  with contextlib.ExitStack() as stack:

    def start_them(count):
      ports = checks.free_ports("127.0.0.1", count)
      servers = [
        stack.enter_context(remote.START[request.param](model, port, tmp_path / f"server_{port}"))
        for port in ports
      ]
      return [f"http://127.0.0.1:{port}" for port in ports], servers

    yield start_them


@pytest.mark.parametrize(("transport", "mode"), [("disk", "in_place"), ("tensor", "retract")])
def test_a_run_on_one_server_ends_well_and_on_policy(start, model, tmp_path, transport, mode):
  urls, _ = start(1)
  out = tmp_path / "run"
  settings = {
    "rl.run.max_off_policy_steps": 0,
    "orchestrator.orchestrator.sync_transport": transport,
    "orchestrator.orchestrator.sync_mode": mode,
  }
  result = subprocess.run(
    command(out, model, urls, 4, **settings), capture_output=True, text=True, timeout=280
  )
  assert result.returncode == 0, result.stdout + result.stderr
  summary = json.loads((out / "summary.json").read_text())
  assert summary["steps"] == 4 and summary["errored"] == 0 and summary["in_flight"] == 0
  assert summary["trained"] == 4 * 16
  trained = metrics(out, "trainer")
  assert [row["step"] for row in trained] == [1, 2, 3, 4]
  assert any(row["grad_norm"] > 0 for row in trained)
  for row in trained:
    assert row["token_staleness_max"] == 0
    assert 0 <= row["mismatch_kl"] < 1e-8


def test_a_run_on_two_servers_goes_on_when_one_is_killed(start, model, tmp_path):
  urls, servers = start(2)
  out = tmp_path / "run"
  steps = 30
  with (tmp_path / "said").open("w") as said:
    process = subprocess.Popen(
      command(out, model, urls, steps), stdout=said, stderr=subprocess.STDOUT
    )
  deadline = time.monotonic() + 250
  try:
    while not any(row["step"] >= 4 for row in metrics(out, "trainer")):
      assert process.poll() is None, (tmp_path / "said").read_text()
      assert time.monotonic() < deadline
      time.sleep(0.02)
    servers[0].kill()
    assert process.wait(deadline - time.monotonic()) == 0, (tmp_path / "said").read_text()
  finally:
    process.kill()
    process.wait()
  summary = json.loads((out / "summary.json").read_text())
  assert summary["steps"] == steps and summary["in_flight"] == 0 and summary["errored"] == 0
  assert summary["trained"] + summary["stale"] + summary["cancelled"] == summary["dispatched"]
  for row in metrics(out, "trainer"):
    assert np.isfinite(row["mismatch_kl"])
  serving = [row["servers"] for row in metrics(out, "orchestrator")]
  assert serving[0] == 2 and serving[-1] == 1
  assert f"server {urls[0]} is lost" in (out / "logs" / "orchestrator.log").read_text()
