"""Pictures of simulations: how a step passes, and what a sweep found.

Place in the ring: beside it; `tools.simulate_sweep` draws with them what `throughput` and `sweep`
report. Figures are returned, not registered anywhere: `savefig` writes them. Colours are those of
Okabe and Ito (2008).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE)
WIDTH = 9.0


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A panel of a sweep: a figure's key, its axis label, and what it is multiplied by."""

  key: str
  label: str
  factor: float = 1.0


STEP = Quantity("step_seconds", "seconds a step")
TRAINER_IDLE = Quantity("trainer_idle_share", "trainer idle, %", 100)
INFERENCE_IDLE = Quantity("inference_idle_share", "inference idle, %", 100)
TOKENS = Quantity("trained_tokens_per_second", "thousand tokens trained a second", 1e-3)
STALENESS = Quantity("token_staleness", "mean staleness of tokens, steps")
OLDEST = Quantity("rollout_staleness", "staleness of oldest tokens, steps")
LONGEST_DROPPED = Quantity("longest_stale_share", "dropped of the longest tenth, %", 100)


def last_served(report: Mapping[str, Any]) -> int:
  """The last step that ends while the servers still work; after the last batch they stand idle.

  Where the trainer is so far behind that there is none, its first step.
  """
  committed = report["training"][-1]["committed"]
  within = [row["step"] for row in report["training"] if row["ended"] <= committed]
  return int(within[-1]) if within else int(report["training"][0]["step"])


def timeline(report: Mapping[str, Any], *, first: int, last: int) -> Figure:
  """Trainer, weight syncs, and requests on the servers, from the end of step first - 1 to last's.

  Shaded is what comes after the run's last batch, when nothing more is asked of the servers.

  Args:
    report: of `throughput.simulate` with `sample_seconds`.
    first: step.
    last: step.

  Raises:
    ValueError: the report has no timeline, or lacks a step.
  """
  marks = {int(row["step"]): row for row in report["training"]}
  sampled = report["timeline"]
  if not sampled["seconds"]:
    raise ValueError("report: expected a timeline (sample_seconds), got none")
  if first - 1 not in marks or last not in marks:
    known = f"{min(marks) + 1} to {max(marks)}"
    raise ValueError(f"first, last: expected steps within {known}, got {first}, {last}")
  begun, ended = marks[first - 1]["ended"], marks[last]["ended"]
  figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
  bars, running, spread = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1.6, 1.6))
  _bars(bars, report, marks, range(first, last + 1))
  minutes = [(second - begun) / 60 for second in sampled["seconds"]]
  table = np.array(sampled["running"], np.float64)
  waiting = np.array(sampled["waiting"], np.float64)
  running.plot(minutes, table.sum(1), color=BLUE, label="running on the servers")
  waiting_all = waiting.sum(1) + np.array(sampled["clients_waiting"])
  running.plot(minutes, waiting_all, color=VERMILION, label="waiting for a server")
  running.set_ylabel("rollouts")
  running.set_ylim(bottom=0)
  low, middle, high = np.percentile(table, (10, 50, 90), axis=1)
  spread.fill_between(minutes, low, high, color=BLUE, alpha=0.25, lw=0, label="10% to 90% of them")
  spread.plot(minutes, middle, color=BLUE, label="median server")
  spread.set_ylabel("running, by server")
  spread.set_ylim(bottom=0)
  spread.set_xlabel(f"minutes since the end of step {first - 1}")
  spread.set_xlim(0, (ended - begun) / 60)
  over = (report["training"][-1]["committed"] - begun) / 60
  for axes in (running, spread):
    if over < (ended - begun) / 60:
      axes.axvspan(over, (ended - begun) / 60, color=GREY, alpha=0.3, lw=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    # Above the lines: where they run differs from run to run.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, fontsize=8, frameon=False)
    _bare(axes)
  figure.suptitle(str(report["scenario"]), fontsize=10)
  return figure


def _bars(
  axes: Axes, report: Mapping[str, Any], marks: Mapping[int, Mapping[str, float]], steps: range
) -> None:
  begun = marks[steps[0] - 1]["ended"]
  kinds = (
    ("waits", "waiting", "begun", GREY),
    ("trains", "begun", "stepped", GREEN),
    ("publishes", "stepped", "ended", ORANGE),
  )
  for name, start, end, colour in kinds:
    spans = [
      ((marks[s][start] - begun) / 60, (marks[s][end] - marks[s][start]) / 60) for s in steps
    ]
    axes.broken_barh(spans, (1.1, 0.8), color=colour, label=f"trainer {name}")
  for step in steps:
    middle = (marks[step]["begun"] + marks[step]["stepped"]) / 2
    axes.text((middle - begun) / 60, 1.5, str(step), ha="center", va="center", fontsize=8)
  by_version: dict[int, list[tuple[float, float]]] = {}
  for version, _, start, end in report["syncs"]:
    by_version.setdefault(int(version), []).append((start, end))
  spans = [
    ((min(s for s, _ in pairs) - begun) / 60, (max(e for _, e in pairs) - min(pairs)[0]) / 60)
    for pairs in by_version.values()
  ]
  axes.broken_barh(spans, (0.1, 0.8), color=VERMILION, label="weights are synced")
  axes.set_yticks([0.5, 1.5], ["servers", "trainer"])
  axes.set_ylim(0, 2.9)
  axes.legend(loc="upper center", ncols=4, fontsize=8, frameon=False)
  _bare(axes, grid=False)


def sweep(
  rows: Sequence[Mapping[str, Any]],
  quantities: Sequence[Quantity],
  *,
  title: str,
  x_label: str,
  chosen: float | None = None,
  ticks: Mapping[float, str] | None = None,
) -> Figure:
  """A panel for each quantity over what was swept, a line for each series.

  Args:
    rows: of `sweep.simulate`.
    quantities: of `sweep.figures`.
    title: what the figure says.
    x_label: what is swept.
    chosen: the place that the run file has, marked.
    ticks: names of places; None: the places themselves. Places are evenly spaced.

  Raises:
    ValueError: there is no row.
  """
  if not rows:
    raise ValueError("rows: expected at least one, got none")
  columns = 2 if len(quantities) == 4 else min(3, len(quantities))
  lines = -(-len(quantities) // columns)
  figure = Figure(figsize=(WIDTH, 0.5 + 2.5 * lines), layout="constrained")
  panels = figure.subplots(lines, columns, squeeze=False).ravel()
  places = sorted({row["x"] for row in rows})
  names = [(ticks or {}).get(place, f"{place:,g}") for place in places]
  series = list(dict.fromkeys(row["series"] for row in rows))
  for axes, quantity in zip(panels, quantities, strict=False):
    for colour, name in zip(COLOURS, series, strict=False):
      own = sorted((row for row in rows if row["series"] == name), key=lambda row: row["x"])
      values = [row[quantity.key] * quantity.factor for row in own]
      at = [places.index(row["x"]) for row in own]
      axes.plot(at, values, "o-", color=colour, label=name, markersize=4, linewidth=1.4)
    if chosen in places:
      axes.axvline(places.index(chosen), color=GREY, linestyle=":", zorder=0)
    axes.set_xticks(range(len(places)), names, fontsize=8)
    axes.set_title(quantity.label, fontsize=9)
    highest = max(row[quantity.key] for row in rows) * quantity.factor
    axes.set_ylim(0, 1.1 * highest or 1)
    _bare(axes)
  for axes in panels[len(quantities) :]:
    axes.set_visible(False)
  if len(series) > 1:
    panels[0].legend(fontsize=8, frameon=False)
  figure.supxlabel(
    x_label + ("; dotted: as run file and scenario have it" if chosen in places else ""), fontsize=9
  )
  figure.suptitle(title, fontsize=10)
  return figure


def _bare(axes: Axes, *, grid: bool = True) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  if grid:
    axes.grid(alpha=0.25)
