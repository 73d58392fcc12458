"""A supervised run of two processes: stopped together, resumed, and the model of one to the bit."""

import os
import pathlib
import subprocess
import sys

import pytest

from intellect3 import telemetry
from intellect3.distributed import cluster
from intellect3.rl import checks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(directory, *arguments, processes):
  """Runs so many processes of two devices in all; gives the last line that each printed."""
  here = pathlib.Path(__file__)
  command = [sys.executable, str(here.with_name("sft_process.py")), str(directory), *arguments]
  (port,) = checks.free_ports("127.0.0.1", 1)
  flags = os.environ.get("XLA_FLAGS", "")
  started = []
  for index in range(processes):
    own = cluster.variables(f"127.0.0.1:{port}", processes, index) if processes > 1 else {}
    own["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={2 // processes}"
    own["PYTHONPATH"] = str(here.parents[2])
    started.append(
      subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
      )
    )
  try:
    told = [process.communicate(timeout=500) for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0] * processes, told
  return [out.strip().splitlines()[-1] for out, _ in told]


def test_two_processes_stop_resume_and_export_what_one_does(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  assert run(one, "9", "fresh", processes=1) == ["5"]
  # The metrics of a step are written while the next one runs, so it stops after that.
  (first, second) = run(two, "2", "fresh", processes=2)
  assert first == second and 2 <= int(first) < 5
  assert not (two / "model").exists()
  assert run(two, "9", "resume", processes=2) == ["5", "5"]
  names = sorted(path.name for path in (one / "model").iterdir())
  assert sorted(path.name for path in (two / "model").iterdir()) == names
  for name in names:
    assert (two / "model" / name).read_bytes() == (one / "model" / name).read_bytes(), name
  ours, theirs = (telemetry.read_metrics(telemetry.metrics_path(out, "sft")) for out in (two, one))
  for row, expected in zip(ours, theirs, strict=True):
    for name in ("step", "loss", "grad_norm", "tokens", "rows", "padding_share", "loss_tokens"):
      assert row[name] == expected[name], name
