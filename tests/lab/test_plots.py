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


def legend(figure):
  (one,) = figure.legends
  return [text.get_text() for text in one.get_texts()]


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
  assert legend(figure) == ["the loss named", "grey: the others", "band: 95% interval, 2 seeds"]
  assert figure.get_suptitle() == WORDS["title"]
  axis = "staleness (versions); spacing not to scale"
  assert (figure.get_supxlabel(), figure.get_supylabel()) == (axis, "return")
  assert len(drawn(figure)) > 5000
  assert [label.get_text() for label in second.get_xticklabels()] == ["0", "1", "16"]


def test_the_places_of_curves_are_numbers():
  figure = plots.line_panels({"a": LINES, "b": LINES}, line_label="data", **WORDS)
  first = panels(figure)[0]
  dark, light = first.lines[:2]
  assert dark.get_xdata().tolist() == PLACES
  assert light.get_ydata().tolist() == LINES["second"].mean.tolist()
  assert figure.get_supxlabel() == "staleness (versions)"  # it is to scale
  assert figure.legends[0].get_title().get_text() == "data"
  band = "band: 95%\ninterval"
  assert legend(figure) == ["first", "second", "line: mean of\n2 seeds", band]
  without = plots.line_panels({"a": LINES}, line_label="data", bands=False, **WORDS)
  assert len(first.collections) == 2 and not panels(without)[0].collections
  assert legend(without) == ["first", "second", "line: mean of\n2 seeds"]
  with pytest.raises(ValueError, match=r"panels\['b'\]: expected the lines"):
    plots.line_panels({"a": LINES, "b": {"second": LINES["second"]}}, line_label="", **WORDS)


def test_places_that_are_numbers_stand_where_they_are():
  figure = plots.small_multiples(LINES, ordinal=False, **WORDS)
  (line,) = [line for line in panels(figure)[0].lines if line.get_color() == plots.BLUE]
  assert line.get_xdata().tolist() == PLACES and figure.get_supxlabel() == "staleness (versions)"
  drawn(figure)
  assert [label.get_text() for label in panels(figure)[0].get_xticklabels()] == ["0", "1", "16"]


def test_an_end_of_the_axis_that_is_not_given_is_that_of_all_lines():
  figure = plots.small_multiples(LINES, y_limits=(0.0, None), **WORDS)
  for axes in panels(figure):
    low, high = axes.get_ylim()
    assert low == 0 and high > max(LINES["first"].high.max(), 7)


def test_the_legend_tells_how_many_seeds_there_are():
  uneven = statistics.by_staleness(
    [statistics.Point("a", 0, seed, float(seed)) for seed in range(3)]
    + [statistics.Point("a", 4, seed, float(seed)) for seed in range(2)]
  )
  assert legend(plots.small_multiples(uneven, kind="run", **WORDS)) == [
    "the run named",
    "band: 95% interval, 2 to 3 seeds",
  ]
  bare = {"b": LINES["second"]}
  assert legend(plots.small_multiples(bare, **WORDS)) == ["the loss named"]


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


@pytest.mark.parametrize(
  ("values", "extend"),
  [
    ([0.0, 1.0000001], "neither"),
    ([-0.2, np.nan], "min"),
    ([0.5, 1.2], "max"),
    ([-1.0, 2.0], "both"),
  ],
)
def test_the_colour_scale_has_arrows_only_where_numbers_are_beyond(values, extend):
  figure = plots.heatmap(
    np.array([values]), rows=["a"], columns=["0", "1"], title="", x_label="", colour_label="share",
    colour_limits=(0, 1),
  )  # fmt: skip
  (bar,) = [axes for axes in figure.axes if axes.get_ylabel() == "share"]
  assert bar._colorbar.extend == extend


def test_the_scale_gets_lighter_step_by_step():
  red, green, blue = np.array([matplotlib.colors.to_rgb(c) for c in plots.scale(6)]).T
  lightness = 0.299 * red + 0.587 * green + 0.114 * blue
  assert np.all(np.diff(lightness) > 0.05)


def test_nothing_to_draw_raises():
  with pytest.raises(ValueError, match="series: expected at least one line"):
    plots.small_multiples({}, **WORDS)
