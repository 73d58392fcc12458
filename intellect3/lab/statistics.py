"""From measured points to means with 95% intervals.

Place in the ring: in the lab, between an experiment and its plots. NumPy only; nothing here knows
what was measured.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True)
class Point:
  """One measurement: a correction, how stale its data were, the seed, and what came out."""

  loss: str
  staleness: float
  seed: int
  value: float


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its two-sided confidence interval; `low` and `high` are NaN for a single value."""

  mean: float
  low: float
  high: float
  count: int


@dataclasses.dataclass(frozen=True)
class Series:
  """A line with a band.

  Attributes:
    x: float64[K], ascending.
    mean: float64[K].
    low: float64[K], NaN where there is no interval.
    high: float64[K], NaN where there is no interval.
    counts: int64[K], how many values the mean is of; 0 where the number is no mean.
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  counts: np.ndarray


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
  """The mean of independent values and Student's interval of it.

    mean +- t_{(1 + confidence) / 2, n - 1} s / sqrt(n),  s^2 the unbiased sample variance

  Args:
    values: n >= 1 finite numbers.
    confidence: the coverage, in (0, 1).

  Raises:
    ValueError: where there is no value, one is not finite (count failed runs, do not average
      them), or the confidence is out of range.
  """
  if not 0 < confidence < 1:
    raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
  array = np.asarray(list(values), np.float64)
  if array.size == 0:
    raise ValueError("values: expected at least one, got none")
  if not np.all(np.isfinite(array)):
    raise ValueError(f"values: expected finite numbers, got {array.tolist()}")
  mean = float(np.mean(array))
  if array.size == 1:
    return Interval(mean, float("nan"), float("nan"), 1)
  error = float(np.std(array, ddof=1)) / np.sqrt(array.size)
  half = float(special.stdtrit(array.size - 1, (1 + confidence) / 2)) * error
  return Interval(mean, mean - half, mean + half, int(array.size))


def over_seeds(x: Sequence[float] | np.ndarray, values_SK: np.ndarray) -> Series:
  """The line of S seeds measured at K places, e.g. a training curve.

  Raises:
    ValueError: where the second axis of the values is not as long as x, or a value is not finite.
  """
  places = np.asarray(x, np.float64)
  array = np.asarray(values_SK, np.float64)
  if array.ndim != 2 or array.shape[1] != places.size:
    raise ValueError(f"values_SK: expected [seeds, {places.size}], got {list(array.shape)}")
  return _series(places, [mean_interval(column) for column in array.T])


def exact(x: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Series:
  """A line without a band: quantities that are computed, not sampled.

  Raises:
    ValueError: where the lengths differ.
  """
  places, array = np.asarray(x, np.float64), np.asarray(values, np.float64)
  if places.shape != array.shape or places.ndim != 1:
    raise ValueError(f"values: expected {list(places.shape)} numbers, got {list(array.shape)}")
  none = np.full_like(array, np.nan)
  return Series(places, array, none, none, np.zeros(array.shape, np.int64))


def by_staleness(points: Iterable[Point]) -> dict[str, Series]:
  """One line per loss, in the order in which the losses first appear, staleness ascending."""
  groups: dict[str, dict[float, list[float]]] = {}
  for point in points:
    groups.setdefault(point.loss, {}).setdefault(point.staleness, []).append(point.value)
  return {
    loss: _series(
      np.asarray(sorted(cells), np.float64), [mean_interval(cells[s]) for s in sorted(cells)]
    )
    for loss, cells in groups.items()
  }


def differences(points: Iterable[Point], baseline: str) -> list[Point]:
  """Each point minus the baseline's of the same staleness and seed: paired, so seeds cancel.

  Raises:
    ValueError: where the baseline lacks a staleness and seed that another loss has.
  """
  points = list(points)
  reference = {(p.staleness, p.seed): p.value for p in points if p.loss == baseline}
  result = []
  for point in points:
    if point.loss == baseline:
      continue
    if (point.staleness, point.seed) not in reference:
      raise ValueError(
        f"baseline: expected {baseline!r} at staleness {point.staleness:g}, seed {point.seed} as "
        f"measured for {point.loss!r}, got no such point"
      )
    value = point.value - reference[point.staleness, point.seed]
    result.append(dataclasses.replace(point, value=value))
  return result


def markdown_table(
  series: Mapping[str, Series], *, corner: str = "loss \\ staleness", digits: int = 2
) -> str:
  """A Markdown table, a row a loss and a column a place: `mean` or `mean ± half the interval`.

  Raises:
    ValueError: where the lines are not measured at the same places.
  """
  lines = list(series.values())
  if not lines:
    raise ValueError("series: expected at least one line, got none")
  if any(not np.array_equal(line.x, lines[0].x) for line in lines):
    raise ValueError("series: expected one set of places for all lines, got several")
  table = [[corner, *(f"{x:g}" for x in lines[0].x)], ["---"] + ["---:"] * len(lines[0].x)]
  for name, line in series.items():
    cells = []
    for mean, low, high in zip(line.mean, line.low, line.high, strict=True):
      half = "" if np.isnan(low) else f" ± {(high - low) / 2:.{digits}f}"
      cells.append(f"{mean:.{digits}f}{half}")
    table.append([name, *cells])
  return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _series(x: np.ndarray, intervals: Sequence[Interval]) -> Series:
  return Series(
    x,
    np.asarray([interval.mean for interval in intervals]),
    np.asarray([interval.low for interval in intervals]),
    np.asarray([interval.high for interval in intervals]),
    np.asarray([interval.count for interval in intervals]),
  )
