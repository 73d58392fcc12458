"""The fault lab: schedules hold, a seed gives one trace everywhere, planted faults are found."""

import dataclasses
import hashlib
import os
import subprocess
import sys

import pytest
from planted_faults import PLANTED

from intellect3.simulation.faults import lab, schedule
from tools import fault_lab

PARTS = 6
SEEDS = 300
SEARCH = 60


@pytest.mark.parametrize("part", range(PARTS))
def test_contracts_hold_and_every_run_ends(part):
  outcomes = [lab.run(seed) for seed in range(part, SEEDS, PARTS)]
  wrong = [(outcome.seed, outcome.end) for outcome in outcomes if not outcome.ok]
  assert not wrong, f"replay with python -m tools.fault_lab --seed N --trace: {wrong}"
  trained = sum(outcome.end == "trained" for outcome in outcomes)
  assert trained > 0.8 * len(outcomes)  # others end with a reason that a fault excuses


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_contracts_hold_in_ten_thousand_schedules(part):
  wrong = [seed for seed in range(part * 500, part * 500 + 500) if not lab.run(seed).ok]
  assert not wrong


def test_every_kind_of_fault_strikes():
  planned = {fault.kind for seed in range(SEEDS) for fault in schedule.draw(seed).faults}
  assert planned == set(schedule.KINDS)


DIGEST = """
import hashlib, sys
from intellect3.simulation.faults import lab
traces = [line for seed in (9, 37, 51) for line in lab.run(seed).trace]
print(hashlib.sha256("\\n".join(traces).encode()).hexdigest())
assert "jax" not in sys.modules
"""


def test_a_seed_gives_the_same_trace_in_every_process():
  digests = set()
  for seed in ("0", "4711"):
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", DIGEST]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    digests.add(result.stdout.strip())
  here = [line for seed in (9, 37, 51) for line in lab.run(seed).trace]
  digests.add(hashlib.sha256("\n".join(here).encode()).hexdigest())
  assert len(digests) == 1


@pytest.mark.parametrize(
  ("plant", "says", "shown"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED]
)
def test_a_planted_fault_is_found(plant, says, shown, monkeypatch):
  plant(monkeypatch)
  monkeypatch.setattr(lab, "HORIZON_SECONDS", 1000.0)
  for seed in (shown, *range(SEARCH)):  # the seed that shows it may move with the schedules
    outcome = lab.run(seed)
    if not outcome.ok:
      break
  assert not outcome.ok and says in outcome.end


def test_an_unexcused_end_is_a_breach(monkeypatch):
  quiet = next(p for p in map(schedule.draw, range(200)) if p.world.num_servers == 1)
  fault = schedule.Fault(at=1.0, kind="disk_full", seconds=3.0)
  plan = dataclasses.replace(quiet, faults=(fault,))
  assert lab.run_plan(plan).ok
  monkeypatch.setattr(lab, "strike", lambda *_: (_full(*_), False)[1])
  assert "no fault excuses" in lab.run_plan(plan).end


def _full(where, fault):
  where.disk.full = True


def test_a_wait_for_what_never_comes_is_found(monkeypatch):
  plan = dataclasses.replace(schedule.draw(0), faults=())
  monkeypatch.setattr(lab.world.Trainer, "_publish", lambda self, version: None)
  monkeypatch.setattr(lab, "HORIZON_SECONDS", 300.0)
  assert lab.run_plan(plan).end.startswith("stuck")


def test_the_tool_tells_of_failing_seeds_and_replays_one(monkeypatch, capsys):
  assert fault_lab.main(["--schedules", "3"]) == 0
  assert "3 schedules" in capsys.readouterr().out
  PLANTED[4][0](monkeypatch)
  assert fault_lab.main(["--seed", "0", "--schedules", "1"]) == 1
  assert "--seed 0 --trace" in capsys.readouterr().out
  assert fault_lab.main(["--seed", "0", "--trace"]) == 1
  first = capsys.readouterr().out
  fault_lab.main(["--seed", "0", "--trace"])
  assert capsys.readouterr().out == first and "NOT OK: breach: contract 2" in first
  assert fault_lab.main(["--schedules", "0"]) == 2
