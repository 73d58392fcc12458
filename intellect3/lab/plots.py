"""Pictures of lines with bands that a person can read without the text.

Place in the ring: in the lab, called by its notebooks. Small multiples instead of tangles: a panel
shows its own line in colour and the others in grey. Labels stand at the lines; colours are those of
Okabe and Ito (2008), or a scale of even lightness, so that the colour-blind can tell them apart.
Figures are returned, not registered anywhere: a notebook shows them, `savefig` writes them.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from intellect3.lab import statistics

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#BBBBBB"
PANEL = (2.9, 2.3)


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
  y_limits: tuple[float, float] | None = None,
) -> Figure:
  """One panel per line, the other lines in grey behind it, all on the same axes.

  Args:
    series: the lines by name; a name titles its panel.
    title: what the figure says.
    x_label: what x is, with its unit.
    y_label: what y is, with its unit.
    references: levels by label, dotted across every panel and labelled in the first.
    columns: panels a row.
    ordinal: the places are evenly spaced, whatever they are (0, 1, 2, 4, 8, 16).
    y_scale: "linear", "log" or "symlog".
    y_limits: of all panels; None takes the lines' own.

  Raises:
    ValueError: where there is no line.
  """
  figure, panels = _grid(list(series), columns, title, x_label, y_label)
  ticks = _places(list(series.values()))
  for axes, name in zip(panels, series, strict=True):
    for other, line in series.items():
      if other != name:
        axes.plot(_x(line.x, ticks, ordinal), line.mean, color=GREY, linewidth=0.8, zorder=1)
    _line(axes, series[name], BLUE, ticks, ordinal)
    _references(axes, references or {}, labelled=axes is panels[0])
    _axes(axes, name, ticks, ordinal, y_scale, y_limits)
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
  y_limits: tuple[float, float] | None = None,
) -> Figure:
  """One panel per name with several ordered lines, e.g. a training curve per staleness.

  The lines' order is a scale (dark to light), the same in every panel, told by one legend.

  Args:
    panels: per panel its lines by label; every panel has the labels of the first, in order.
    line_label: what the labels are, with its unit; titles the legend.

  Others and Raises: as in `small_multiples`; ValueError also where the labels differ.
  """
  figure, grid = _grid(list(panels), columns, title, x_label, y_label)
  labels = list(next(iter(panels.values())))
  colours = scale(len(labels))
  ticks = _places([line for lines in panels.values() for line in lines.values()])
  for axes, (name, lines) in zip(grid, panels.items(), strict=True):
    if list(lines) != labels:
      raise ValueError(f"panels[{name!r}]: expected the lines {labels}, got {list(lines)}")
    for colour, line in zip(colours, lines.values(), strict=True):
      _line(axes, line, colour, ticks, ordinal, marker=ordinal)
    _references(axes, references or {}, labelled=axes is grid[0])
    _axes(axes, name, ticks, ordinal, y_scale, y_limits)
  handles = [
    matplotlib.lines.Line2D([], [], color=colour, linewidth=2.5, label=label)
    for colour, label in zip(colours, labels, strict=True)
  ]
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
  figure.colorbar(image, ax=axes, label=colour_label, extend="both")
  return figure


def scale(count: int) -> list[str]:
  """`count` colours from dark to light, distinct in grey print too."""
  palette = matplotlib.colormaps["viridis"]
  places = np.linspace(0.0, 0.82, count)
  return [matplotlib.colors.to_hex(palette(place)) for place in places]


def _grid(
  names: Sequence[str], columns: int, title: str, x_label: str, y_label: str
) -> tuple[Figure, list[Axes]]:
  if not names:
    raise ValueError("series: expected at least one line, got none")
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


def _places(lines: Sequence[statistics.Series]) -> np.ndarray:
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
) -> None:
  x = _x(line.x, ticks, ordinal)
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
  y_limits: tuple[float, float] | None,
) -> None:
  axes.set_title(name, fontsize=10, loc="left")
  axes.set_yscale(y_scale)
  if y_limits is not None:
    axes.set_ylim(*y_limits)
  if ordinal:
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(ticks)))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(ticks)), [f"{place:g}" for place in ticks])
  axes.grid(axis="y", color="#E6E6E6", linewidth=0.7, zorder=0)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
