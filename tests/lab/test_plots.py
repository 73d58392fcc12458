"""The lab's pictures show the numbers they are given, labelled."""

import io

import matplotlib
import numpy as np
import pytest

from intellect3.lab import plots, statistics

PLACES = [0, 1, 16]
LINES = {
  "first": statistics.over_seeds(PLACES, np.array([[1.0, 2.0, 3.0], [1.0, 4.0, 5.0]])),
  "second": statistics.exact(PLACES, [5.0, 6.0, 7.0]),
}
WORDS = {"title": "What it says", "x_label": "staleness (versions)", "y_label": "return"}


def panels(figure):
  return [axes for axes in figure.axes if axes.get_visible() and axes.get_title(loc="left")]


def texts(axes):
  return [text.get_text() for text in axes.texts]


def drawn(figure):
  """The figure as an image, which also lays it out."""
  figure.savefig(file := io.BytesIO(), format="png")
  return file.getvalue()


def test_small_multiples_show_each_line_in_its_own_panel():
  figure = plots.small_multiples(LINES, references={"best": 6.5}, columns=2, **WORDS)
  first, second = panels(figure)
  assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["first", "second"]
  for axes, own in ((first, "first"), (second, "second")):
    (line,) = [line for line in axes.lines if line.get_color() == plots.BLUE]
    assert line.get_ydata().tolist() == LINES[own].mean.tolist()
    assert line.get_xdata().tolist() == [0, 1, 2]  # 16 stands beside 1
    (grey,) = [line for line in axes.lines if line.get_color() == plots.GREY]
    assert grey.get_ydata().tolist() != LINES[own].mean.tolist()
  band = first.collections[0].get_paths()[0].vertices[:, 1]
  np.testing.assert_allclose(
    [band.min(), band.max()], [LINES["first"].low.min(), LINES["first"].high.max()]
  )
  assert texts(first) == ["best"] and texts(second) == []
  assert figure.get_suptitle() == WORDS["title"]
  assert (figure.get_supxlabel(), figure.get_supylabel()) == ("staleness (versions)", "return")
  assert len(drawn(figure)) > 5000
  assert [label.get_text() for label in second.get_xticklabels()] == ["0", "1", "16"]


def test_the_places_of_curves_are_numbers():
  figure = plots.line_panels({"a": LINES, "b": LINES}, line_label="data", **WORDS)
  first = panels(figure)[0]
  dark, light = first.lines[:2]
  assert dark.get_xdata().tolist() == PLACES
  assert light.get_ydata().tolist() == LINES["second"].mean.tolist()
  (legend,) = figure.legends
  assert legend.get_title().get_text() == "data"
  assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]
  with pytest.raises(ValueError, match=r"panels\['b'\]: expected the lines"):
    plots.line_panels({"a": LINES, "b": {"second": LINES["second"]}}, line_label="", **WORDS)


def test_an_empty_place_in_the_grid_shows_nothing():
  three = {name: LINES["second"] for name in "abc"}
  figure = plots.small_multiples(three, columns=2, **WORDS)
  assert len(panels(figure)) == 3 and len(figure.axes) == 4
  assert not figure.axes[3].get_visible()
  assert figure.axes[1].xaxis.get_tick_params()["labelbottom"]  # nothing below it tells its places


def test_heatmap_writes_its_numbers_legibly():
  figure = plots.heatmap(
    np.array([[0.0, 0.5], [np.nan, 1.0]]),
    rows=["a", "b"],
    columns=["0", "1"],
    title="t",
    x_label="x",
    colour_label="share",
    colour_limits=(0, 1),
  )
  axes = figure.axes[0]
  assert texts(axes) == ["0.00", "0.50", "1.00"]
  assert [text.get_color() for text in axes.texts][::2] == ["white", "black"]
  assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
  with pytest.raises(ValueError, match=r"values: expected \[1, 2\], got \[2, 2\]"):
    plots.heatmap(
      np.ones((2, 2)), rows=["a"], columns=["0", "1"], title="", x_label="", colour_label="",
      colour_limits=(0, 1),
    )  # fmt: skip


def test_the_scale_gets_lighter_step_by_step():
  red, green, blue = np.array([matplotlib.colors.to_rgb(c) for c in plots.scale(6)]).T
  lightness = 0.299 * red + 0.587 * green + 0.114 * blue
  assert np.all(np.diff(lightness) > 0.05)


def test_nothing_to_draw_raises():
  with pytest.raises(ValueError, match="series: expected at least one line"):
    plots.small_multiples({}, **WORDS)
