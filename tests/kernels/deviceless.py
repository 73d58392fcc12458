"""Programs compiled for a GPU that is not here, each in a process of its own.

The CUDA compiler lies in the environment or, better, in `plan` beside its libraries
(requirements-plan.lock): an environment's plugins are loaded by every process of jax.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLAN = pathlib.Path(sys.prefix) / "plan"


def run(code: str, *, packages: tuple[str, ...] = ()) -> Any:
  """What the code prints as JSON on its last line; skips where a package is not installed.

  Args:
    code: Python; `intellect3.planning.target` can be imported in it and has its plugin.
    packages: needed besides jax's CUDA plugin.
  """
  reasons = [name for name in packages if importlib.util.find_spec(name) is None]
  plugin = "jax_cuda12_plugin"
  if not (PLAN / plugin).is_dir() and importlib.util.find_spec(plugin) is None:
    reasons.append(f"{plugin} (in the environment or {PLAN}; see requirements-plan.lock)")
  if reasons:
    pytest.skip(f"compiling for a GPU needs {', '.join(reasons)}")
  path = os.pathsep.join([str(PLAN), str(ROOT)])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return json.loads(result.stdout.splitlines()[-1])
