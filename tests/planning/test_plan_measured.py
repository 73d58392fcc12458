"""The planned peak against what a process takes, on a CPU: in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tools import plan_measured

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's proc")
@pytest.mark.parametrize(("case", "least"), [("dense", 1.4), ("long", 2.5), ("experts", 1.4)])
def test_a_step_takes_the_memory_that_was_planned(case, least):
  """To within a tenth: a dense model, one on a long row with Muon, one with experts."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
  result = subprocess.run(
    [sys.executable, "-m", "tools.plan_measured", "--case", case],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  told = json.loads(result.stdout.splitlines()[-1])
  assert told["planned_gib"] > least
  assert told["measured_gib"] == pytest.approx(told["planned_gib"], rel=0.1), told


def test_rows_are_full_of_trajectories():
  batch = plan_measured.rows(plan_measured.case("long"))
  assert batch.tokens.shape == (1, 4096) and batch.positions[0, -1] == 4095
  assert batch.loss_mask.sum() == 4095 and set(batch.segment_ids[0]) == {1}


def test_an_unknown_case_is_named(capsys):
  assert plan_measured.main(["--case", "huge"]) == 2
  assert "case: expected one of ('dense', 'long', 'experts'), got 'huge'" in capsys.readouterr().err
