"""The rounds of the expert exchange, in integers: nothing lost, too large, or in vain."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from intellect3.kernels.expert_parallel import rounds


def made(counts, total, rows, ragged):
  for k in range(total):
    turn = rounds.make_round(np.int32(k), np.int32(total), counts, rows=rows, ragged=ragged)
    yield rounds.Round(*(np.asarray(field) for field in turn))


def test_by_hand():
  """Two devices, buffers of four rows: 5 rows for the other one go as 2, 2, 1 in slots of 2."""
  counts = np.array([[1, 5], [0, 3]], np.int32)
  assert int(rounds.needed(counts, rows=4, ragged=False)) == 3
  slotted = list(made(counts, 3, 4, ragged=False))
  assert [turn.sizes_SR.tolist() for turn in slotted] == [
    [[1, 2], [0, 1]],
    [[0, 2], [0, 1]],
    [[0, 1], [0, 1]],
  ]
  assert [turn.firsts_SR[0].tolist() for turn in slotted] == [[0, 0], [1, 2], [1, 4]]
  # Side by side: 8 rows arrive at device 1, which in two rounds would be 3 + 2 and 2 + 1.
  assert int(rounds.needed(counts, rows=4, ragged=True)) == 3
  first = next(made(counts, 3, 4, ragged=True))
  assert first.sent_SR.tolist() == [[0, 1], [0, 0]]
  assert first.received_SR.tolist() == [[0, 0], [1, 2]]
  # One that sends much and one that receives much: 10 rows are 3 + 3 in two rounds, 2 + 2 in three.
  for crowded in ([[5, 5], [0, 0]], [[5, 0], [5, 0]]):
    assert int(rounds.needed(np.int32(crowded), rows=4, ragged=True)) == 3


def test_the_expert_of_a_row_follows_from_the_counts():
  # Device 0 has rows of experts 0 0 2 here, device 1 of 1 2 2; the second half of each arrives.
  counts = np.array([[2, 0, 1], [0, 1, 2]], np.int32)
  starts, sizes, firsts = np.int32([0, 4]), np.int32([1, 2]), np.int32([2, 1])
  slots = rounds.slots(starts, sizes, firsts, rows=8)
  experts = rounds.local_experts(slots, counts)
  assert experts.tolist() == [2, 3, 3, 3, 2, 2, 3, 3]
  assert np.asarray(slots.peer_M).tolist() == [0] * 4 + [1] * 4


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  devices=st.sampled_from([1, 2, 4]),
  slot=st.integers(1, 4),
  most=st.integers(0, 40),
  seed=st.integers(0, 10_000),
  ragged=st.booleans(),
)
def test_every_row_travels_once_and_fits(devices, slot, most, seed, ragged):
  rng = np.random.default_rng(seed)
  counts = rng.integers(0, most + 1, (devices, devices)).astype(np.int32)
  counts[rng.random(devices) < 0.3] = 0
  counts[:, rng.random(devices) < 0.3] = 0
  rows = slot * devices
  total = max(1, int(rounds.needed(counts, rows=rows, ragged=ragged)))
  until = np.zeros_like(counts)
  for turn in made(counts, total, rows, ragged):
    np.testing.assert_array_equal(turn.firsts_SR, until)
    until = until + turn.sizes_SR
    # Nobody's share differs by more than a row from what an equal one would be.
    assert np.all(np.abs(turn.sizes_SR - counts / total) < 1)
    for starts, sizes in ((turn.sent_SR, turn.sizes_SR), (turn.received_SR.T, turn.sizes_SR.T)):
      for begins, lengths in zip(starts, sizes, strict=True):
        held = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])
        assert len(set(held)) == len(held) and np.all(held < rows)
  np.testing.assert_array_equal(until, counts)


@pytest.mark.parametrize("pairs, rows, expected", [(0, 8, 1), (8, 8, 1), (9, 8, 2), (64, 8, 8)])
def test_nominal_rounds_are_those_of_an_even_load(pairs, rows, expected):
  assert rounds.nominal(pairs, rows) == expected
