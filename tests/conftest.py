"""What every test shares: CPU, quick compiles and a cache of them; a model."""

import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

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

# A suite started in the background of a shell inherits an ignored SIGINT, and would pass it on to
# the runs that tests interrupt.
if threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, signal.default_int_handler)

GROUPS = {
  "test_rl_run.py": "runs",  # of one warmed-up model
  "test_rl_servers.py": "runs",
  "real_sglang": "real_sglang",  # of one server
  "inference/engine": "engine",
}
"""Files, and folders of files, that share what is dear to make: they run in one process."""

FIRST = ("runs", "engine", "real_sglang")
"""The longest of these groups, so that none is what the others wait for at the end."""

SFT = "experiments/configs/runs/demo_sft.gin"


def group_of(file):
  """The group of a file under `tests`, or the file itself."""
  return GROUPS.get(file.as_posix()) or GROUPS.get(file.parent.as_posix()) or file.as_posix()


def pytest_collection_modifyitems(items):
  """Begins with the groups of `FIRST`."""
  here = pathlib.Path(__file__).parent
  ranks = {name: rank for rank, name in enumerate(FIRST)}
  items.sort(key=lambda item: ranks.get(group_of(item.path.relative_to(here)), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Gives each of several processes (`-n`) a group at a time, in the order of collection.

  (xdist's own `loadgroup` writes the group into an attribute that pytest 9 no longer reads.)
  """
  from xdist.scheduler import LoadScopeScheduling

  class Groups(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      return group_of(pathlib.PurePath(nodeid.split("::")[0]).relative_to("tests"))

  config.option.loadscopereorder = False
  return Groups(config, log)


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
