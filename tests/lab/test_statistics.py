"""Means, intervals, pairing and tables of the lab."""

import math

import numpy as np
import pytest

from intellect3.lab import statistics
from intellect3.lab.statistics import Point


def test_students_interval_by_hand():
  # s = 1, n = 3, t(0.975, 2) = 4.302653
  interval = statistics.mean_interval([1.0, 2.0, 3.0])
  half = 4.302653 / math.sqrt(3)
  assert interval.mean == 2 and interval.count == 3
  np.testing.assert_allclose([interval.low, interval.high], [2 - half, 2 + half], rtol=1e-6)
  # t(0.95, 2) = 2.919986
  narrower = statistics.mean_interval([1.0, 2.0, 3.0], confidence=0.9)
  np.testing.assert_allclose(narrower.high, 2 + 2.919986 / math.sqrt(3), rtol=1e-6)


def test_the_interval_covers_as_often_as_it_says():
  samples = np.random.default_rng(0).normal(loc=1.5, size=(2000, 10))
  intervals = [statistics.mean_interval(row) for row in samples]
  covered = np.mean([interval.low <= 1.5 <= interval.high for interval in intervals])
  assert 0.935 < covered < 0.965  # three standard errors of 2,000 trials


def test_one_value_has_no_interval():
  interval = statistics.mean_interval([0.5])
  assert interval.mean == 0.5 and math.isnan(interval.low) and math.isnan(interval.high)


@pytest.mark.parametrize(
  ("values", "confidence", "message"),
  [
    ([], 0.95, "values: expected at least one"),
    ([1.0, math.nan], 0.95, "values: expected finite"),
    ([1.0, math.inf], 0.95, "values: expected finite"),
    ([1.0], 1.0, "confidence: expected"),
  ],
)
def test_what_is_no_measurement_raises(values, confidence, message):
  with pytest.raises(ValueError, match=message):
    statistics.mean_interval(values, confidence)


def test_points_become_lines_in_the_order_of_the_losses():
  points = [
    Point("b", 4, 0, 1.0),
    Point("b", 0, 0, 5.0),
    Point("a", 0, 0, 2.0),
    Point("b", 4, 1, 3.0),
    Point("b", 0, 1, 5.0),
  ]
  lines = statistics.by_staleness(points)
  assert list(lines) == ["b", "a"]
  assert lines["b"].x.tolist() == [0, 4] and lines["b"].mean.tolist() == [5, 2]
  # two values 1 and 3: s = sqrt(2), t(0.975, 1) = 12.706205
  np.testing.assert_allclose(lines["b"].high, [5, 2 + 12.706205], rtol=1e-6)
  assert np.isnan(lines["a"].low).all()
  assert lines["b"].counts.tolist() == [2, 2] and lines["a"].counts.tolist() == [1]
  assert statistics.exact([0, 1], [2.0, 3.0]).counts.tolist() == [0, 0]


def test_over_seeds_averages_seeds_not_places():
  line = statistics.over_seeds([0, 10], np.array([[1.0, 2.0], [3.0, 6.0]]))
  assert line.mean.tolist() == [2, 4]
  with pytest.raises(ValueError, match=r"values_SK: expected \[seeds, 3\], got \[2, 2\]"):
    statistics.over_seeds([0, 1, 2], np.ones((2, 2)))


def test_differences_are_paired_by_seed_and_staleness():
  points = [Point("base", k, seed, 10 * seed + k) for k in (0, 8) for seed in range(3)]
  points += [Point("other", k, seed, 10 * seed + k + 0.5) for k in (0, 8) for seed in range(3)]
  lines = statistics.by_staleness(statistics.differences(points, "base"))
  assert list(lines) == ["other"] and lines["other"].mean.tolist() == [0.5, 0.5]
  # what the seeds have in common is gone
  np.testing.assert_allclose(lines["other"].high, 0.5)
  with pytest.raises(ValueError, match="baseline: expected 'base' at staleness 0, seed 7"):
    statistics.differences([*points, Point("other", 0, 7, 1.0)], "base")


def test_the_table():
  lines = statistics.by_staleness(
    [Point("a", 0, seed, value) for seed, value in enumerate((1.0, 2.0, 3.0))]
    + [Point("a", 16, 0, 0.25)]
  )
  table = statistics.markdown_table(lines).splitlines()
  assert table == [
    "| loss \\ staleness | 0 | 16 |",
    "| --- | ---: | ---: |",
    "| a | 2.00 ± 2.48 | 0.25 |",
  ]
  other = statistics.exact([1, 2], [0.0, 0.0])
  with pytest.raises(ValueError, match="one set of places"):
    statistics.markdown_table({**lines, "b": other})
  with pytest.raises(ValueError, match="at least one line"):
    statistics.markdown_table({})
