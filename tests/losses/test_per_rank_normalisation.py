"""What global denominators change: the older per-rank normalisation depends on the layout.

prime-rl's trainer of 2025 divided each rank's loss by that rank's own count of loss-masked tokens
and then averaged over ranks (the data-parallel mean of gradients). Ranks that got few tokens then
weigh theirs more, and dealing the same rollouts to ranks differently gives another gradient. Here
every rank divides by the tokens of the whole batch, and the sum is the same however rollouts lie.
"""

import itertools

import numpy as np
import pytest

from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

RANKS = 2
CASES = [case for case in house.DEFAULTS if case.mean == "token"]


def by_rank(case, arrays, deal, own):
  """Gradient of a step, row by row; `deal[row]` is the rank that has it."""
  total = np.zeros(arrays["logprobs"].shape)
  for rank in range(RANKS):
    part = batches.rows_of(arrays, [row for row, to in enumerate(deal) if to == rank])
    if own:  # its own count, then the mean over the ranks
      total += house.run(case, part, **house.denominators(case, part)).gradient / RANKS
    else:
      total += house.run(case, part, **house.denominators(case, arrays)).gradient
  return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_depends_on_who_gets_which_rollout_only_per_rank(case):
  arrays = batches.batch(11)
  tokens = (arrays["loss_mask"] & (arrays["segment_ids"] != 0)).sum(axis=1)
  assert len(set(tokens)) == batches.ROWS  # rows of different lengths, as rollouts have
  whole = house.run(case, arrays).gradient
  deals = [deal for deal in itertools.product(range(RANKS), repeat=batches.ROWS) if sum(deal) == 2]
  per_rank = np.stack([by_rank(case, arrays, deal, own=True) for deal in deals])
  ours = np.stack([by_rank(case, arrays, deal, own=False) for deal in deals])

  size = np.max(np.abs(whole))
  for gradient in ours:
    house.close(gradient, whole)
  spread = np.max(np.ptp(per_rank, axis=0)) / size
  assert spread > 0.05, f"per rank: dealing changes the gradient by {spread:.1%}"
  assert np.max(np.abs(per_rank - whole)) / size > 0.02


def test_by_hand():
  """Three tokens on one rank, one on the other, all of gradient -1 before any division.

  The mean over the four tokens is -1/4 each. Per rank the lone token weighs three times as much:
  -1/3 and -1 on the ranks, halved by their mean. With both ranks at two tokens it is -1/4 again.
  """
  case = house.DEFAULTS[0]
  ones = np.ones((2, 3), np.float32)
  arrays = {
    **{name: ones for name in (*batches.FLOATS, *batches.WEIGHTS)},
    "segment_ids": np.ones((2, 3), np.int32),
    "loss_mask": np.array([[True, True, True], [True, False, False]]),
    "token": np.arange(1, 7).reshape(2, 3),
  }

  def gradient(arrays, own):
    return by_rank(case, arrays, (0, 1), own)[arrays["loss_mask"]]

  np.testing.assert_allclose(gradient(arrays, own=False), [-1 / 4] * 4, rtol=1e-6)
  np.testing.assert_allclose(gradient(arrays, own=True), [-1 / 6] * 3 + [-1 / 2], rtol=1e-6)
  even = {**arrays, "loss_mask": np.array([[True, True, False], [True, True, False]])}
  np.testing.assert_allclose(gradient(even, own=True), [-1 / 4] * 4, rtol=1e-6)


def test_the_direction_differs_not_only_the_length():
  """An optimiser that normalises would forgive another length."""
  arrays = batches.batch(11)
  rng = np.random.default_rng(0)
  features = rng.standard_normal((*arrays["logprobs"].shape, 6))  # d logprobs / d parameters
  direction = []
  for own in (True, False):
    parameters = np.tensordot(by_rank(CASES[0], arrays, (0, 1, 1, 1), own), features, axes=2)
    direction.append(parameters / np.linalg.norm(parameters))
  assert np.dot(*direction) < 0.99
