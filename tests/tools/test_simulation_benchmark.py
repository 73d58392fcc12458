"""The simulator's benchmark: its figures by hand, and one round of a small run."""

import json
import pathlib
import subprocess
import sys

import pytest

from tools.benchmarks import simulation

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_costs_are_medians_in_bare_callbacks():
  said = simulation.figures(
    {
      "callbacks": [{"cpu_seconds": s, "events": 100.0} for s in (2.0, 1.0, 9.0)],
      "virtual": [{"cpu_seconds": 1.0, "events": 100.0}],
      "simulation": [{"cpu_seconds": 8.0, "events": 200.0, "rollouts": 50.0}],
    }
  )
  assert said["callbacks"] == pytest.approx({"events_per_second": 50.0, "ratio": 1.0})
  assert said["virtual"] == pytest.approx({"events_per_second": 100.0, "ratio": 0.5})
  assert said["simulation"] == pytest.approx(
    {"events_per_second": 25.0, "ratio": 2.0, "rollouts_per_second": 6.25, "rollout_ratio": 8.0}
  )


def test_a_round_writes_its_figures(tmp_path):
  cluster = tmp_path / "cluster.toml"
  cluster.write_text(
    'name = "small"\n'
    "[servers]\ncount = 2\nmax_running = 64\n"
    "decode_batch = [1, 64]\n"
    "decode_tokens_per_second = [100, 3200]\n"
    "prefill_tokens_per_second = 1e6\n"
    "[trainer]\n"
    "fixed_seconds = 1\n"
    "[environments.default]\n"
    "lengths = { median = 100 }\n"
  )
  out = tmp_path / "figures.json"
  small = ["--gin", "experiments/configs/runs/demo.gin", "--scenario", str(cluster)]
  counts = ["--steps", "1", "--callbacks", "1000", "--rounds", "1", "--json", str(out)]
  command = [sys.executable, "-m", "tools.benchmarks.simulation", *small, *counts]
  told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
  figures = json.loads(out.read_text())["figures"]
  assert set(figures) == {"callbacks", "virtual", "simulation"}
  assert figures["simulation"]["rollout_ratio"] > figures["simulation"]["ratio"] > 0
  assert "rollouts_per_second" in told
