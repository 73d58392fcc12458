"""The trainer over several processes makes what one makes, dies as one, and resumes to the bit."""

import os
import re
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import trainer_runs

from intellect3 import telemetry
from tests import test_rl_run as whole_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MESH = {"fsdp": 2}
LEARNING_RATE = 5e-4


def one_process(root, model, mesh, devices):
  out = root / "one"
  trainer_runs.write_log(out / "rollouts")
  trainer_runs.run(out, model, {"trainer.trainer.mesh": mesh}, processes=1, devices=devices)
  return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A model, and the weights of a trainer of one process with two devices on the log."""
  root = tmp_path_factory.mktemp("trainers")
  model = trainer_runs.make_model(root / "model")
  return model, one_process(root, model, MESH, 2)


def rows(out):
  return telemetry.read_metrics(telemetry.metrics_path(out, "trainer"))


def assert_same(out, other, version=trainer_runs.STEPS):
  ours, theirs = trainer_runs.weights(out, version), trainer_runs.weights(other, version)
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def without_seconds(row):
  """A row's values that do not depend on the clock."""
  timed = ("second", "mfu", "per_gb", "gigabytes")
  return {name: value for name, value in row.items() if not any(word in name for word in timed)}


def test_two_processes_train_to_the_bits_of_one(made, tmp_path):
  model, one = made
  out = tmp_path / "two"
  trainer_runs.write_log(out / "rollouts")
  settings = {"trainer.trainer.mesh": MESH, "trainer.trainer.processes": 2}
  trainer_runs.run(out, model, settings, processes=2, devices=1)
  for version in range(1, trainer_runs.STEPS + 1):
    assert_same(out, one, version)
  for ours, theirs in zip(rows(out), rows(one), strict=True):
    assert without_seconds(ours) == without_seconds(theirs)


def test_four_processes_train_as_one_but_for_the_order_of_sums(made, tmp_path):
  """Sums of four numbers are taken in another order between processes than inside of one."""
  model, _ = made
  mesh = {"data": 2, "expert": 2}
  one = one_process(tmp_path, model, mesh, 4)
  out = tmp_path / "four"
  trainer_runs.write_log(out / "rollouts")
  trainer_runs.run(out, model, {"trainer.trainer.mesh": mesh}, processes=4, devices=1)
  for step, (ours, theirs) in enumerate(zip(rows(out), rows(one), strict=True), start=1):
    ours, theirs = without_seconds(ours), without_seconds(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    found, expected = trainer_runs.weights(out, step), trainer_runs.weights(one, step)
    for name, tensor in expected.items():
      bound = 1e-3 * LEARNING_RATE * step
      np.testing.assert_allclose(found[name], tensor, rtol=0, atol=bound, err_msg=name)


def kill_one(started, out, index, after):
  """Kills a process of a trainer once a step is done; gives how long the others lived on."""
  deadline = time.monotonic() + 200
  while not any(row["step"] >= after for row in rows(out)):
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in started), trainer_runs.logs(out)
    time.sleep(0.02)
  started[index].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  codes = trainer_runs.finish(started, seconds=60)
  assert codes[index] == -signal.SIGKILL and all(codes)
  return time.monotonic() - killed


def test_one_that_is_killed_ends_the_others_and_resumes_to_the_same_bits(made, tmp_path):
  model, one = made
  out = tmp_path / "broken"
  trainer_runs.write_log(out / "rollouts", 3)  # so that it waits for the fourth batch
  settings = {"trainer.trainer.mesh": MESH}
  several = {"processes": 2, "devices": 1, "environment": {"INTELLECT3_HEARTBEAT_SECONDS": "5"}}
  started = trainer_runs.start(out, model, settings, **several)
  assert kill_one(started, out, index=1, after=3) < 30
  assert "process 0 of 2 ends since process 1 of 2 ended" in trainer_runs.logs(out)[0]
  trainer_runs.write_log(out / "rest")
  (out / "rest" / "step_000004").rename(out / "rollouts" / "step_000004")
  trainer_runs.run(out, model, settings, resume=True, **several)
  assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
  assert_same(out, one)
  # And on: another shape over another number of processes reads the same checkpoint.
  third = {"trainer.trainer.mesh": {"fsdp": 2, "expert": 2}, "rl.run.steps": 5}
  trainer_runs.write_log(out / "more", 5)
  (out / "more" / "step_000005").rename(out / "rollouts" / "step_000005")
  (tmp_path / "broken_1.log").unlink()
  trainer_runs.run(out, model, third, processes=1, devices=4, resume=True)
  assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5]
  assert "resumed on another machine" in trainer_runs.logs(out)[0]


def test_a_whole_run_with_a_trainer_of_two_is_killed_named_and_resumed(made, tmp_path):
  model, _ = made
  steps = 6
  settings = {
    "rl.run.model_path": str(model),
    "rl.run.steps": steps,
    "trainer.trainer.processes": 2,
    "trainer.trainer.checkpoint_every": 2,
    **whole_runs.SYNCHRONOUS,
  }
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  result = whole_runs.run(straight, settings)
  assert result.returncode == 0, result.stdout + result.stderr
  process = subprocess.Popen(
    whole_runs.arguments(broken, settings),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 200
  while not any(row["step"] >= 3 for row in rows(broken)):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  trainers = [
    child
    for child in psutil.Process(process.pid).children()
    if "--role trainer" in " ".join(child.cmdline())
  ]
  assert len(trainers) == 2
  (victim,) = [child for child in trainers if child.environ().get("INTELLECT3_PROCESS_ID") == "1"]
  os.kill(victim.pid, signal.SIGKILL)
  assert process.wait(20) == 1
  assert re.search(r"error: trainer_1 was killed by SIGKILL.*trainer_1\.log", process.stderr.read())
  assert whole_runs.processes_of(broken) == []
  result = whole_runs.run(broken, settings, "--resume")
  assert result.returncode == 0, result.stdout + result.stderr
  assert [row["step"] for row in rows(broken)] == list(range(1, steps + 1))
  assert_same(broken, straight, steps)
