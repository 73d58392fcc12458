"""What a run's settings and its cluster's split do to its steps: simulated, drawn, in tables.

    python -m tools.simulate_sweep --gin FILE [--set a.b=c ..] --scenario FILE [--nodes 64]
        [--steps 40] [--warm-up 40] [--shrink 4] [--only split,in_flight,..] [--out DIR]
        [--into docs/simulator.md] [--mark sweeps]

Sweeps (`--only` picks some): split (of the nodes between trainer and servers), in_flight, staleness
(bound and rule), segments (length, and mode of the weight sync), lengths and slower (how far the
answer hangs on lengths and rates), updates (in flight or not), timeline (a picture of steps of the
whole cluster). A node has as many devices as a server. --shrink simulates a part of batch and
cluster, in that part of the time. Of each run --steps are measured, after --warm-up or four times
its bound on staleness, whichever is more; `drift` is what the second half of them takes for a token
above the first. Writes DIR/NAME.json and MARK_NAME.png; --into puts the tables of all that DIR has
between the page's lines `<!-- MARK -->` and `<!-- /MARK -->`. Progress goes to stderr. Exit code 1:
some run does not reach its last step (the others are in the table); 2: something is not fit.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import gin_config
from intellect3.rollouts.ports import RunFailed
from intellect3.simulation import (
  clock,
  plots,
  scenario,
  scenario_file,
  settings,
  sweep,
  throughput,
)
from tools import simulated_run

SPLITS = (1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8)
IN_FLIGHT = (0.5, 0.75, 1.0, 1.125, 1.25, 1.5)
BOUNDS = (1, 2, 4, 8, 16)
SEGMENTS = (1024, 4096, 16384)
LENGTHS = (0.5, 1.0, 2.0)
SIGMAS = (0.6, 1.0)
SLOWER = (1.0, 2.0, 3.0)
TIMELINE_STEPS = 3

Base = tuple[settings.RunSettings, scenario.Scenario]


def split(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """Shares of the nodes for the trainer."""
  nodes = given.servers.count + given.trainer.devices // given.servers.devices
  counts = dict.fromkeys(max(1, round(share * nodes)) for share in SPLITS)
  return sweep.splits(run, given, list(counts), nodes=nodes)


def in_flight(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """Multiples of the run's own number, at least a batch's groups of rollouts."""
  most = run.scheduler.max_rollouts_in_flight
  return sweep.in_flight(run, given, [round(most * factor) for factor in IN_FLIGHT])


def staleness(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """Bounds under both rules."""
  return sweep.staleness(run, given, BOUNDS)


def segments(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """Lengths of a segment under both modes of the sync."""
  return sweep.segments(run, given, SEGMENTS)


def lengths(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """Medians around the scenario's."""
  first = next(iter(given.environments.values())).lengths
  return sweep.lengths(run, given, [first.median * factor for factor in LENGTHS], SIGMAS)


def slower(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """Rates below the scenario's."""
  return sweep.slower(run, given, SLOWER)


def updates(run: settings.RunSettings, given: scenario.Scenario) -> list[sweep.Variant]:
  """The run's bound, one version, and none: then a batch is sampled, trained, and served again."""
  bounds = (run.scheduler.max_off_policy_steps, 1, 0)
  return sweep.staleness(run, given, bounds, (run.scheduler.staleness_rule,))


SWEEPS: Mapping[str, Callable[..., list[sweep.Variant]]] = {
  function.__name__: function
  for function in (split, in_flight, staleness, segments, lengths, slower, updates)
}
_AGES = (plots.STALENESS, plots.OLDEST)
_COST = (plots.STEP, plots.TOKENS, plots.TRAINER_IDLE)
SHOWN = {
  "split": ("nodes that train : serve", (*_COST, plots.LONGEST_DROPPED, *_AGES)),
  "in_flight": ("rollouts in flight", (*_COST, plots.LONGEST_DROPPED, *_AGES)),
  "staleness": ("bound on staleness", (*_COST, plots.LONGEST_DROPPED, *_AGES)),
  "segments": ("tokens of a segment", (plots.STEP, plots.TOKENS, *_AGES)),
  "lengths": ("median of the lengths, tokens", (plots.STEP, plots.TRAINER_IDLE, *_AGES)),
  "slower": ("times as slow as assumed", (plots.STEP, plots.TRAINER_IDLE, *_AGES)),
  "updates": ("bound on staleness", (plots.STEP, plots.TRAINER_IDLE, plots.INFERENCE_IDLE)),
}
"""By sweep: what its axis says, and its panels."""
COLUMNS: Sequence[tuple[str, str, Callable[[float], str]]] = (
  ("step s", "step_seconds", lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"),
  ("drift", "drift", "{:+.1%}".format),
  ("trainer idle", "trainer_idle_share", "{:.0%}".format),
  ("servers idle", "inference_idle_share", "{:.0%}".format),
  ("running on each", "running_per_server", "{:.0f}".format),
  ("staleness of tokens", "token_staleness", "{:.2f}".format),
  ("of oldest tokens", "rollout_staleness", "{:.2f}".format),
  ("dropped", "stale_share", "{:.2%}".format),
  ("of longest tenth", "longest_stale_share", "{:.1%}".format),
  ("tokens masked", "masked_token_share", "{:.2%}".format),
  ("tokens/s", "trained_tokens_per_second", "{:,.0f}".format),
)


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  whole = True
  try:
    wanted = _wanted(arguments.only)
    for name in ("steps", "warm_up", "shrink"):
      if getattr(arguments, name) < (name != "warm_up"):
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"{flag}: expected more, got {getattr(arguments, name)}")
    text = gin_config.read(arguments.gin, arguments.bindings)
    run = simulated_run.read(text, without_jax=False)
    given = _on_nodes(scenario_file.load(arguments.scenario), arguments.nodes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.into is not None:
      replaced(arguments.into.read_text(encoding="utf-8"), "", arguments.mark)
      agreeing(arguments.out, wanted, _about(given, arguments))
    for name in wanted:
      if name == "timeline":
        _timeline(run, given, arguments.out, arguments.mark, arguments.steps)
      else:
        whole &= _sweep(name, sweep.shrunk(run, given, arguments.shrink), given, arguments)
    if arguments.into is not None:
      page = arguments.into.read_text(encoding="utf-8")
      arguments.into.write_text(
        replaced(page, tables(arguments.out), arguments.mark), encoding="utf-8"
      )
  except (gin_config.ConfigError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (RunFailed, clock.Stuck) as error:
    print(f"the run ends: {error}", file=sys.stderr)
    return 1
  return 0 if whole else 1


def _wanted(only: str | None) -> list[str]:
  known = [*SWEEPS, "timeline"]
  wanted = known if only is None else only.split(",")
  if any(name not in known for name in wanted):
    raise ValueError(f"--only: expected some of {known}, got {only!r}")
  return wanted


def _about(given: scenario.Scenario, arguments: argparse.Namespace) -> dict[str, Any]:
  """What the sweeps of a page must have in common."""
  return {
    "scenario": given.name,
    "servers": given.servers.count,
    "steps": arguments.steps,
    "warm_up": arguments.warm_up,
    "shrink": arguments.shrink,
  }


def agreeing(directory: pathlib.Path, wanted: Sequence[str], about: Mapping[str, Any]) -> None:
  """Refuses a page that would have sweeps of different things beside each other.

  Args:
    directory: whose tables the page gets.
    wanted: the sweeps that will be written there.
    about: what they are of.

  Raises:
    ValueError: another sweep that the directory holds is of something else.
  """
  for name in SWEEPS:
    file = directory / f"{name}.json"
    if name in wanted or not file.exists():
      continue
    found = json.loads(file.read_text(encoding="utf-8"))
    for key, expected in about.items():
      if found[key] != expected:
        raise ValueError(
          f"--into: expected {file} to have {key} {expected!r}, as the sweeps wanted now, got "
          f"{found[key]!r}; run it too or remove it"
        )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m tools.simulate_sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--gin", action="append", required=True, metavar="FILE")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--scenario", required=True, metavar="FILE")
  parser.add_argument("--nodes", type=int, help="all; the servers get what the trainer leaves")
  parser.add_argument("--steps", type=int, default=40, help="measured, of each simulation")
  parser.add_argument("--warm-up", type=int, default=40, help="before them, at least")
  parser.add_argument("--shrink", type=int, default=1, help="simulate this part of the cluster")
  parser.add_argument("--only", help="sweeps, with commas between; all by default")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/sweeps"))
  parser.add_argument("--mark", default="sweeps", help="names pictures and the place in the page")
  parser.add_argument("--into", type=pathlib.Path, help="a page with the two marks")
  return parser


def _on_nodes(given: scenario.Scenario, nodes: int | None) -> scenario.Scenario:
  if nodes is None:
    return given
  left = nodes - given.trainer.devices // given.servers.devices
  if left < 1:
    raise ValueError(f"--nodes: expected more than {nodes - left}, the trainer's, got {nodes}")
  return dataclasses.replace(given, servers=dataclasses.replace(given.servers, count=left))


def _sweep(name: str, base: Base, whole: scenario.Scenario, arguments: argparse.Namespace) -> bool:
  """Runs, draws and writes one; says whether each of its runs got to its end."""
  run, given = base
  variants = SWEEPS[name](run, given)
  started = time.perf_counter()

  def progress(done: int, variant: sweep.Variant) -> None:
    spent = time.perf_counter() - started
    print(f"{name}: {done} of {len(variants)}, {spent:.0f} s; {variant.label}", file=sys.stderr)

  lost: list[str] = []

  def failed(variant: sweep.Variant, error: Exception) -> None:
    lost.append(variant.label)
    print(f"{name}: {variant.label}: the run ends: {error}", file=sys.stderr)

  rows = sweep.simulate(
    variants,
    steps=arguments.steps,
    least_warm_up=arguments.warm_up,
    progress=progress,
    failed=failed,
  )
  result = {
    "name": name,
    **_about(whole, arguments),
    "chosen": _chosen(name, run, given),
    "rows": rows,
  }
  if not rows:
    return False
  text = json.dumps(result, indent=1) + "\n"
  (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")
  draw(result, arguments.out / f"{arguments.mark}_{name}.png")
  return not lost


def _chosen(name: str, run: settings.RunSettings, given: scenario.Scenario) -> float | None:
  """Where the run file and the scenario stand in a sweep."""
  return {
    "split": given.trainer.devices // given.servers.devices,
    "in_flight": run.scheduler.max_rollouts_in_flight,
    "staleness": run.scheduler.max_off_policy_steps,
    "slower": 1.0,
    "updates": run.scheduler.max_off_policy_steps,
    "segments": run.segment_tokens,
    "lengths": next(iter(given.environments.values())).lengths.median,
  }[name]


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws a sweep; places are those of the whole cluster, not of the part simulated."""
  x_label, quantities = SHOWN[result["name"]]
  factor = result["shrink"] if result["name"] in ("split", "in_flight") else 1
  rows = [
    {**row, "x": row["x"] * factor, "trained_tokens_per_second": _tokens(row, result)}
    for row in result["rows"]
  ]
  ticks = None
  if result["name"] == "split":
    nodes = sum(int(part) for part in result["rows"][0]["label"].split(" : ")) * factor
    ticks = {row["x"]: f"{row['x']:.0f} : {nodes - row['x']:.0f}" for row in rows}
  figure = plots.sweep(
    rows,
    quantities,
    title=result["scenario"]
    + ("" if result["name"] == "split" else f"; {result['servers']} servers"),
    x_label=x_label,
    chosen=None if result["chosen"] is None else result["chosen"] * factor,
    ticks=ticks,
  )
  figure.savefig(path, dpi=110)


def _timeline(
  run: settings.RunSettings, given: scenario.Scenario, out: pathlib.Path, mark: str, steps: int
) -> None:
  """Draws steps of the whole cluster, once it has settled."""
  warm_up = sweep.warm_up(run, 0)
  run = sweep.with_steps(run, warm_up + steps)
  report = throughput.simulate(
    run,
    given,
    sample_seconds=10.0,
    warm_up_steps=warm_up,
    progress=simulated_run.progress("timeline", run.steps),
  )
  last = plots.last_served(report)
  figure = plots.timeline(report, first=max(2, last - TIMELINE_STEPS + 1), last=last)
  figure.savefig(out / f"{mark}_timeline.png", dpi=110)
  kept = {key: value for key, value in report.items() if key not in ("timeline", "syncs", "rows")}
  (out / "whole.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")


def tables(directory: pathlib.Path) -> str:
  """The tables of all sweeps that a directory holds, as Markdown."""
  parts = []
  for name in SWEEPS:
    file = directory / f"{name}.json"
    if not file.exists():
      continue
    result = json.loads(file.read_text(encoding="utf-8"))
    part = "" if result["shrink"] == 1 else f", a part of 1 in {result['shrink']}"
    steps = f"{result['steps']} steps after {_warm_ups(result)} of warm-up{part}"
    lines = [
      f"**{name}** ({result['servers']} servers; {steps}):",
      "",
      "| " + " | ".join(["", *(title for title, _, _ in COLUMNS)]) + " |",
      "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for row in result["rows"]:
      whole = {**row, "trained_tokens_per_second": _tokens(row, result)}
      cells = [form(whole[key]) for _, key, form in COLUMNS]
      lines.append("| " + " | ".join([_whole(row, result), *cells]) + " |")
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def _tokens(row: Mapping[str, Any], result: Mapping[str, Any]) -> float:
  """Trained a second, of the whole cluster."""
  return row["trained_tokens_per_second"] * result["shrink"]


def _warm_ups(result: Mapping[str, Any]) -> str:
  steps = sorted({row["warm_up_steps"] for row in result["rows"]})
  return " to ".join(dict.fromkeys(f"{count}" for count in (steps[0], steps[-1])))


def _whole(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
  """A row's label for the whole cluster."""
  factor = result["shrink"]
  if result["name"] == "split":
    return " : ".join(str(int(part) * factor) for part in row["label"].split(" : "))
  return f"{row['x'] * factor:,.0f} in flight" if result["name"] == "in_flight" else row["label"]


def replaced(page: str, text: str, mark: str) -> str:
  """The page with the text between its marks.

  Raises:
    ValueError: a page without both marks, once each and in order.
  """
  begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
  if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
    raise ValueError(f"page: expected the lines {begin} and {end} once each, in this order")
  head, rest = page.split(begin)
  return f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
  sys.exit(main())
