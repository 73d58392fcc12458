"""Packing keeps every token once, splits nothing, and its sums do not depend on the order."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_records import counts, record

from intellect3 import types
from intellect3.pipeline import packing

ROUTER = types.RouterShape(
  num_layers=4, num_dense_layers=1, num_experts=300, num_experts_per_token=2
)
COUNTS = packing.Counts(loss_tokens=1, loss_sequences=1)
LENGTHS = st.lists(st.integers(3, 16), min_size=1, max_size=40)


def _pack(records, plan, row_length):
  return packing.pack(
    dict(enumerate(records)),
    plan,
    row_length=row_length,
    row_count=len(plan),
    step=1,
    counts=counts(records),
  )


@given(LENGTHS)
@settings(deadline=None, max_examples=200)
def test_plan_holds_every_trajectory_once_and_no_row_overflows(lengths):
  plan = packing.plan_rows(lengths, 16)
  assert sorted(number for row in plan for number in row) == list(range(len(lengths)))
  assert all(row and sum(lengths[n] for n in row) <= 16 for row in plan)
  assert plan == packing.plan_rows(list(lengths), 16)
  # Two rows that would fit into one are a missed fit.
  totals = sorted(sum(lengths[n] for n in row) for row in plan)
  assert len(totals) < 2 or totals[0] + totals[1] > 16


def test_best_fit_takes_the_fullest_row_that_still_holds_it():
  # 9 and 7 open two rows of 12 (free 3 and 5); 5 fits only the second, 3 the first.
  assert packing.plan_rows([3, 9, 5, 7], 12) == ((1, 0), (3, 2))
  assert packing.plan_rows([6, 4, 4, 3, 3], 10) == ((0, 1), (2, 3, 4))


def test_ties_go_by_number():
  assert packing.plan_rows([5, 5, 5], 10) == ((0, 1), (2,))


@pytest.mark.parametrize("lengths", [[4, 17], [4, 0]])
def test_a_trajectory_that_does_not_fit_is_named(lengths):
  with pytest.raises(ValueError, match="trajectory 1"):
    packing.plan_rows(lengths, 16)


@given(LENGTHS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_every_token_is_kept_once_in_order_whatever_the_order(lengths, random):
  records = [record(number, length) for number, length in enumerate(lengths)]
  random.shuffle(records)
  plan = packing.plan_rows([len(r.trajectory.tokens) for r in records], 16)
  batch = _pack(records, plan, 16)
  found = {}
  for row in range(len(plan)):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      where = np.flatnonzero(batch.segment_ids[row] == segment)
      assert np.array_equal(where, np.arange(where[0], where[-1] + 1))  # one piece
      assert np.array_equal(batch.positions[row, where], np.arange(len(where)))
      found[tuple(batch.tokens[row, where])] = (row, where)
  assert len(found) == len(records)
  for item in records:
    row, where = found[tuple(item.trajectory.tokens)]
    trajectory = item.trajectory
    assert np.array_equal(batch.loss_mask[row, where], trajectory.loss_mask)
    assert np.array_equal(batch.inference_logprobs[row, where], trajectory.inference_logprobs)
    assert np.array_equal(batch.policy_versions[row, where], trajectory.policy_versions)
    assert np.allclose(batch.temperature[row, where], trajectory.temperature)
    assert np.allclose(
      batch.advantages[row, where], np.where(trajectory.loss_mask, item.advantage, 0.0)
    )
  padding = batch.segment_ids == 0
  assert (~padding).sum() == sum(lengths)
  for array, neutral in (
    (batch.tokens, 0),
    (batch.loss_mask, False),
    (batch.inference_logprobs, 0.0),
    (batch.advantages, 0.0),
    (batch.temperature, 1.0),
    (batch.policy_versions, -1),
    (batch.positions, 0),
  ):
    assert (array[padding] == neutral).all()
  assert batch.loss_tokens == batch.loss_mask.sum()


def test_row_counts_come_from_a_small_set():
  def choose(needed, counts=None):
    return packing.choose_row_count(needed, micro_rows=4, row_counts=counts)

  assert [choose(n) for n in (1, 4, 5, 9, 17)] == [4, 4, 8, 16, 32]
  assert [choose(n, (24, 12)) for n in (1, 12, 13)] == [12, 12, 24]
  with pytest.raises(ValueError, match="at least 25 rows"):
    choose(25, (12, 24))
  with pytest.raises(ValueError, match="multiples of micro_rows"):
    choose(3, (6,))


def test_a_first_token_that_is_trained_on_is_refused():
  with pytest.raises(ValueError, match="rollout 0 branch 0"):
    _pack([record(0, 4, prompt=0)], ((0,),), 8)


def with_experts(made, *, rows=None, router=ROUTER, dtype=None):
  """The record with random routed experts, by default of every token but the last."""
  rows = len(made.trajectory.tokens) - 1 if rows is None else rows
  shape = (rows, router.num_moe_layers, router.num_experts_per_token)
  rng = np.random.default_rng(made.rollout_id)
  experts = rng.integers(0, router.num_experts, shape).astype(dtype or router.dtype)
  trajectory = msgspec.structs.replace(made.trajectory, routed_experts=experts)
  return msgspec.structs.replace(made, trajectory=trajectory)


def pack_replayed(records, plan, **options):
  return packing.pack(
    dict(enumerate(records)),
    plan,
    **{"row_length": 8, "row_count": 2, "step": 1, "counts": COUNTS, "router": ROUTER, **options},
  )


def test_routed_experts_lie_beside_their_tokens_and_the_rest_is_marked():
  records = [with_experts(record(number, length)) for number, length in enumerate((5, 3, 4))]
  batch = pack_replayed(records, ((0, 1), (2,)))
  assert batch.routed_experts.dtype == np.uint16 and batch.routed_experts.shape == (2, 8, 3, 2)
  assert batch.experts_recorded.astype(int).tolist() == [
    [1, 1, 1, 1, 0, 1, 1, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
  ]
  for number, (row, start) in enumerate(((0, 0), (0, 5), (1, 0))):
    experts = records[number].trajectory.routed_experts
    np.testing.assert_array_equal(batch.routed_experts[row, start : start + len(experts)], experts)
  assert not batch.routed_experts[~batch.experts_recorded].any()


def test_without_replay_there_is_no_array():
  batch = pack_replayed([with_experts(record(0, 5))], ((0,),), router=None)
  assert batch.routed_experts is None and batch.experts_recorded is None


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda made: made, r"\[4, 3 MoE layers, 2 experts per token\] to replay, got none"),
    (lambda made: with_experts(made, rows=3), r"got \[3, 3, 2\]"),
    (
      lambda made: with_experts(
        made, router=msgspec.structs.replace(ROUTER, num_layers=3, num_experts=9)
      ),
      r"got \[4, 2, 2\]",
    ),
    (
      lambda made: with_experts(
        made, router=msgspec.structs.replace(ROUTER, num_experts_per_token=1)
      ),
      r"got \[4, 3, 1\]",
    ),
    (
      lambda made: with_experts(made, router=msgspec.structs.replace(ROUTER, num_experts=60_000)),
      "experts below 300",
    ),
    (lambda made: with_experts(made, dtype=np.int32), "expected uint8 or uint16"),
    (lambda made: with_experts(made, rows=6), "at most 5"),
  ],
)
def test_experts_that_cannot_be_replayed_are_refused(change, named):
  with pytest.raises(ValueError, match=f"rollout 0 branch 0: Trajectory.routed_experts.*{named}"):
    pack_replayed([change(record(0, 5))], ((0,),))
