"""How a run would go on a cluster that is not here: the production orchestrator, a virtual clock.

    python -m tools.simulate_run --gin FILE [--gin FILE ..] [--set a.b=c ..]
        [--scenario FILE | --target h100|h200|b200|v5p [--write-scenario OUT.toml]]
        [--seed N] [--steps N] [--json OUT] [--trace OUT] [--plot OUT.png]

The gin file says what the run's orchestrator and workers do, the scenario (TOML or JSON,
docs/simulator.md) what servers, trainer and attempts are like. Without one it is assumed: rooflines
of the run's model on the target, and guesses; every line of it is told, and --write-scenario keeps
it, to be edited. Nothing is started and jax is not imported. Progress goes to stderr. Exit code 1:
the run does not reach its last step; 2: the configuration or the scenario is not fit.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from experiments import gin_config
from intellect3.planning import hardware
from intellect3.rollouts.ports import RunFailed
from intellect3.simulation import assumed, clock, scenario, scenario_file, settings, throughput
from tools import simulated_run

PLOTS = (".png", ".pdf", ".svg")
PLOT_SECONDS = 1.0
"""Between two points of a plot, unless `--sample-seconds` says otherwise."""


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  sample_seconds = arguments.sample_seconds
  if arguments.plot is not None and sample_seconds is None:
    sample_seconds = PLOT_SECONDS
  try:
    run = simulated_run.read(gin_config.read(arguments.gin, arguments.bindings))
    changes = {
      name: value
      for name, value in (("seed", arguments.seed), ("steps", arguments.steps))
      if value is not None
    }
    _check_outputs(arguments, run)
    run = dataclasses.replace(run, scheduler=dataclasses.replace(run.scheduler, **changes))
    given, notes = _scenario(arguments, run)
    if arguments.seed is not None:
      given = dataclasses.replace(given, seed=arguments.seed)
    if notes:
      print(assumptions(given, notes), end="\n\n", flush=True)
    with contextlib.ExitStack() as files:
      trace = None
      if arguments.trace is not None:
        trace = files.enter_context(open(arguments.trace, "w", encoding="utf-8")).write
      started = time.perf_counter()
      report = throughput.simulate(
        run,
        given,
        trace=trace,
        progress=simulated_run.progress("simulated", run.steps),
        sample_seconds=sample_seconds,
      )
  except (gin_config.ConfigError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (RunFailed, clock.Stuck) as error:
    print(f"the run ends: {error}", file=sys.stderr)
    return 1
  # Apart from what is simulated, which is the same in every process.
  report["host"] = {"wall_seconds": time.perf_counter() - started}
  report["scenario_notes"] = dict(notes)
  if arguments.json is not None:
    pathlib.Path(arguments.json).write_text(json.dumps(report) + "\n", encoding="utf-8")
  print(table(report))
  if arguments.plot is not None:
    from intellect3.simulation import plots  # matplotlib takes a while to load

    last = max(2, plots.last_served(report))
    plots.timeline(report, first=max(2, last - 2), last=last).savefig(arguments.plot, dpi=150)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m tools.simulate_run",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--gin", action="append", required=True, metavar="FILE")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--scenario", metavar="FILE", help="the cluster; else it is assumed")
  parser.add_argument("--target", help="the devices of an assumed cluster: h200 by default")
  parser.add_argument(
    "--hardware", type=pathlib.Path, help="their constants, as plan_run takes them"
  )
  parser.add_argument(
    "--write-scenario", type=pathlib.Path, metavar="OUT.toml", help="where what is assumed goes"
  )
  parser.add_argument("--seed", type=int, help="of run and scenario; by default their own")
  parser.add_argument("--steps", type=int, help="by default the run's")
  parser.add_argument("--json", metavar="OUT", help="where the whole report goes")
  parser.add_argument("--trace", metavar="OUT", help="where its events go, as JSON lines")
  parser.add_argument(
    "--plot", metavar="OUT.png", help="where a picture of the run's last three steps goes"
  )
  parser.add_argument(
    "--sample-seconds", type=float, help="virtual seconds between two entries of the timeline"
  )
  return parser


def _check_outputs(arguments: argparse.Namespace, run: settings.RunSettings) -> None:
  """Refuses, before anything is simulated, what could not be written after it."""
  for flag in ("json", "trace", "plot"):
    path = getattr(arguments, flag)
    if path is None:
      continue
    if not pathlib.Path(path).parent.is_dir() or pathlib.Path(path).is_dir():
      raise ValueError(f"--{flag}: expected a file in a directory that exists, got {path}")
  if arguments.plot is not None:
    if pathlib.Path(arguments.plot).suffix not in PLOTS:
      raise ValueError(f"--plot: expected a name in one of {PLOTS}, got {arguments.plot}")
    if (arguments.steps or run.steps) < 2:
      raise ValueError("--plot: expected a run of at least 2 steps, got 1")


def _scenario(
  arguments: argparse.Namespace, run: settings.RunSettings
) -> tuple[scenario.Scenario, assumed.Notes]:
  """The scenario that is given, or one assumed, with notes on where its fields are from."""
  if arguments.scenario is not None:
    for name in ("target", "hardware", "write_scenario"):
      if getattr(arguments, name) is not None:
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"{flag}: expected only where no --scenario is given")
    return scenario_file.load(arguments.scenario), {}
  target = arguments.target or "h200"
  constants = hardware.load(target, arguments.hardware)
  given, notes = assumed.make(run, simulated_run.cluster(), constants, target)
  if arguments.write_scenario is not None:
    if arguments.write_scenario.suffix != ".toml":
      raise ValueError(
        f"--write-scenario: expected a name in .toml, got {arguments.write_scenario}"
      )
    arguments.write_scenario.write_text(scenario_file.dump(given, notes), encoding="utf-8")
  return given, notes


def assumptions(given: scenario.Scenario, notes: assumed.Notes) -> str:
  """What was assumed where no scenario was given: the scenario's fields, and where each is from."""
  return "assumed, no scenario given:\n" + scenario_file.dump(given, notes).rstrip()


def _seconds(value: float) -> str:
  """Seconds of a demo or of a cluster: three digits, or all of the whole ones."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _unsettled(report: dict[str, Any]) -> str:
  """A word of warning where the warm-up is shorter than it takes to settle."""
  short = report["settling_steps"] - report["warm_up_steps"]
  return f": NOT SETTLED, give --steps {2 * report['settling_steps']} or more" if short > 0 else ""


def table(report: dict[str, Any]) -> str:
  """The report's main figures as people read them."""
  step, stale = report["step_seconds"], report["staleness"]
  queues, groups = report["queues"], report["groups"]
  told, events = report["orchestrator"], report["events"]
  rows = [
    ("scenario", report["scenario"]),
    ("steps (warm-up)", f"{report['steps']} ({report['warm_up_steps']}){_unsettled(report)}"),
    ("virtual time", f"{_seconds(report['virtual_seconds'])} s"),
    (
      "step",
      f"mean {_seconds(step['mean'])} s, median {_seconds(step['p50'])}, "
      f"p90 {_seconds(step['p90'])}"
      + (f"; drift {drift['seconds_per_token']:+.1%}" if (drift := report["drift"]) else ""),
    ),
    ("trainer idle", f"{report['trainer_idle_share']:.1%}"),
    (
      "inference idle",
      f"{report['inference_idle_share']:.1%}; paused {report['inference_paused_share']:.1%}, "
      f"prefilling {report['inference_prefill_share']:.1%}"
      + (f", lost {lost:.1%}" if (lost := report["inference_lost_share"]) else ""),
    ),
    (
      "tokens",
      f"sampled {report['sampled_tokens_per_second']:,.0f} /s, "
      f"trained {report['trained_tokens_per_second']:,.0f} /s with their prompts",
    ),
    (
      "staleness",
      f"mean {stale['token_mean']:.2f} of tokens, {stale['rollout_mean']:.2f} of rollouts' oldest "
      f"tokens, max {stale['max']}",
    ),
    (
      "lost to staleness",
      f"{report['stale_share']:.2%} of rollouts dropped, "
      f"{report['masked_token_share']:.2%} of tokens masked",
    ),
    ("failed", f"{report['errored_share']:.2%} of rollouts"),
    (
      "group's last rollout",
      ", ".join(f"{name} {_seconds(value)} s" for name, value in groups["last_seconds"].items()),
    ),
    (
      "requests per server",
      f"{queues['running_per_server']:.1f} running, {queues['waiting_per_server']:.1f} waiting, "
      f"at most {queues['most_waiting']}",
    ),
    (
      "orchestrator",
      f"{told['messages_per_second']:,.1f} messages /s, {told['bytes_per_second']:,.0f} bytes /s",
    ),
    (
      "rollouts in all",
      ", ".join(f"{name} {count:,}" for name, count in report["accounting"].items()),
    ),
    (
      "simulated in",
      f"{report['host']['wall_seconds']:.1f} s; {events['traced']:,} events of rollouts, batches "
      f"and syncs (--trace), {events['messages']:,} messages, {events['servers']:,} segments' ends",
    ),
  ]
  if report["slow_segments"]:
    rows.append(
      ("beware", f"{report['slow_segments']:,} rollouts had a segment beyond the clients' time-out")
    )
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
  sys.exit(main())
