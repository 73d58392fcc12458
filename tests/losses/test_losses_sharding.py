"""The losses inside `shard_map`, in a process with four fake devices."""

import os
import subprocess
import sys

from tests.losses import losses_house as house


def test_every_loss_over_four_devices():
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
  }
  command = [sys.executable, "-m", "tests.losses.sharded_losses"]
  run = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-3000:]
  said = run.stdout.split("\n")[:-1]
  assert said == [
    *(f"ok {case.name}" for case in house.PROPERTIES),
    *(f"ok shares of {case.name}" for case in house.DEFAULTS),
    "ok two axes",
    "ok unchecked",
  ]
