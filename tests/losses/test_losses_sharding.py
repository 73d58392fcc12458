"""The losses inside `shard_map`, in a process with four fake devices."""

import os
import subprocess
import sys

from tests.losses import losses_house as house
from tests.losses import sharded_losses


def test_every_loss_over_four_devices():
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compile time, not run time, is what it costs
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
  }
  command = [sys.executable, "-m", "tests.losses.sharded_losses"]
  run = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-3000:]
  said = run.stdout.split("\n")[:-1]
  assert said == [
    *(f"ok {case.name}" for case in house.PROPERTIES),
    *(f"ok inside {name}" for name in sharded_losses.GIVEN),
    "ok long rows",
    "ok two axes",
    "ok unchecked",
    "ok measures",
  ]
