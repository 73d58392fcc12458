"""The engine's thread with a device that is a formula: commands, events, updates, failures."""

import asyncio

import engine_formula as formula
import pytest
from engine_house import PATIENCE, House, run

from intellect3.inference.engine.loop import UpdateRefused, Weights


@pytest.fixture
def house():
  made = House()
  yield made
  made.open_gate()
  assert made.engine.stop() and not made.failures


def test_an_exception_in_a_step_is_told_and_ends_the_thread():
  house = House()
  house.device.failure = FloatingPointError("broken")
  house.submit("a")
  with house.told:
    assert house.told.wait_for(lambda: house.failures, PATIENCE)
  assert [type(error) for error in house.failures] == [FloatingPointError]
  house.engine._thread.join(PATIENCE)
  assert not house.engine.alive


def test_seeds_come_from_the_request_or_from_the_engines_generator():
  def seeds():
    house = House(seed=5)
    for rid, seed in (("a", None), ("b", 7), ("c", None)):
      house.submit(rid, seed=seed)
    house.wait_for("a", "b", "c")
    assert house.engine.stop()
    return [house.finished[rid].seed for rid in "abc"]

  first = seeds()
  assert first[1] == 7 and first[0] != first[2] and first == seeds()
  assert max(first) >= 2**32


def test_progress_is_told_of_streams_and_of_all_their_end(house):
  house.submit("plain", new=6)
  house.submit("stream", new=6, stream=True)
  house.wait_for("plain", "stream")
  told = {
    rid: [(e.length, e.finished) for e in house.events if e.sequence.request.rid == rid]
    for rid in ("plain", "stream")
  }
  assert told == {
    "plain": [(6, True)],
    "stream": [(1, False), (3, False), (5, False), (6, True)],
  }


def test_in_place_keeps_everything_where_it_is(house):
  async def scenario():
    house.close_gate()
    running = house.submit("a", new=9)
    house.let()
    await house.between_steps(lambda: house.engine.pause("in_place"))
    steps, length = house.engine.steps, len(running.output_ids)
    house.submit("b", new=1)
    house.open_gate()
    assert await house.engine.abort("nobody") == 0  # the thread is at work, and computes nothing
    assert house.engine.paused and house.engine.steps == steps
    assert len(running.output_ids) == length and running.slot is not None
    assert (house.engine.num_running, house.engine.num_waiting) == (1, 1)
    await house.engine.resume()
    await asyncio.to_thread(house.wait_for, "a", "b")
    assert running.retractions == 0

  run(scenario)


def test_retract_sends_running_requests_back(house):
  async def scenario():
    house.close_gate()
    running = house.submit("a", new=9)
    house.let()
    await house.between_steps(lambda: house.engine.pause("retract"))
    assert running.slot is None and running.output_ids and running.retractions == 1
    assert (house.engine.num_running, house.engine.num_waiting) == (0, 1)
    house.open_gate()
    await house.engine.resume()
    await asyncio.to_thread(house.wait_for, "a")
    formula.check_whole(running)

  run(scenario)


def test_abort_ends_all_with_what_they_have(house):
  async def scenario():
    house.close_gate()
    running = [house.submit(rid, new=9) for rid in "abc"]  # two slots: one waits
    house.let()
    await house.between_steps(lambda: house.engine.pause("abort"))
    assert house.finished.keys() == set("abc")
    assert [len(who.output_ids) > 0 for who in running] == [True, True, False]
    assert all(who.finish["type"] == "abort" and who.finished for who in running)
    assert [e.length for e in house.events] == [len(e.sequence.output_ids) for e in house.events]

  run(scenario)


def test_unknown_pause_modes_are_refused(house):
  with pytest.raises(ValueError, match="mode: expected one of abort, in_place, retract, got 'no'"):
    house.engine.pause("no")


def test_an_update_in_place_with_a_flush_is_refused_and_changes_nothing(house):
  async def scenario():
    house.close_gate()
    house.submit("a", new=9)
    house.let()
    await house.between_steps(lambda: house.engine.pause("in_place"))
    with pytest.raises(UpdateRefused, match="not updated: flush_cache was asked and 1 requests"):
      await house.update(1)
    assert house.device.params == 0 and house.engine.weights == Weights("dir", "0")
    assert not house.engine.updating
    await house.update(1, flush=False)
    assert house.device.params == 1 and house.engine.weights == Weights("dir1", "1")
    house.open_gate()
    await house.engine.resume()
    await asyncio.to_thread(house.wait_for, "a")
    assert [version for version, *_ in house.finished["a"].spans] == ["0", "1"]

  run(scenario)


def test_without_a_pause_earlier_requests_finish_first_and_later_ones_wait(house):
  async def scenario():
    house.close_gate()
    for rid in ("early", "early too", "waiting"):
      house.submit(rid, new=8)
    house.let()
    house.wait_at_gate()
    swapped = house.update(1)
    house.submit("late")
    house.open_gate()
    await swapped
    assert {"early", "early too", "waiting"} <= house.finished.keys()
    await asyncio.to_thread(house.wait_for, "late")

  run(scenario)
  assert [house.finished[rid].spans for rid in ("early", "waiting")] == [[["0", 0, 8]]] * 2
  assert house.finished["late"].spans == [["1", 0, 5]]


def test_an_update_may_abort_instead_of_waiting(house):
  async def scenario():
    house.close_gate()
    house.submit("running", new=25)
    house.let()
    await house.between_steps(lambda: house.update(1, abort=True))
    assert house.finished["running"].finish["type"] == "abort"
    assert house.engine.weights == Weights("dir1", "1")

  run(scenario)


def test_requests_held_by_an_update_can_be_aborted(house):
  async def scenario():
    house.close_gate()
    house.submit("early", new=20)
    house.let()
    house.wait_at_gate()
    swapped = house.update(1)
    held = house.submit("held")
    assert await house.between_steps(lambda: house.engine.abort("held")) == 1
    assert house.engine.updating and held.finish["type"] == "abort" and held.output_ids == []
    house.open_gate()
    await swapped

  run(scenario)
  house.wait_for("early", "held")


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_ends_the_wait_of_an_update(house, mode):
  async def scenario():
    house.close_gate()
    house.submit("early", new=25)
    house.let()
    house.wait_at_gate()
    swapped = house.update(1, flush=mode == "retract")
    await house.between_steps(lambda: house.engine.pause(mode))
    await asyncio.wait_for(swapped, PATIENCE)
    house.open_gate()
    await house.engine.resume()

  run(scenario)
  house.wait_for("early")
  assert [version for version, *_ in house.finished["early"].spans] == ["0", "1"]


def test_a_client_that_goes_away_stops_no_command(house):
  async def scenario():
    house.close_gate()
    house.submit("a")
    house.wait_at_gate()
    paused, swapped = house.engine.pause("in_place"), house.update(1, flush=False)
    paused.cancel(), swapped.cancel()
    house.open_gate()
    assert await house.engine.abort() == 1
    assert await house.engine.abort() == 0  # the loop has been round once more
    assert house.engine.paused
    while house.engine.weights.version != "1":  # noqa: ASYNC110 - prepared in a thread
      await asyncio.sleep(0.01)

  run(scenario)


def ask_again(house, rid):
  """How many tokens of the prompt that all these tests use are found."""
  who = house.submit(rid, new=4, prompt=range(12))
  house.wait_for(rid)
  return who.cached_tokens


def test_an_update_forgets_every_prefix(house):
  assert [ask_again(house, "1"), ask_again(house, "2")] == [0, 11]

  async def scenario():
    house.close_gate()
    house.submit("half way", new=12, prompt=range(12))
    house.let()
    await house.between_steps(lambda: house.engine.pause("in_place"))
    await house.update(1, flush=False)
    house.open_gate()
    await house.engine.resume()
    await asyncio.to_thread(house.wait_for, "half way")

  run(scenario)
  # What the one in the middle of it leaves behind is of two versions, and nobody's prefix.
  assert [ask_again(house, "3"), ask_again(house, "4")] == [0, 11]


def test_flushing_is_for_an_idle_engine(house):
  assert ask_again(house, "1") == 0

  async def scenario():
    house.close_gate()
    house.submit("running", new=4)
    assert await house.between_steps(lambda: house.engine.flush_cache()) is False
    await house.between_steps(lambda: house.engine.pause("retract"))
    assert await house.engine.flush_cache() is False
    house.open_gate()
    await house.engine.resume()
    await asyncio.to_thread(house.wait_for, "running")
    assert house.engine.stats()["prefix_tokens"] > 0
    assert await house.engine.flush_cache() is True
    assert house.engine.stats()["prefix_tokens"] == 0

  run(scenario)
  assert ask_again(house, "2") == 0


@pytest.mark.parametrize("tags", [("kv_cache",), ("weights",), ("kv_cache", "weights")])
def test_without_memory_requests_wait_and_weights_can_come(house, tags):
  assert ask_again(house, "1") == 0

  async def scenario():
    house.close_gate()
    running = house.submit("running", new=20)
    with pytest.raises(ValueError, match="expected no running requests, got 1"):
      await house.between_steps(lambda: house.engine.release_memory(tags))
    assert not house.device.released
    await house.between_steps(lambda: house.engine.pause("retract"))
    await house.engine.release_memory(tags)
    assert house.device.released == set(tags)
    house.open_gate()
    await house.engine.resume()
    steps = house.engine.steps
    house.submit("late")
    await asyncio.wait_for(house.update(1), PATIENCE)
    assert house.engine.weights.version == "1" and house.engine.steps == steps
    await house.engine.resume_memory(tags)
    await asyncio.to_thread(house.wait_for, "running", "late")
    assert [version for version, *_ in running.spans] == ["0", "1"]

  run(scenario)
  assert ask_again(house, "2") == 0


def test_stats_are_those_of_what_was_done(house):
  def delta(work):
    before = house.engine.stats()
    work()
    after = house.engine.stats()
    return {name: after[name] - before[name] for name in before if after[name] != before[name]}

  assert house.engine.stats()["max_total_tokens"] == 16 * 4
  first = delta(lambda: ask_again(house, "1"))
  # 12 prompt tokens in two calls of 2 rows of 4; then 1, 2 and 1 output tokens.
  assert first == {
    "prompt_tokens": 12,
    "prefilled_tokens": 12,
    "generated_tokens": 4,
    "prefix_tokens": 12,
    "steps": 4,
    "prefill_calls": 2,
    "decode_calls": 2,
  }
  second = delta(lambda: ask_again(house, "2"))
  assert second == {
    "prompt_tokens": 12,
    "prefilled_tokens": 1,
    "cached_tokens": 11,
    "generated_tokens": 4,
    "steps": 3,
    "prefill_calls": 1,
    "decode_calls": 2,
  }

  async def scenario():
    house.close_gate()
    house.submit("3", new=9, prompt=range(20, 32), stream=True)
    house.let(2)
    await house.between_steps(lambda: house.engine.pause("retract"))
    stats = house.engine.stats()
    assert stats["paused"] and not stats["updating"]
    assert (stats["running_requests"], stats["waiting_requests"], stats["retractions"]) == (0, 1, 1)
    assert stats["used_tokens"] == 0
    house.engine.submit(formula.request("4"))
    await house.engine.abort("4")
    house.open_gate()
    await house.engine.resume()
    await asyncio.to_thread(house.wait_for, "3")
    # Three outputs are sampled, two of them in the cache with the prompt, which is found again.
    assert house.engine.stats()["reprefilled_tokens"] == 2

  run(scenario)


@pytest.mark.parametrize("paused", [False, True])
def test_it_stops(paused):
  async def scenario():
    house = House()
    if paused:
      await house.engine.pause("in_place")
    assert house.engine.alive and house.engine.stop() and not house.engine.alive

  run(scenario)
