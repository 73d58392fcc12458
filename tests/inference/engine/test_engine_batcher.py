"""The scheduling state, stepped by hand and by Hypothesis, with a device that is a formula."""

import engine_formula as formula
import numpy as np
import pytest
from engine_formula import Formula, batcher, check_whole, finish, next_token, sequence, step

from intellect3.inference.engine.steps import MAX_STOP_IDS


def test_a_prompt_is_prefilled_in_chunks_and_sampled_at_its_end():
  """Several rows of a call are of one sequence; its second call brings the sample."""
  house, who = batcher(rows=2, chunk=4), sequence(prompt=range(1, 11), new=2)
  device = Formula(house)
  house.add(who)
  seen = []
  for calls in (2, 1):
    plan = house.plan()
    assert plan.decode is None and plan.prefill.tokens_RT.shape == (2, 4)
    real = plan.prefill.valid_RT
    assert len(plan.chunks) == calls and who.output_ids == []
    tokens, positions = plan.prefill.tokens_RT[real], plan.prefill.positions_RT[real]
    seen += np.stack([tokens, positions], axis=1).tolist()
    house.apply(plan, *device(plan), version="v", now=1.0)
  assert seen == [[position + 1, position] for position in range(10)]
  assert plan.prefill.last_R[0] == 1 and who.output_ids == [next_token(9, 0)]
  plan = house.plan()
  assert plan.prefill is None
  slot = who.slot
  assert plan.decode.tokens_S[slot] == next_token(9, 0) and plan.decode.positions_S[slot] == 10
  assert plan.decode.sampling.positions_R[slot] == 1
  assert plan.decode.sampling.seeds_R2[slot].tolist() == [7, 9]
  assert house.apply(plan, *device(plan), version="v", now=2.0) == [who]
  assert who.finish == {"type": "length", "length": 2} and house.idle
  assert (who.started, who.first_token, who.finished) == (1.0, 1.0, 2.0)
  assert house.counters.prefilled == house.counters.prompt == 10 and house.counters.generated == 2


def test_a_long_prompt_does_not_hold_up_decoding():
  house = batcher(slots=3, rows=2, chunk=2, steps=8)
  device, first = Formula(house), sequence("first", new=20)
  house.add(first)
  step(house, device)
  long = sequence("long", prompt=range(20, 40), new=1)
  house.add(long)
  for call in range(1, 6):
    before = len(first.output_ids)
    done = step(house, device)
    assert (len(first.output_ids) == before + 2 and long.cached == 4 * call) or done == [long]
  assert long.finish is not None


def test_while_others_wait_a_call_ends_when_a_quarter_of_its_sequences_has():
  for waiting, quorum in ((True, 3), (False, 1)):
    house = batcher(slots=4, steps=8)
    for index in range(4 + waiting):
      house.add(sequence(str(index), prompt=[index], new=9))
    device = Formula(house)
    for _ in range(3):
      plan = house.plan()
      house.apply(plan, *device(plan), version="v", now=1.0)
    assert len(plan.decoding) == 4 and plan.decode.quorum == quorum


def test_stop_rules_are_in_sglangs_order():
  token = next_token(9, 0)
  many = frozenset(range(1000, 1000 + MAX_STOP_IDS)) | {next_token(9, 2)}
  match = lambda ids, strings: strings[0] if len(ids) == 3 else None  # noqa: E731
  for more, new, eos, reason in [
    ({"stop_token_ids": frozenset([token])}, 4, (), {"type": "stop", "matched": token}),
    ({}, 4, (token,), {"type": "stop", "matched": token}),
    ({"stop_token_ids": frozenset([token])}, 1, (), {"type": "stop", "matched": token}),
    ({"stop_token_ids": frozenset([token]), "ignore_eos": True}, 3, (token,), None),
    ({}, 0, (), {"type": "length", "length": 0}),
    ({"stop_token_ids": many}, 9, (), {"type": "stop", "matched": next_token(9, 2)}),
    ({"stop_strings": ("x",)}, 9, (), {"type": "stop", "matched": "x"}),
    ({"stop_strings": ("x",)}, 3, (), {"type": "stop", "matched": "x"}),
    ({"stop_strings": ("x",)}, 2, (), {"type": "length", "length": 2}),
    ({"stop_strings": ("x",)}, 9, (next_token(9, 2),), {"type": "stop", "matched": "x"}),
    ({"stop_strings": ("x",), "ignore_eos": True}, 9, (token,), {"type": "stop", "matched": "x"}),
  ]:
    house, who = batcher(eos_token_ids=eos, match_stop=match, steps=8), sequence(new=new, **more)
    house.add(who)
    finish(house, Formula(house))
    assert who.finish == (reason or {"type": "length", "length": new})
    assert len(who.output_ids) == {"x": 3, token: 1, next_token(9, 2): 3}.get(
      (reason or {}).get("matched"), new
    )
    check_whole(who)


def test_what_was_decoded_beyond_a_stop_string_is_forgotten():
  """Its experts are not told, and its keys and values are nobody's prefix."""
  match = lambda ids, strings: "x" if len(ids) == 4 else None  # noqa: E731
  house = batcher(steps=8, match_stop=match)
  device, who = Formula(house), sequence(prompt=[1, 2, 3, 4], new=20, stop_strings=("x",))
  house.add(who)
  finish(house, device)
  assert len(who.output_ids) == 4 and device.decode_positions == 8
  check_whole(who)
  # 4 prompt tokens and 3 outputs are in the cache; only the prompt is a whole page.
  assert house.pages.unused == 1


def test_ids_that_nobody_can_sample_are_no_trouble_as_stop_ids():
  wild = frozenset([-1, 2**31, 2**63, next_token(9, 1)])
  house, who = batcher(), sequence(new=4, stop_token_ids=wild, min_new_tokens=2)
  house.add(who)
  plan = house.plan()
  known = plan.prefill.sampling.stops_RJ[0]
  assert next_token(9, 1) in known and (known >= 0).all()
  finish(house, Formula(house))
  assert who.finish == {"type": "stop", "matched": next_token(9, 1)}


def test_a_minimum_beyond_every_context_is_that_of_the_longest_output():
  house, who = batcher(), sequence(new=3, min_new_tokens=2**40)
  house.add(who)
  finish(house, Formula(house))
  assert who.finish == {"type": "length", "length": 3}


def test_retraction_keeps_tokens_logprobs_and_spans():
  house, who = batcher(chunk=2), sequence(prompt=[1, 2, 3, 4, 5, 6], new=6)
  device = Formula(house)
  house.add(who)
  for _ in range(4):
    step(house, device, "1")
  kept, kept_logprobs = list(who.output_ids), list(who.output_logprobs)
  assert len(kept) == 3 and house.retract() == 1 and who.cached == 0
  assert who.slot is None and house.num_running == 0 and house.num_waiting == 1
  house.forget_prefixes()
  plan = house.plan()
  assert plan.prefill.tokens_RT.tolist() == [[1, 2], [3, 4]]
  house.apply(plan, *device(plan), version="2", now=1.0)
  plan = house.plan()
  assert plan.prefill.tokens_RT.tolist() == [[5, 6], kept[:2]]
  house.apply(plan, *device(plan), version="2", now=1.0)
  plan = house.plan()
  assert plan.prefill.tokens_RT[0, 0] == kept[2] and plan.prefill.sampling.positions_R[0] == 3
  house.apply(plan, *device(plan), version="2", now=1.0)
  finish(house, device, "2")
  assert who.output_ids[:3] == kept and who.output_logprobs[:3] == kept_logprobs
  assert who.spans == [["1", 0, 3], ["2", 3, 6]] and who.retractions == 1
  # Six of the prompt and two outputs were in the cache; the third output was not yet.
  assert house.counters.reprefilled == 8 and house.counters.prefilled == 6 + 9
  assert house.counters.retractions == 1 and house.counters.prompt == 6
  check_whole(who)


def test_retracted_sequences_return_in_order_of_arrival_before_those_that_wait():
  house = batcher(slots=2)
  for index in range(3):
    house.add(sequence(str(index), received=float(index)))
  step(house, Formula(house))
  house.retract()
  plan = house.plan()
  assert [chunk.sequence.request.rid for chunk in plan.chunks] == ["0", "1"]


def test_abort_ends_waiting_and_running_and_frees_their_slots():
  house = batcher(slots=1)
  device, one, two = Formula(house), sequence("one", new=9), sequence("two", new=9)
  house.add(one)
  house.add(two)
  step(house, device), step(house, device)
  assert house.abort("nobody") == []
  assert house.abort("two") == [two] and two.output_ids == [] and house.num_waiting == 0
  assert house.abort() == [one] and one.finish["type"] == "abort" and len(one.output_ids) == 2
  assert house.idle and house.pages.available == house.pages.count
  check_whole(one)


def test_logprobs_of_the_prompt_survive_a_retraction():
  for steps in range(1, 6):
    house = batcher(rows=1, chunk=2)
    device = Formula(house)
    who = sequence(prompt=range(7), new=3, logprob_start=2, top_logprobs_num=1)
    house.add(who)
    for _ in range(steps):
      step(house, device)
    house.retract()
    finish(house, device)
    check_whole(who)


def test_penalties_count_from_where_a_sequence_stands():
  house, device = (house := batcher(slots=1)), Formula(house)
  who = sequence(new=6, frequency_penalty=1.0)
  house.add(who)
  plan = house.plan()
  assert plan.resets == ((0, ()),) and plan.prefill.sampling.penalizes
  house.apply(plan, *device(plan), version="v", now=1.0)
  step(house, device)
  house.retract()
  plan = house.plan()
  assert plan.resets == ((0, tuple(who.output_ids)),) and len(who.output_ids) == 2
  house.apply(plan, *device(plan), version="v", now=1.0)
  finish(house, device)
  house.add(sequence())
  assert house.plan().resets == ()


def test_a_slot_forgets_how_its_last_tenant_sampled():
  house = batcher(slots=1)
  device = Formula(house)
  wishes = {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "top_logprobs_num": 2, "min_new_tokens": 3}
  penalties = {"frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.5}
  house.add(sequence("1", new=4, **wishes, **penalties, stop_token_ids=frozenset([5, 6])))
  finish(house, device)
  house.add(sequence("2", new=4))
  step(house, device)
  sampling = house.plan().decode.sampling
  assert not (sampling.filters or sampling.penalizes or sampling.top)
  fresh = formula.empty_row(sampling)
  for name, value in fresh.items():
    np.testing.assert_array_equal(getattr(sampling, name)[0], value, name)


def test_wrong_sizes_are_named():
  for name, value in (("slots", 0), ("rows", 0), ("chunk", 0), ("steps", 0)):
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
      batcher(**{name: value})
  with pytest.raises(ValueError, match=r"prefill_chunk: expected a divisor of page_size \(4\)"):
    batcher(chunk=3)
  with pytest.raises(
    ValueError, match=r"max_total_tokens: expected at least context_length \(32\)"
  ):
    batcher(pages=7)
