"""The expert exchange: outputs and gradients over several devices against one device's oracle."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from intellect3.kernels.expert_parallel import resolve

HERE = pathlib.Path(__file__).parent
TOLERANCE = 2e-5
CHOICES = 3

SPREADS = ("balanced", "skewed", "one device", "one expert", "mostly padding", "ranks padded")
# Meshes are groups x ranks of experts; tokens a device and rows a round divide by little.
FEW = [
  dict(groups=2, ranks=4, tokens=11, exchange="padded", rows=25),
  dict(groups=1, ranks=8, tokens=13, exchange="ragged", rows=20),
]
ONE_DEVICE = [
  dict(groups=2, ranks=1, tokens=9, exchange="padded", rows=27),
  dict(groups=2, ranks=1, tokens=9, exchange="padded", rows=4),
]
MANY = [
  dict(groups=4, ranks=2, tokens=7, exchange="padded", rows=2),
  dict(groups=4, ranks=2, tokens=7, exchange="ragged", rows=2),
  dict(groups=1, ranks=8, tokens=19, exchange="padded", rows=1000),
  dict(groups=1, ranks=8, tokens=19, exchange="ragged", rows=1000),
  dict(groups=2, ranks=4, tokens=5, exchange="ragged", rows=6),
  dict(groups=1, ranks=2, tokens=1, exchange="padded", rows=3),
]


def run(tasks, timeout=280):
  """What each task of expert_parallel_process returns."""
  process = subprocess.run(
    [sys.executable, str(HERE / "expert_parallel_process.py"), json.dumps(tasks)],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])},
    timeout=timeout,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  return [json.loads(line) for line in process.stdout.splitlines()]


def fewest_rounds(counts, exchange, rows):
  """By trial: rounds of equal parts until no device's buffer is too small."""
  counts = np.array(counts)
  ranks = len(counts)
  total = 1
  while True:
    parts = -(-counts // total)
    if exchange == "padded":
      fits = parts.max() <= rows // ranks
    else:
      fits = max(parts.sum(0).max(), parts.sum(1).max()) <= rows // ranks * ranks
    if fits:
      return total
    total += 1


def check(tasks):
  for (_, task), found in zip(tasks, run(tasks), strict=True):
    worst = max(found["differences"].values())
    assert worst < TOLERANCE, (task, found["differences"])
    ranks, rows = task["ranks"], task["rows"]
    nominal = -(-task["tokens"] * CHOICES // (rows // ranks * ranks))
    fewest = [fewest_rounds(counts, task["exchange"], rows) for counts in found["counts"]]
    assert found["extra"] == [max(0, n - nominal) for n in fewest for _ in range(ranks)], task


def tasks_of(layouts, spreads, seeds):
  return [
    ["routing", {"spread": spread, "seed": seed, **layout}]
    for layout in layouts
    for spread in spreads
    for seed in seeds
  ]


def test_experts_on_several_devices_are_those_of_one():
  check(tasks_of(FEW, SPREADS, [0]) + tasks_of(ONE_DEVICE, ("skewed", "mostly padding"), [0]))


@pytest.mark.slow
def test_any_routing_on_any_mesh():
  check(tasks_of([*FEW, *MANY], SPREADS, range(8)))


def test_in_rematerialised_layers_and_within_bounded_memory():
  tasks = [["layers", {}], ["memory", {"rows": 256}], ["memory", {"rows": 8192}]]
  layers, few, many = run(tasks)
  assert max(layers["differences"]) < TOLERANCE
  # Rows go out and come back; backward x and cotangent go out, and a gradient comes back. The
  # forward pass is not run again; weights go with x, and their gradients come back.
  assert (layers["wide"], layers["narrow"]) == (5, 3)
  assert few["temporaries"] < few["pairs"] < many["temporaries"]


def test_a_name_is_resolved_by_platform():
  assert [resolve("auto", p) for p in ("cpu", "gpu", "tpu")] == ["padded", "ragged", "padded"]
  assert resolve("padded", "gpu") == "padded"
  with pytest.raises(ValueError, match="exchange: expected padded or auto on cpu, got 'ragged'"):
    resolve("ragged", "cpu")
  with pytest.raises(ValueError, match=r"exchange: expected one of .*, got 'dense'"):
    resolve("dense", "cpu")
  with pytest.raises(ValueError, match=r"platform: expected one of .*, got 'metal'"):
    resolve("auto", "metal")
