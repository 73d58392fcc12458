"""What a sweep of real runs measured: one JSON file, written point by point.

Place in the ring: in the lab. `ring` writes the file while it sweeps; the notebook reads it. A
point is one run: a loss, how many versions its servers lagged, a seed. Nothing here starts
anything.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from intellect3 import telemetry
from intellect3.lab import statistics

TRAINER_CURVES = (
  "token_staleness_mean",
  "mismatch_kl",
  "effective_sample_share",
  "masked_share",
  "sequence_masked_share",
  "grad_norm",
  "entropy",
)
"""Metrics of a run's trainer that a point keeps, a number a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """One run.

  Attributes:
    loss: its name in the sweep.
    lag: versions that the servers were kept behind; the staleness of every step after the first.
    seed: of the run.
    error: why the run failed, in one line; None where it ended well.
    seconds: from the command's start to its end.
    eval_start: held-out tasks solved greedily before the first step, a share; None where the run
      failed before.
    eval_end: the same after the last step.
    curves: by name one number a step, None where a step has none: `reward` (sampled, on fresh
      tasks, mean of the step's groups) and those of `TRAINER_CURVES`.
  """

  loss: str
  lag: int
  seed: int
  error: str | None
  seconds: float
  eval_start: float | None
  eval_end: float | None
  curves: Mapping[str, Sequence[float | None]]

  @property
  def key(self) -> tuple[str, int, int]:
    """What tells a point from the others of a sweep."""
    return self.loss, self.lag, self.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """A sweep as far as it got.

  Attributes:
    settings: what all points have in common, JSON-able; a sweep goes on only where it is the same.
    made_on: where and when: versions, device, date.
    results: the points, in the order in which they were measured.
  """

  settings: Mapping[str, Any]
  made_on: Mapping[str, Any]
  results: Sequence[Result]


def gather(
  run_dir: pathlib.Path, *, loss: str, lag: int, seed: int, error: str | None, seconds: float
) -> Result:
  """Reads a point from the metrics files of its run, be it whole or broken off."""
  trainer = telemetry.read_metrics(telemetry.metrics_path(run_dir, "trainer"))
  orchestrator = telemetry.read_metrics(telemetry.metrics_path(run_dir, "orchestrator"))
  evaluation = telemetry.read_metrics(telemetry.metrics_path(run_dir, "evaluation"))
  return Result(
    loss=loss,
    lag=lag,
    seed=seed,
    error=error,
    seconds=seconds,
    eval_start=evaluation[0].get("reward") if evaluation else None,
    eval_end=evaluation[-1].get("reward") if len(evaluation) > 1 else None,
    curves={
      "reward": [row.get("reward") for row in orchestrator],
      **{name: [row.get(name) for row in trainer] for name in TRAINER_CURVES},
    },
  )


def read(path: pathlib.Path) -> Results:
  """Reads a results file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not one.
  """
  try:
    told = json.loads(path.read_text())
    results = [Result(**point) for point in told["results"]]
    return Results(settings=told["settings"], made_on=told["made_on"], results=results)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: expected the results of a sweep, got {error!r}") from error


def write(path: pathlib.Path, results: Results) -> None:
  """Writes a results file by a rename, so that it is never half written."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
  temporary.rename(path)


def points(
  results: Iterable[Result], value: Callable[[Result], float | None]
) -> list[statistics.Point]:
  """One number of every run that ended well, for statistics and plots.

  Args:
    results: of a sweep.
    value: of a run; None leaves it out.
  """
  found = ((result, value(result)) for result in results if result.error is None)
  return [
    statistics.Point(result.loss, float(result.lag), result.seed, number)
    for result, number in found
    if number is not None
  ]


def mean_of(name: str, *, last: int | None = None) -> Callable[[Result], float | None]:
  """A value for `points`: the mean of a curve over its steps, or over the last of them.

  None where no step has the number.
  """

  def value(result: Result) -> float | None:
    curve = result.curves[name] if last is None else result.curves[name][-last:]
    numbers = [number for number in curve if number is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None

  return value


def final(result: Result) -> float | None:
  """A value for `points`: held-out tasks solved greedily after the last step, a share."""
  return result.eval_end


def by_lag(
  results: Sequence[Result], value: Callable[[Result], float | None]
) -> dict[str, statistics.Series]:
  """One number of every run over the lags, with its interval over seeds: a line per loss.

  Args:
    results: of a sweep; runs that failed are left out.
    value: of a run; None leaves it out.

  Returns:
    Every line has every lag of the results; it is NaN where no run has the number.
  """
  lags = np.asarray(sorted({float(result.lag) for result in results}))
  lines = {}
  for loss, line in statistics.by_staleness(points(results, value)).items():
    places = np.searchsorted(lags, line.x)
    filled = {}
    for name in ("mean", "low", "high"):
      filled[name] = np.full(lags.shape, np.nan)
      filled[name][places] = getattr(line, name)
    counts = np.zeros(lags.shape, np.int64)
    counts[places] = line.counts
    lines[loss] = statistics.Series(x=lags, **filled, counts=counts)
  return lines


def curves(
  results: Iterable[Result], name: str, *, smooth: int = 1
) -> dict[str, dict[str, statistics.Series]]:
  """A metric over the steps with its interval over seeds: by loss, then by lag.

  Args:
    results: of a sweep; runs that failed are left out.
    name: of the curve.
    smooth: steps in a running mean, which begins as soon as there is one step.

  Returns:
    Every loss has the same lags; one whose runs all failed, or are not made yet, is NaN there.

  Raises:
    ValueError: runs of one loss and lag have different numbers of steps, or a step has no number.
  """
  if smooth < 1:
    raise ValueError(f"smooth: expected at least 1, got {smooth}")
  grouped: dict[str, dict[int, list[Sequence[float]]]] = {}
  for result in results:
    if result.error is None:
      told = result.curves[name]
      numbers = [number for number in told if number is not None]
      if len(numbers) != len(told):
        raise ValueError(f"curves[{name!r}] of {result.key}: expected a number a step, got None")
      grouped.setdefault(result.loss, {}).setdefault(result.lag, []).append(
        _smoothed(numbers, smooth)
      )
  lags = sorted({lag for by_lag in grouped.values() for lag in by_lag})
  steps = max(
    (len(run) for by_lag in grouped.values() for runs in by_lag.values() for run in runs), default=0
  )
  return {
    loss: {f"{lag}": _over_seeds(by_lag.get(lag), steps) for lag in lags}
    for loss, by_lag in grouped.items()
  }


def median_seconds(results: Sequence[Result]) -> float:
  """How long a run took, its start and its compilations included.

  Raises:
    ValueError: there is no run.
  """
  if not results:
    raise ValueError("results: expected at least one run, got none")
  return float(np.median([result.seconds for result in results]))


def failures(results: Iterable[Result]) -> list[str]:
  """The runs that failed, a line each."""
  return [
    f"{result.loss}, lag {result.lag}, seed {result.seed}: {result.error}"
    for result in results
    if result.error is not None
  ]


def _over_seeds(runs: Sequence[Sequence[float]] | None, steps: int) -> statistics.Series:
  x = range(1, steps + 1)
  if runs is None:
    return statistics.exact(x, np.full(steps, np.nan))
  return statistics.over_seeds(x, np.asarray(runs, np.float64))


def _smoothed(values: Sequence[float], steps: int) -> list[float]:
  windows = (values[max(0, end - steps) : end] for end in range(1, len(values) + 1))
  return [math.fsum(window) / len(window) for window in windows]
