"""What a simulated rollout costs of a core, against the bare event loop that it could run on.

    python -m tools.benchmarks.simulation --json build/simulation.json
    python -m tools.benchmarks.simulation --steps 100 --rounds 1

`callbacks` is the baseline: asyncio's own loop, timers that are due at once and set the next one,
nothing else. `virtual` is the same on the simulator's loop, `simulation` the throughput simulator
on a run file and a scenario. Sides take turns in one process; CPU seconds, medians. Events are the
report's: dispatches and ends, messages, segments.
"""

import argparse
import asyncio
import dataclasses
import datetime
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments import gin_config
from intellect3.simulation import clock, scenario, scenario_file, settings, throughput
from tools import simulated_run

RUN = "experiments/configs/runs/intellect3_rl_512xh200.gin"
SCENARIO = "experiments/configs/scenarios/intellect3_44x8h200.toml"
CHAINS = 256
"""Timers that are set at a time."""


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gin", default=RUN)
  parser.add_argument("--scenario", default=SCENARIO)
  parser.add_argument("--steps", type=int, default=8)
  parser.add_argument("--callbacks", type=int, default=200_000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
  arguments = parser.parse_args(argv)
  run = simulated_run.read(gin_config.read([arguments.gin], []))
  run = dataclasses.replace(
    run, scheduler=dataclasses.replace(run.scheduler, steps=arguments.steps)
  )
  given = scenario_file.load(arguments.scenario)
  sides: dict[str, Callable[[], dict[str, float]]] = {
    "callbacks": lambda: _callbacks(asyncio.new_event_loop(), arguments.callbacks),
    "virtual": lambda: _callbacks(clock.VirtualLoop(), arguments.callbacks),
    "simulation": lambda: _simulation(run, given),
  }
  rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
  for _ in range(arguments.rounds):
    for name, measure in sides.items():
      rounds[name].append(measure())
  said = figures(rounds)
  for name, row in said.items():
    print(f"{name:10} " + ", ".join(f"{key} {value:,.4g}" for key, value in row.items()))
  if arguments.json is not None:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "machine": platform.processor() or platform.machine(),
      "python": platform.python_version(),
      "arguments": {key: value for key, value in vars(arguments).items() if key != "json"},
      "figures": said,
    }
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
  return 0


def figures(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
  """Medians by side, and against the baseline.

  Args:
    rounds: by side, the `cpu_seconds` and `events` of each round, of `simulation` the `rollouts`.

  Returns:
    By side `events_per_second`, and `ratio`: an event's cost in bare callbacks. Of `simulation`
    also `rollouts_per_second` and `rollout_ratio`: a rollout's cost in bare callbacks.
  """
  seconds = {
    name: statistics.median(row["cpu_seconds"] / row["events"] for row in rows)
    for name, rows in rounds.items()
  }
  said = {
    name: {"events_per_second": 1.0 / cost, "ratio": cost / seconds["callbacks"]}
    for name, cost in seconds.items()
  }
  cost = statistics.median(row["cpu_seconds"] / row["rollouts"] for row in rounds["simulation"])
  said["simulation"] |= {
    "rollouts_per_second": 1.0 / cost,
    "rollout_ratio": cost / seconds["callbacks"],
  }
  return said


def _callbacks(loop: asyncio.AbstractEventLoop, count: int) -> dict[str, float]:
  left = [count]

  def ring() -> None:
    left[0] -= 1
    if left[0] > 0:
      loop.call_later(0.0, ring)
    else:
      loop.stop()

  for _ in range(min(CHAINS, count)):
    loop.call_later(0.0, ring)
  started = time.process_time()
  loop.run_forever()
  spent = time.process_time() - started
  loop.close()
  return {"cpu_seconds": spent, "events": float(count)}


def _simulation(run: settings.RunSettings, given: scenario.Scenario) -> dict[str, float]:
  started = time.process_time()
  report: dict[str, Any] = throughput.simulate(run, given)
  spent = time.process_time() - started
  return {
    "cpu_seconds": spent,
    "events": float(sum(report["events"].values())),
    "rollouts": float(report["accounting"]["dispatched"]),
  }


if __name__ == "__main__":
  sys.exit(main())
