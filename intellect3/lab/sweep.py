"""The exact half's sweep: every correction in every cell, and what to read off it.

Place in the ring: in the lab, between `training` and `statistics`; the notebook calls it.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from intellect3.lab import policy, statistics, training

COLLAPSE = 0.5
BASELINE = "masked_importance"


def baseline(losses: Sequence[str]) -> str:
  """What others are compared with: INTELLECT-3's loss, or the first where that is not there."""
  return BASELINE if BASELINE in losses else losses[0]


def run(
  problems: Sequence[policy.Problem],
  losses: Mapping[str, training.LossFn],
  *,
  cells: Sequence[training.Cell],
  settings: training.Settings,
  report: Callable[[str], None] = print,
) -> dict[str, training.Run]:
  """Trains with each loss in turn and reports the seconds each took (compilation included).

  Args, Raises: as in `training.train`, which see for the pairing of seeds and problems.
  """
  runs = {}
  for name, loss_fn in losses.items():
    begin = time.monotonic()
    runs[name] = training.train(problems, loss_fn, cells=cells, settings=settings)
    report(f"{name}: {len(cells)} x {len(problems)} runs in {time.monotonic() - begin:.0f} s")
  return runs


def final_return(run: training.Run) -> np.ndarray:
  """The exact return of the last version, [C, S]."""
  return run.returns_CSE[:, :, -1]


def average_return(run: training.Run) -> np.ndarray:
  """The mean of the return over the evaluated versions: the area under the curve, [C, S]."""
  return run.returns_CSE.mean(axis=2)


def collapsed(returns: Mapping[str, np.ndarray], reference_S: np.ndarray) -> dict[str, np.ndarray]:
  """Which runs ended below half of the reference, their seed's on-policy return: bool [C, S]."""
  return {loss: final_CS < COLLAPSE * reference_S for loss, final_CS in returns.items()}


def unique(cells: Sequence[training.Cell]) -> list[training.Cell]:
  """The cells, each once, in order: several questions may share some."""
  return list(dict.fromkeys(cells))


def take(
  values: Mapping[str, np.ndarray], cells: Sequence[training.Cell], wanted: Sequence[training.Cell]
) -> dict[str, np.ndarray]:
  """The rows of the wanted cells, in their order, of arrays [C, ...] by loss.

  Raises:
    ValueError: where a wanted cell is not among the cells.
  """
  for cell in wanted:
    if cell not in cells:
      raise ValueError(f"wanted: expected cells of the sweep, got {cell}")
  rows = [list(cells).index(cell) for cell in wanted]
  return {loss: np.asarray(array)[rows] for loss, array in values.items()}


def points(values: Mapping[str, np.ndarray], places: Sequence[float]) -> list[statistics.Point]:
  """Points of arrays [K, S] by loss; row k stands at `places[k]` (a staleness, as a rule).

  Raises:
    ValueError: where an array has not as many rows as there are places.
  """
  result = []
  for loss, values_KS in values.items():
    if values_KS.ndim != 2 or values_KS.shape[0] != len(places):
      raise ValueError(
        f"values[{loss!r}]: expected [{len(places)}, seeds], got {list(values_KS.shape)}"
      )
    for (row, seed), value in np.ndenumerate(values_KS):
      result.append(statistics.Point(loss, float(places[row]), int(seed), float(value)))
  return result


def series(
  values: Mapping[str, np.ndarray], places: Sequence[float]
) -> dict[str, statistics.Series]:
  """Lines with 95% intervals of arrays [K, S] by loss; see `points`."""
  return statistics.by_staleness(points(values, places))


def against(
  values: Mapping[str, np.ndarray], places: Sequence[float]
) -> dict[str, statistics.Series]:
  """Lines of the differences to `baseline`'s, paired by seed; see `points`."""
  measured = points(values, places)
  return statistics.by_staleness(statistics.differences(measured, baseline(list(values))))


def counts(
  values: Mapping[str, np.ndarray], places: Sequence[float]
) -> dict[str, statistics.Series]:
  """How many seeds are true, of bool arrays [K, S] by loss: lines without intervals."""
  return {loss: statistics.exact(places, np.sum(array, axis=1)) for loss, array in values.items()}


def means(values: Mapping[str, np.ndarray]) -> np.ndarray:
  """The means over seeds of arrays [K, S] by loss, [loss, K]."""
  return np.stack([np.asarray(values_KS).mean(axis=1) for values_KS in values.values()])


def curves(
  returns: Mapping[str, np.ndarray], versions: np.ndarray, places: Sequence[float]
) -> dict[str, dict[str, statistics.Series]]:
  """Training curves of arrays [K, S, E] by loss: a line per place, over the versions [E]."""
  return {
    loss: {
      f"{place:g}": statistics.over_seeds(versions, returns_SE)
      for place, returns_SE in zip(places, returns_KSE, strict=True)
    }
    for loss, returns_KSE in returns.items()
  }


def beside(
  lines: Mapping[str, Mapping[str, statistics.Series]],
) -> dict[str, dict[str, statistics.Series]]:
  """Turns label -> loss -> line round into loss -> label -> line, for `plots.line_panels`."""
  losses = next(iter(lines.values()))
  return {loss: {label: by_loss[loss] for label, by_loss in lines.items()} for loss in losses}
