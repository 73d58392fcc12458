"""What every test shares: CPU, quick compiles and a cache of them; a model."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).resolve().parents[1] / "build" / "jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

# Tests compile far more than they compute: less effort on machine code makes compiling four times
# as fast, and small programs run as before. `XLA_FLAGS= pytest ..` tests the code that users get.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
  QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ.setdefault("XLA_FLAGS", QUICK_COMPILES)

SHARED_SERVERS = ("inference/engine", "real_sglang")
"""Folders whose files share a server: they run in one process."""

SHARED_MODEL = ("test_rl_run.py", "test_rl_servers.py")
"""Likewise files that share the warmed-up model."""

SFT = "experiments/configs/runs/demo_sft.gin"


def pytest_collection_modifyitems(items):
  """Says what belongs in one process of several (`-n`)."""
  here = pathlib.Path(__file__).parent
  for item in items:
    file = item.path.relative_to(here)
    group = "runs" if file.name in SHARED_MODEL else str(file)
    if file.parent.as_posix() in SHARED_SERVERS:
      group = file.parent.as_posix()
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
  """A model that reverses some words and copies others, as the demo's warm-up makes it."""
  out = tmp_path_factory.mktemp("warm_up") / "sft"
  command = [sys.executable, "-m", "experiments.sft_run", "--gin", SFT, "--out", str(out)]
  result = subprocess.run(
    [*command, "--set", "sft.run.steps=90", "--set", "schedule.linear.steps=90"],
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert result.returncode == 0, result.stderr
  assert json.loads((out / "summary.json").read_text())["loss_end"] < 1.5
  return out / "model"
