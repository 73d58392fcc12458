"""Importing advantages loads neither jax nor NumPy (what else it loads: tests/test_house.py)."""

import json
import subprocess
import sys

import pytest


def modules_after(statement):
  code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return json.loads(run.stdout)


@pytest.mark.parametrize(
  "statement", ["import intellect3.losses", "from intellect3.losses import advantages"]
)
def test_without_jax_or_numpy(statement):
  loaded = {name.split(".")[0] for name in modules_after(statement)}
  assert "intellect3" in loaded and not loaded & {"jax", "jaxlib", "flax", "numpy"}
