"""A run, predicted by the simulator from its own measurements, beside what it came to.

    python -m tools.simulate_demo [--run DIR] [--gin FILE] [--set a.b=c ..] [--out DIR]
        [--first 31] [--block 10] [--steps 200] [--slots N] [--scenario OUT.json] [--json OUT]

Without --run it runs the demo first (its warm-up too, where there is none), as
`python -m experiments.rl_run` would. Every other block of ten steps is measured
(intellect3/simulation/reality.py), the run's settings are simulated on what was measured, and the
prediction is held against the blocks between. Exit code 1: some figure is more than --within off;
2: the run lacks what must be measured.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gin

from experiments import gin_config
from intellect3.rl import inference
from intellect3.simulation import reality, sweep, throughput, waits
from tools import simulated_run

CONFIGS = pathlib.Path("experiments/configs/runs")


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  run_dir = arguments.run
  try:
    if run_dir is None:
      run_dir = arguments.out
      _run_demo(arguments.gin, arguments.bindings, run_dir)
    result = compare(
      run_dir,
      first=arguments.first,
      block=arguments.block,
      steps=arguments.steps,
      slots=arguments.slots,
    )
  except (gin_config.ConfigError, ValueError, OSError, subprocess.CalledProcessError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if arguments.scenario is not None:
    arguments.scenario.write_text(json.dumps(result["scenario"], indent=1) + "\n", encoding="utf-8")
  if arguments.json is not None:
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  print(table(result))
  return int(any(abs(row["error"]) > arguments.within for row in result["figures"]))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m tools.simulate_demo",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--run", type=pathlib.Path, help="a finished run; by default the demo is run")
  parser.add_argument("--gin", default=str(CONFIGS / "demo.gin"), help="of the run to be made")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/simulate_demo"))
  parser.add_argument("--first", type=int, default=31, help="step; those before it compile")
  parser.add_argument("--block", type=int, default=10, help="steps measured, or held out, in a row")
  parser.add_argument("--steps", type=int, default=200, help="to simulate")
  parser.add_argument("--slots", type=int, help="requests that a server computes at once")
  parser.add_argument("--within", type=float, default=0.2, help="the largest error that is fit")
  parser.add_argument("--scenario", type=pathlib.Path, help="where what was measured goes")
  parser.add_argument("--json", type=pathlib.Path, help="where everything goes")
  return parser


def _run_demo(gin: str, bindings: Sequence[str], out: pathlib.Path) -> None:
  warm = pathlib.Path("runs/demo_sft")
  if not (warm / "model").exists():
    command = ["experiments.sft_run", "--gin", str(CONFIGS / "demo_sft.gin"), "--out", str(warm)]
    subprocess.run([sys.executable, "-m", *command], check=True)
  command = ["experiments.rl_run", "--gin", gin, "--out", str(out)]
  for binding in bindings:
    command += ["--set", binding]
  subprocess.run([sys.executable, "-m", *command], check=True)


def compare(
  run_dir: pathlib.Path, *, first: int, block: int, steps: int, slots: int | None = None
) -> dict[str, Any]:
  """Measures, simulates and compares.

  Args:
    run_dir: of a finished run.
    first: its first step to look at.
    block: steps of each block; every other one is held out.
    steps: to simulate.
    slots: requests that a server computes at once, others waiting in its queue; None: as the
      configuration says, or as many as the workers ask for.

  Returns:
    run, measured and held_out steps, scenario, service (how the decode rate was found) and
    figures: name, unit, predicted, observed, error (relative) and what the measured blocks had.

  Raises:
    ValueError: the run is too short or lacks a metric.
  """
  run = simulated_run.read(gin_config.read([str(run_dir / "config.gin")], []), without_jax=False)
  blocks = (run.steps - first + 1) // (2 * block)
  if blocks < 1:
    raise ValueError(
      f"--first, --block: expected {first + 2 * block - 1} steps, {run_dir} has {run.steps}"
    )
  measured, held_out = reality.alternate(first, first + 2 * blocks * block - 1, block)
  servers = _servers(run_dir, measured)
  asked = max(1, max(1, run.num_workers) * run.max_concurrency // servers)
  given, service = reality.measured(
    run_dir,
    measured,
    num_servers=servers,
    max_running=min(slots or _slots() or asked, asked),
    tasks={
      key.removesuffix("/train"): size for key, size in run.sizes.items() if key.endswith("/train")
    },
  )
  rows = reality.rows_of(run_dir, "orchestrator", measured)
  print("looking for how long messages took", file=sys.stderr)
  delay = waits.message_seconds(
    run,
    given,
    running=reality.running(rows),
    ended_per_second=reality.ended_per_second(rows),
  )
  clients = dataclasses.replace(given.clients, message_seconds=delay)
  given = dataclasses.replace(given, clients=clients)
  report = throughput.simulate(
    sweep.with_steps(run, steps),
    given,
    warm_up_steps=min(10, steps // 4),
    progress=simulated_run.progress("simulated", steps),
  )
  predicted = {
    "trainer_idle_share": report["trainer_idle_share"],
    "mean_staleness": report["staleness"]["rollout_mean"],
    "step_seconds": report["step_seconds"]["mean"],
  }
  seen, same = (
    dataclasses.asdict(reality.observed(run_dir, some)) for some in (held_out, measured)
  )
  return {
    "run": str(run_dir),
    "measured_steps": len(measured),
    "held_out_steps": len(held_out),
    "simulated_steps": steps,
    "scenario": dataclasses.asdict(given),
    "service": dataclasses.asdict(service),
    "figures": [
      {
        "name": name,
        "predicted": predicted[name],
        "observed": seen[name],
        "error": predicted[name] / seen[name] - 1,
        "observed_where_measured": same[name],
      }
      for name in predicted
    ],
  }


def _slots() -> int | None:
  """Requests that an embedded server of the configuration computes at once, or None."""
  try:
    options = gin.get_bindings(inference.embedded_server).get("options") or {}
  except ValueError:  # the file names nothing of it
    return None
  return options.get("slots")


def _servers(run_dir: pathlib.Path, steps: Sequence[int]) -> int:
  rows = reality.rows_of(run_dir, "orchestrator", steps)
  return max(1, round(sum(row.get("servers", 1) for row in rows) / len(rows)))


def table(result: Mapping[str, Any]) -> str:
  """The comparison as Markdown, and what was measured."""
  given: dict[str, Any] = result["scenario"]
  trainer, sync = given["trainer"], given["sync"]
  still = sync["load_seconds"] + sync["resume_seconds"]
  service = result["service"]
  lines = [
    f"{result['run']}: {result['measured_steps']} steps measured, "
    f"{result['held_out_steps']} others predicted",
    f"a rollout among n takes {service['idle_seconds']:.3f} s + n / "
    f"{service['rollouts_per_second']:.0f} a second; "
    f"{trainer['seconds_per_token'] * 1e6:.1f} us a token to train, "
    f"{trainer['gather_seconds'] * 1e3:.1f} ms to publish and {trainer['write_seconds'] * 1e3:.0f} "
    f"ms to write; a sync takes {sum(sync.values()) * 1e3:.0f} ms, {still * 1e3:.0f} of them still",
    f"a server computes {given['servers']['max_running']} rollouts at once; a batch is picked up "
    f"after {trainer['read_seconds'] * 1e3:.0f} ms, a message takes "
    f"{given['clients']['message_seconds'] * 1e3:.0f} ms",
    "",
    "| | predicted | measured | error | where it was measured |",
    "| --- | --- | --- | --- | --- |",
  ]
  shown = {
    "trainer_idle_share": ("trainer idle", "{:.1%}"),
    "mean_staleness": ("mean staleness, steps", "{:.2f}"),
    "step_seconds": ("step, s", "{:.3f}"),
  }
  for row in result["figures"]:
    name, form = shown[row["name"]]
    values = [form.format(row[key]) for key in ("predicted", "observed")]
    same = form.format(row["observed_where_measured"])
    lines.append(f"| {name} | {' | '.join(values)} | {row['error']:+.1%} | {same} |")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
