"""What is drawn is what was found: marks, lines and labels of the figures."""

import pytest

from intellect3.simulation import plots

REPORT = {
  "scenario": "a cluster",
  "training": [
    {"step": 1, "waiting": 0.0, "begun": 60.0, "stepped": 240.0, "ended": 300.0, "committed": 0.0},
    {"step": 2, "waiting": 300.0, "begun": 360.0, "stepped": 840.0, "ended": 900.0}
    | {"committed": 360.0},
  ],
  "syncs": [[1, "http://a", 300.0, 420.0], [1, "http://b", 310.0, 480.0]],
  "timeline": {
    "seconds": [300.0, 600.0, 900.0],
    "running": [[4, 8], [5, 7], [2, 2]],
    "waiting": [[0, 0], [1, 2], [0, 0]],
    "clients_waiting": [0, 4, 0],
  },
}
ROWS = [
  {"x": 1, "series": "drop", "step_seconds": 30.0, "trainer_idle_share": 0.5},
  {"x": 8, "series": "drop", "step_seconds": 10.0, "trainer_idle_share": 0.1},
  {"x": 8, "series": "mask", "step_seconds": 9.0, "trainer_idle_share": 0.0},
]
PANELS = (plots.STEP, plots.TRAINER_IDLE)


def lines(axes):
  return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def extents(collection):
  return [path.get_extents().intervalx.tolist() for path in collection.get_paths()]


def test_a_timeline_has_the_trainers_marks_in_minutes():
  bars = plots.timeline(REPORT, first=2, last=2).axes[0]
  waits, trains, publishes, syncs = bars.collections
  assert extents(waits) == [[0.0, 1.0]]
  assert extents(trains) == [[1.0, 9.0]]
  assert extents(publishes) == [[9.0, 10.0]]
  assert extents(syncs) == [[0.0, 3.0]]  # from the first server's begin to the last one's end
  assert [text.get_text() for text in bars.texts] == ["2"]


def test_a_timeline_has_all_requests_and_their_spread():
  _, running, spread = plots.timeline(REPORT, first=2, last=2).axes
  assert lines(running) == {
    "running on the servers": [12, 12, 4],
    "waiting for a server": [0, 7, 0],
  }
  assert lines(spread) == {"median server": [6, 6, 2]}
  assert spread.get_xlim() == (0, 10)
  assert spread.get_xlabel() == "minutes since the end of step 1"


def test_what_comes_after_the_last_batch_is_shaded():
  _, running, spread = plots.timeline(REPORT, first=2, last=2).axes
  for axes in (running, spread):
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (1.0, 10.0)
  first, last = REPORT["training"]
  served = {**REPORT, "training": [first, {**last, "committed": 900.0}]}
  assert not plots.timeline(served, first=2, last=2).axes[1].patches


def test_the_last_step_that_is_served_ends_before_the_last_batch_is_there():
  rows = [{"step": s, "ended": 10.0 * s, "committed": 10.0 * s - 25.0} for s in (1, 2, 3, 4, 5)]
  assert plots.last_served({"training": rows}) == 2
  assert plots.last_served({"training": [{**row, "committed": 1.0} for row in rows]}) == 1


def test_a_sweep_has_a_line_for_each_series_at_its_places():
  figure = plots.sweep(ROWS, PANELS, title="t", x_label="bound", chosen=8)
  steps, idle = figure.axes
  drop, mask, chosen = steps.get_lines()
  assert (list(drop.get_xdata()), list(drop.get_ydata())) == ([0, 1], [30.0, 10.0])
  assert (list(mask.get_xdata()), list(mask.get_ydata())) == ([1], [9.0])
  assert chosen.get_xdata() == [1, 1]
  assert list(idle.get_lines()[0].get_ydata()) == [50.0, 10.0]
  assert [tick.get_text() for tick in steps.get_xticklabels()] == ["1", "8"]
  assert [text.get_text() for text in steps.get_legend().get_texts()] == ["drop", "mask"]
  assert steps.get_title() == "seconds a step"
  assert steps.get_ylim()[0] == 0


def test_places_may_have_names():
  figure = plots.sweep(
    ROWS[:2], PANELS, title="t", x_label="nodes", ticks={1: "1 : 15", 8: "8 : 8"}
  )
  assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1 : 15", "8 : 8"]
  assert figure.axes[0].get_legend() is None


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(ValueError, match="rows: expected at least one, got none"):
    plots.sweep([], PANELS, title="t", x_label="x")
  with pytest.raises(ValueError, match="first, last: expected steps within 2 to 2, got 1, 2"):
    plots.timeline(REPORT, first=1, last=2)
  empty = {**REPORT, "timeline": {**REPORT["timeline"], "seconds": []}}
  with pytest.raises(ValueError, match="report: expected a timeline"):
    plots.timeline(empty, first=2, last=2)
