"""Schedules by hand-computed numbers."""

import numpy as np
import pytest

from intellect3.training import schedule


def _rates(rate, counts):
  return [float(rate(np.int32(count))) for count in counts]


def test_constant_with_warm_up():
  rate = schedule.constant(0.4, warmup_steps=4)
  assert np.allclose(_rates(rate, range(6)), [0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
  assert np.allclose(_rates(schedule.constant(0.4), [0, 9]), 0.4)
  warm = schedule.constant(1.0, warmup_steps=2, warmup_from=0.5)
  assert np.allclose(_rates(warm, range(3)), [0.75, 1.0, 1.0])


def test_linear_ends_at_final():
  rate = schedule.linear(1.0, steps=12, final=0.2, warmup_steps=2)
  assert np.allclose(_rates(rate, [0, 1, 2, 7, 12, 99]), [0.5, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_cosine_ends_at_final():
  rate = schedule.cosine(1.0, steps=8, final=0.5)
  expected = [1.0, 0.5 + 0.25 * (1 + np.cos(np.pi / 4)), 0.75, 0.5, 0.5]
  assert np.allclose(_rates(rate, [0, 2, 4, 8, 9]), expected)


@pytest.mark.parametrize(
  ("make", "field"),
  [
    (lambda: schedule.constant(0.0), "learning_rate"),
    (lambda: schedule.constant(1.0, warmup_steps=-1), "warmup_steps"),
    (lambda: schedule.constant(1.0, warmup_steps=3, warmup_from=2.0), "warmup_from"),
    (lambda: schedule.linear(1.0, steps=5, warmup_steps=5), "steps"),
    (lambda: schedule.linear(-1.0, steps=5), "learning_rate"),
    (lambda: schedule.cosine(1.0, steps=5, final=-0.1), "final"),
  ],
)
def test_bad_values_are_named(make, field):
  with pytest.raises(ValueError, match=field):
    make()
