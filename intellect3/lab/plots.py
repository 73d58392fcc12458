"""Pictures of lines with bands that a person can read without the text.

Place in the ring: in the lab, called by its notebooks. Small multiples instead of tangles: a panel
shows its own line in colour and the others in grey. A legend says what lines and bands are, the
axis where places are not to scale; colours are those of Okabe and Ito (2008), or a scale of even
lightness, so that the colour-blind can tell them apart.
Figures are returned, not registered anywhere: a notebook shows them, `savefig` writes them.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from intellect3.lab import statistics

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#BBBBBB"
PANEL = (2.9, 2.3)
MOST_TICKS = 8
NOT_TO_SCALE = "spacing not to scale"

Limits = tuple[float | None, float | None]


def small_multiples(
  series: Mapping[str, statistics.Series],
  *,
  title: str,
  x_label: str,
  y_label: str,
  references: Mapping[str, float] | None = None,
  columns: int = 4,
  ordinal: bool = True,
  y_scale: str = "linear",
  y_limits: Limits | None = None,
  kind: str = "loss",
) -> Figure:
  """One panel per line, the other lines in grey behind it, all on the same axes.

  Args:
    series: the lines by name; a name titles its panel.
    title: what the figure says.
    x_label: what x is, with its unit.
    y_label: what y is, with its unit.
    references: levels by label, dotted across every panel and labelled in the first.
    columns: panels a row.
    ordinal: the places are evenly spaced, whatever they are (0, 1, 2, 4, 8, 16); the axis says so
      where that is not to scale. Otherwise the axis is linear, marked at the places if few.
    y_scale: "linear", "log" or "symlog".
    y_limits: of all panels; None, or None for an end, takes the lines' own.
    kind: what a panel is one of, for the legend.

  Raises:
    ValueError: where there is no line.
  """
  lines = list(series.values())
  ticks = _places(lines)
  figure, panels = _grid(list(series), columns, title, _x_label(x_label, ticks, ordinal), y_label)
  for axes, name in zip(panels, series, strict=True):
    for other, line in series.items():
      if other != name:
        axes.plot(_x(line.x, ticks, ordinal), line.mean, color=GREY, linewidth=0.8, zorder=1)
    _line(axes, series[name], BLUE, ticks, ordinal)
    _references(axes, references or {}, labelled=axes is panels[0])
    _axes(axes, name, ticks, ordinal, y_scale)
  _limit(panels, y_limits)
  handles: list[Artist] = [Line2D([], [], color=BLUE, linewidth=1.8, label=f"the {kind} named")]
  if len(lines) > 1:
    handles.append(Line2D([], [], color=GREY, linewidth=1.2, label="grey: the others"))
  if band := _band(lines):
    handles.append(Patch(color=BLUE, alpha=0.22, linewidth=0, label=f"band: {band}"))
  figure.legend(
    handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9
  )
  return figure


def line_panels(
  panels: Mapping[str, Mapping[str, statistics.Series]],
  *,
  title: str,
  x_label: str,
  y_label: str,
  line_label: str,
  references: Mapping[str, float] | None = None,
  columns: int = 4,
  ordinal: bool = False,
  y_scale: str = "linear",
  y_limits: Limits | None = None,
  bands: bool = True,
) -> Figure:
  """One panel per name with several ordered lines, e.g. a training curve per staleness.

  The lines' order is a scale (dark to light), the same in every panel, told by one legend.

  Args:
    panels: per panel its lines by label; every panel has the labels of the first, in order.
    line_label: what the labels are, with its unit; titles the legend, which also says what lines
      and bands are.
    bands: whether intervals are drawn; those of many lines hide each other.

  Others and Raises: as in `small_multiples`; ValueError also where the labels differ.
  """
  every = [line for lines in panels.values() for line in lines.values()]
  ticks = _places(every)
  figure, grid = _grid(list(panels), columns, title, _x_label(x_label, ticks, ordinal), y_label)
  labels = list(next(iter(panels.values())))
  colours = scale(len(labels))
  for axes, (name, lines) in zip(grid, panels.items(), strict=True):
    if list(lines) != labels:
      raise ValueError(f"panels[{name!r}]: expected the lines {labels}, got {list(lines)}")
    for colour, line in zip(colours, lines.values(), strict=True):
      _line(axes, line, colour, ticks, ordinal, marker=ordinal, band=bands)
    _references(axes, references or {}, labelled=axes is grid[0])
    _axes(axes, name, ticks, ordinal, y_scale)
  _limit(grid, y_limits)
  handles: list[Artist] = [
    Line2D([], [], color=colour, linewidth=2.5, label=label)
    for colour, label in zip(colours, labels, strict=True)
  ]
  if seeds := _seeds(every):
    handles.append(Line2D([], [], linewidth=0, label=f"line: mean of\n{seeds}"))
  if bands and _band(every):
    handles.append(Patch(color=GREY, alpha=0.5, linewidth=0, label="band: 95%\ninterval"))
  figure.legend(handles=handles, title=line_label, loc="outside right center", frameon=False)
  return figure


def heatmap(
  values: np.ndarray,
  *,
  rows: Sequence[str],
  columns: Sequence[str],
  title: str,
  x_label: str,
  colour_label: str,
  colour_limits: tuple[float, float],
  diverging: bool = False,
  digits: int = 2,
) -> Figure:
  """A table whose cells are coloured by their number; NaN is an empty cell.

  Args:
    values: float [rows, columns].
    rows: a label per row.
    columns: a label per column.
    colour_label: what the numbers are, with their unit.
    colour_limits: the ends of the colour scale; cells beyond take the colour of the end.
    diverging: two colours away from the middle instead of one lightness.

  Raises:
    ValueError: where the labels do not fit the values.
  """
  array = np.asarray(values, np.float64)
  if array.shape != (len(rows), len(columns)):
    raise ValueError(f"values: expected [{len(rows)}, {len(columns)}], got {list(array.shape)}")
  figure = Figure(figsize=(3.6 + 0.75 * len(columns), 1.4 + 0.34 * len(rows)), layout="constrained")
  axes = figure.add_subplot()
  low, high = colour_limits
  palette = matplotlib.colormaps["PuOr" if diverging else "cividis"]
  image = axes.imshow(array, cmap=palette, vmin=low, vmax=high, aspect="auto")
  for row, column in np.ndindex(array.shape):
    number = array[row, column]
    if np.isnan(number):
      continue
    red, green, blue, _ = palette(np.clip((number - low) / (high - low), 0, 1))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    text = f"{number:.{digits}f}"
    axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
  axes.set_xticks(range(len(columns)), columns)
  axes.set_yticks(range(len(rows)), rows)
  axes.set_xlabel(x_label)
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
  axes.tick_params(length=0)
  for spine in axes.spines.values():
    spine.set_visible(False)
  figure.colorbar(image, ax=axes, label=colour_label, extend=_extend(array, low, high))
  return figure


def scale(count: int) -> list[str]:
  """`count` colours from dark to light, distinct in grey print too."""
  palette = matplotlib.colormaps["viridis"]
  places = np.linspace(0.0, 0.82, count)
  return [matplotlib.colors.to_hex(palette(place)) for place in places]


def _grid(
  names: Sequence[str], columns: int, title: str, x_label: str, y_label: str
) -> tuple[Figure, list[Axes]]:
  columns = min(columns, len(names))
  rows = -(-len(names) // columns)
  size = (1.2 + PANEL[0] * columns, 0.9 + PANEL[1] * rows)
  figure = Figure(figsize=size, layout="constrained")
  grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
  for axes in grid[len(names) :]:
    axes.set_visible(False)
  # A panel above an empty place shows its own tick labels.
  for index, axes in enumerate(grid[: len(names)]):
    axes.tick_params(labelbottom=index + columns >= len(names))
  figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
  figure.supxlabel(x_label, fontsize=10)
  figure.supylabel(y_label, fontsize=10)
  return figure, list(grid[: len(names)])


def _extend(values: np.ndarray, low: float, high: float) -> str:
  """Which ends of the colour scale stand for numbers beyond them; rounding is not beyond."""
  rounding = 1e-5 * (high - low)
  below, above = np.nanmin(values) < low - rounding, np.nanmax(values) > high + rounding
  return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def _seeds(lines: Sequence[statistics.Series]) -> str:
  """How many seeds the means are of, e.g. "10 seeds" or "2 to 3 seeds"; empty where none is one."""
  counts = np.concatenate([line.counts for line in lines])
  if not np.any(counts):
    return ""
  least, most = counts[counts > 0].min(), counts.max()
  return f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"


def _band(lines: Sequence[statistics.Series]) -> str:
  """What bands are; empty where there is none."""
  if all(np.isnan(line.low).all() for line in lines):
    return ""
  return f"95% interval, {_seeds(lines)}"


def _x_label(label: str, ticks: np.ndarray, ordinal: bool) -> str:
  gaps = np.diff(ticks)
  even = gaps.size == 0 or np.allclose(gaps, gaps[0])
  return label if even or not ordinal else f"{label}; {NOT_TO_SCALE}"


def _limit(panels: Sequence[Axes], limits: Limits | None) -> None:
  """After everything is drawn: an end that is None is that of all lines."""
  if limits is not None:
    panels[0].set_ylim(*limits)


def _places(lines: Sequence[statistics.Series]) -> np.ndarray:
  if not lines:
    raise ValueError("series: expected at least one line, got none")
  return np.unique(np.concatenate([line.x for line in lines]))


def _x(x: np.ndarray, ticks: np.ndarray, ordinal: bool) -> np.ndarray:
  return np.searchsorted(ticks, x).astype(np.float64) if ordinal else x


def _line(
  axes: Axes,
  line: statistics.Series,
  colour: str,
  ticks: np.ndarray,
  ordinal: bool,
  marker: bool = True,
  band: bool = True,
) -> None:
  x = _x(line.x, ticks, ordinal)
  if band:
    axes.fill_between(x, line.low, line.high, color=colour, alpha=0.22, linewidth=0, zorder=2)
  symbol = "o" if marker else ""
  axes.plot(x, line.mean, color=colour, linewidth=1.8, zorder=3, marker=symbol, markersize=3.5)


def _references(axes: Axes, references: Mapping[str, float], labelled: bool) -> None:
  for label, level in references.items():
    axes.axhline(level, color="black", linewidth=0.9, linestyle=":", zorder=1)
    if labelled:
      axes.annotate(
        label,
        (0.02, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=8,
        va="bottom",
        bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
      )


def _axes(
  axes: Axes,
  name: str,
  ticks: np.ndarray,
  ordinal: bool,
  y_scale: str,
) -> None:
  axes.set_title(name, fontsize=10, loc="left")
  axes.set_yscale(y_scale)
  if ordinal:
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(ticks)))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(ticks)), [f"{place:g}" for place in ticks])
  elif len(ticks) <= MOST_TICKS:
    axes.set_xticks(ticks, [f"{place:g}" for place in ticks])
  axes.grid(axis="y", color="#E6E6E6", linewidth=0.7, zorder=0)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
