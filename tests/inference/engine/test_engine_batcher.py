"""The scheduling state, stepped by hand and by Hypothesis, with a device that is a formula."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.inference.engine.batcher import Batcher, Plan, Running
from intellect3.inference.engine.request import Request
from intellect3.inference.engine.steps import PADDING_SEGMENT, REAL_SEGMENT, Sampled


def running(rid="r", prompt=(1, 2, 3), new=4, received=0.0, **more):
  request = Request(rid=rid, input_ids=list(prompt), max_new_tokens=new, temperature=1.0, **more)
  return Running(request, seed=(7 << 32) | 9, received=received)


def next_token(seed: int, position: int) -> int:
  return 100 + (seed * 31 + position * 7) % 50


def formula(plan: Plan) -> tuple[Sampled | None, Sampled | None]:
  """A device whose sample depends only on what the contract allows: the seed and the position."""

  def rows(sampling):
    seeds = sampling.seeds_R2.astype(np.int64)
    ids = [
      next_token(int(low), int(p)) for (_, low), p in zip(seeds, sampling.positions_R, strict=True)
    ]
    return np.asarray(ids, np.int32), -np.asarray(ids, np.float32)

  prefilled = decoded = None
  if plan.prefill is not None:
    scores = plan.prefill.targets_RT.astype(np.float32) if plan.score else None
    prefilled = Sampled(*rows(plan.prefill.sampling), scores)
  if plan.decode is not None:
    decoded = Sampled(*rows(plan.decode.sampling))
  return prefilled, decoded


def step(batcher: Batcher, version="v", now=1.0) -> list[Running]:
  plan = batcher.plan()
  return [] if plan is None else batcher.apply(plan, *formula(plan), version=version, now=now)


def finish(batcher: Batcher, version="v") -> list[Running]:
  done: list[Running] = []
  for _ in range(10_000):
    if batcher.idle:
      return done
    done += step(batcher, version)
  raise AssertionError("the batcher does not come to an end")


def make(slots=2, rows=2, chunk=4, **more) -> Batcher:
  return Batcher(slots=slots, prefill_rows=rows, prefill_chunk=chunk, **more)


def test_a_prompt_is_prefilled_in_chunks_and_sampled_at_its_end():
  batcher, sequence = make(rows=2, chunk=4), running(prompt=range(1, 11), new=2)
  batcher.add(sequence)
  seen = []
  for _ in range(3):
    plan = batcher.plan()
    assert plan.decode is None and plan.prefill.tokens_RT.shape == (2, 4)
    real = plan.prefill.segments_RT[0] == REAL_SEGMENT
    tokens, positions = plan.prefill.tokens_RT[0][real], plan.prefill.positions_RT[0][real]
    seen += np.stack([tokens, positions], axis=1).tolist()
    assert (plan.prefill.segments_RT[1] == PADDING_SEGMENT).all()
    assert sequence.output_ids == []
    batcher.apply(plan, *formula(plan), version="v", now=1.0)
  assert seen == [[position + 1, position] for position in range(10)]
  assert plan.prefill.last_R[0] == 1
  assert sequence.output_ids == [next_token(9, 0)]
  plan = batcher.plan()
  assert plan.prefill is None
  slot = sequence.slot
  assert plan.decode.tokens_S[slot] == next_token(9, 0) and plan.decode.positions_S[slot] == 10
  assert plan.decode.sampling.positions_R[slot] == 1
  assert plan.decode.sampling.seeds_R2[slot].tolist() == [7, 9]
  assert batcher.apply(plan, *formula(plan), version="v", now=2.0) == [sequence]
  assert sequence.finish == {"type": "length", "length": 2} and batcher.idle


def test_a_long_prompt_does_not_hold_up_decoding_nor_a_short_prompt():
  batcher = make(slots=3, rows=2, chunk=2)
  first = running("first", new=50)
  batcher.add(first)
  step(batcher), step(batcher)
  long, short = running("long", prompt=range(20), new=1), running("short", prompt=[5], new=1)
  batcher.add(long)
  batcher.add(short)
  before = len(first.output_ids)
  assert step(batcher) == [short]
  assert len(first.output_ids) == before + 1 and long.cached == 2


def test_stop_rules_are_in_sglangs_order():
  token = next_token(9, 0)
  for more, new, eos, reason in [
    ({"stop_token_ids": frozenset([token])}, 4, (), {"type": "stop", "matched": token}),
    ({}, 4, (token,), {"type": "stop", "matched": token}),
    ({"stop_token_ids": frozenset([token])}, 1, (), {"type": "length", "length": 1}),
    ({"stop_token_ids": frozenset([token]), "ignore_eos": True}, 3, (token,), None),
    ({}, 0, (), {"type": "length", "length": 0}),
  ]:
    batcher, sequence = make(eos_token_ids=eos), running(new=new, **more)
    batcher.add(sequence)
    finish(batcher)
    assert sequence.finish == (reason or {"type": "length", "length": new})


def test_retraction_keeps_tokens_logprobs_and_spans():
  batcher, sequence = make(chunk=2), running(prompt=[1, 2, 3], new=6)
  batcher.add(sequence)
  for _ in range(4):
    step(batcher, "1")
  kept, kept_logprobs = list(sequence.output_ids), list(sequence.output_logprobs)
  assert len(kept) == 3 and batcher.retract() == 1
  assert sequence.slot is None and batcher.num_running == 0 and batcher.num_waiting == 1
  plan = batcher.plan()
  assert plan.prefill.tokens_RT[0].tolist() == [1, 2]
  batcher.apply(plan, *formula(plan), version="2", now=1.0)
  plan = batcher.plan()
  assert plan.prefill.tokens_RT[0].tolist() == [3, kept[0]]
  batcher.apply(plan, *formula(plan), version="2", now=1.0)
  plan = batcher.plan()
  assert plan.prefill.tokens_RT[0].tolist() == kept[1:]
  assert plan.prefill.sampling.positions_R[0] == 3
  batcher.apply(plan, *formula(plan), version="2", now=1.0)
  finish(batcher, "2")
  assert sequence.output_ids[:3] == kept and sequence.output_logprobs[:3] == kept_logprobs
  assert sequence.output_ids == [next_token(9, position) for position in range(6)]
  assert sequence.spans == [["1", 0, 3], ["2", 3, 6]] and sequence.retractions == 1


def test_retracted_sequences_return_in_order_of_arrival_before_those_that_wait():
  batcher = make(slots=2)
  for index in range(3):
    batcher.add(running(str(index), received=float(index)))
  step(batcher)
  batcher.retract()
  plan = batcher.plan()
  assert [chunk.sequence.request.rid for chunk in plan.chunks] == ["0", "1"]


def test_abort_ends_waiting_and_running_and_frees_their_slots():
  batcher = make(slots=1)
  one, two = running("one", new=9), running("two", new=9)
  batcher.add(one)
  batcher.add(two)
  step(batcher), step(batcher)
  assert batcher.abort("nobody") == []
  assert batcher.abort("two") == [two] and two.output_ids == [] and batcher.num_waiting == 0
  assert batcher.abort() == [one] and one.finish["type"] == "abort" and len(one.output_ids) == 2
  assert batcher.idle


def test_input_logprobs_are_gathered_over_chunks_and_leave_out_the_first_token():
  batcher = make(chunk=4)
  sequence = running(prompt=range(10, 20), new=2, return_logprob=True, logprob_start=0)
  batcher.add(sequence)
  batcher.add(running("other"))
  finish(batcher)
  assert sequence.input_logprobs == [float(token) for token in range(11, 20)]


@settings(max_examples=60, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 12), st.booleans()), max_size=8
  ),
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 4),
  st.lists(st.integers(0, 20), max_size=3),
)
def test_whatever_joins_when_every_sequence_ends_with_the_tokens_of_its_seed(
  arrivals, slots, rows, chunk, retractions
):
  """No slot is shared, no shape changes, every sequence ends once, retracted or not."""
  batcher = make(slots=slots, rows=rows, chunk=chunk)
  sequences, done, turn = [], [], 0
  while len(done) < len(arrivals):
    for index, (length, new, joins, score) in enumerate(arrivals):
      if joins == turn:
        request = Request(
          rid=str(index),
          input_ids=list(range(length)),
          max_new_tokens=new,
          temperature=1.0,
          return_logprob=score,
          logprob_start=0 if score else None,
        )
        sequences.append(Running(request, seed=index, received=float(turn)))
        batcher.add(sequences[-1])
    if turn in retractions:
      batcher.retract()
    plan = batcher.plan()
    if plan is not None:
      held = [sequence.slot for sequence in sequences if sequence.slot is not None]
      assert len(set(held)) == len(held) <= slots
      if plan.decode is not None:
        active = {s.slot for s in plan.decoding}
        assert {i for i, s in enumerate(plan.decode.segments_S) if s == REAL_SEGMENT} == active
      done += batcher.apply(plan, *formula(plan), version=str(turn), now=float(turn))
    turn += 1
    assert turn < 1000
  assert batcher.idle and len(done) == len(set(map(id, done)))
  for sequence in sequences:
    new = sequence.request.max_new_tokens
    assert sequence.output_ids == [next_token(sequence.seed, p) for p in range(new)]
    assert sequence.spans[0][1] == 0 and sequence.spans[-1][2] == new
    assert all(a[2] == b[1] for a, b in itertools.pairwise(sequence.spans))
    if sequence.request.logprob_start is not None:
      assert sequence.input_logprobs == [float(t) for t in sequence.request.input_ids[1:]]
