"""A step over eight devices is the step of one: parameters, metrics, and where the state lies."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from intellect3.models import presets
from intellect3.sharding.mesh import make_mesh
from intellect3.sharding.rules import TRAIN_FSDP
from intellect3.training import layout, optimizer


def test_a_step_on_eight_devices_is_the_step_of_one():
  here = pathlib.Path(__file__).parent
  found = subprocess.run(
    [sys.executable, str(here / "layout_process.py")],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here.parents[1])},
    timeout=280,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  assert found.stdout.strip() == "same"


def test_every_array_of_the_state_has_a_place():
  made = optimizer.muon(learning_rate=0.1)
  mesh = make_mesh(devices=jax.devices()[:1])
  shardings = layout.state_shardings(presets.tiny(), made, mesh, TRAIN_FSDP)
  # Muon's momentum of the query kernels is found by its path and lies as the kernels do.
  specs = {
    jax.tree_util.keystr(path): sharding.spec
    for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]
  }
  names = [name for name in specs if "opt_state" in name and name.endswith("['q']['kernel']")]
  assert len(names) == 2  # dense and moe layers, one momentum each
  assert all(specs[name][1:3] == ("fsdp", "tensor") for name in names)


def test_seed_or_parameters():
  with pytest.raises(ValueError, match="exactly one"):
    layout.make_state(presets.tiny(), optimizer.adamw(learning_rate=0.1), None)
