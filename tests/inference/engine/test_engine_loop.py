"""The engine's thread with a device that is a formula: commands, failures, seeds."""

import asyncio
import threading
import time

import numpy as np
import pytest

from intellect3.inference.engine.batcher import Batcher
from intellect3.inference.engine.loop import Engine, UpdateRefused, Weights
from intellect3.inference.engine.request import Request
from intellect3.inference.engine.steps import Sampled


class FormulaDevice:
  """Samples the version of its weights; can be told to be slow or to fail."""

  def __init__(self):
    self.params, self.failure, self.seconds = 0, None, 0.0

  def run(self, plan):
    time.sleep(self.seconds)
    if self.failure is not None:
      raise self.failure

    def rows(sampling):
      count = len(sampling.positions_R)
      return Sampled(np.full(count, self.params, np.int32), np.zeros(count, np.float32))

    return tuple(
      None if half is None else rows(half.sampling) for half in (plan.prefill, plan.decode)
    )

  def swap(self, params):
    self.params = params


class House:
  """An engine and what it has finished."""

  def __init__(self, seed=0):
    self.device, self.finished, self.failures = FormulaDevice(), {}, []
    self.event = threading.Event()
    self.engine = Engine(
      self.device,
      Batcher(slots=2, prefill_rows=2, prefill_chunk=4),
      Weights("dir", "0"),
      seed=seed,
      on_finished=self.take,
      on_failure=self.fail,
    )

  def take(self, sequences):
    self.finished |= {sequence.request.rid: sequence for sequence in sequences}
    self.event.set()

  def fail(self, error):
    self.failures.append(error)
    self.event.set()

  def submit(self, rid, new=3, **more):
    return self.engine.submit(
      Request(rid=rid, input_ids=[1, 2], max_new_tokens=new, temperature=1.0, **more)
    )

  def wait_until_running(self):
    while self.engine.num_running == 0:
      time.sleep(0.001)

  def wait_for(self, *rids):
    while not set(rids) <= set(self.finished):
      assert self.event.wait(10), self.finished
      self.event.clear()


@pytest.fixture
def house():
  made = House()
  made.engine.start()
  yield made
  assert made.engine.stop()


def update(house, version, *, flush=True, abort=False):
  weights = Weights(f"dir{version}", str(version))
  return house.engine.update(version, weights, flush_cache=flush, abort_running=abort)


def test_an_exception_in_a_step_is_told_and_ends_the_thread():
  house = House()
  house.engine.start()
  house.device.failure = FloatingPointError("broken")
  house.submit("a")
  assert house.event.wait(10)
  assert [type(error) for error in house.failures] == [FloatingPointError]
  house.engine._thread.join(10)
  assert not house.engine.alive


def test_seeds_come_from_the_request_or_from_the_engines_generator():
  def seeds():
    house = House(seed=5)
    house.engine.start()
    for rid, seed in (("a", None), ("b", 7), ("c", None)):
      house.submit(rid, seed=seed)
    house.wait_for("a", "b", "c")
    house.engine.stop()
    return [house.finished[rid].seed for rid in "abc"]

  first = seeds()
  assert first[1] == 7 and first[0] != first[2] and first == seeds()


def test_an_update_in_place_with_a_flush_is_refused_and_changes_nothing(house):
  async def scenario():
    house.device.seconds = 0.02  # commands fall between two steps
    house.submit("a", new=6)
    await asyncio.to_thread(house.wait_until_running)
    await house.engine.pause("in_place")
    assert house.engine.num_running == 1
    with pytest.raises(UpdateRefused, match="not updated"):
      await update(house, 1)
    assert house.device.params == 0 and house.engine.weights.version == "0"
    await update(house, 1, flush=False)
    await house.engine.resume()

  asyncio.run(scenario())
  house.wait_for("a")
  assert [version for version, *_ in house.finished["a"].spans] == ["0", "1"]


def test_without_a_pause_earlier_requests_finish_first_and_later_ones_wait(house):
  async def scenario():
    house.device.seconds = 0.02  # commands fall between two steps
    house.submit("early", new=8)
    await asyncio.to_thread(house.wait_until_running)
    swapped = update(house, 1)
    house.submit("late")
    await swapped

  asyncio.run(scenario())
  house.wait_for("early", "late")
  assert house.finished["early"].spans == [["0", 0, 8]]
  assert house.finished["late"].spans == [["1", 0, 3]]


def test_an_update_may_abort_instead_of_waiting(house):
  async def scenario():
    house.device.seconds = 0.02  # commands fall between two steps
    house.submit("running", new=500)
    await asyncio.to_thread(house.wait_until_running)
    await update(house, 1, abort=True)

  asyncio.run(scenario())
  house.wait_for("running")
  assert house.finished["running"].finish["type"] == "abort"
  assert house.engine.weights == Weights("dir1", "1")


def test_requests_held_by_an_update_can_be_aborted(house):
  async def scenario():
    house.device.seconds = 0.02  # commands fall between two steps
    house.submit("early", new=20)
    await asyncio.to_thread(house.wait_until_running)
    swapped = update(house, 1)
    house.submit("held")
    assert await house.engine.abort("held") == 1
    await swapped

  asyncio.run(scenario())
  house.wait_for("early", "held")
  assert (
    house.finished["held"].output_ids == [] and house.finished["held"].finish["type"] == "abort"
  )


def test_a_pause_ends_the_wait_of_an_update(house):
  async def scenario():
    house.device.seconds = 0.02  # commands fall between two steps
    house.submit("early", new=50)
    await asyncio.to_thread(house.wait_until_running)
    swapped = update(house, 1, flush=False)
    await house.engine.pause("in_place")
    await asyncio.wait_for(swapped, 5)
    await house.engine.resume()

  asyncio.run(scenario())
  house.wait_for("early")
  assert [version for version, *_ in house.finished["early"].spans] == ["0", "1"]


def test_unknown_pause_modes_are_refused(house):
  with pytest.raises(ValueError, match="in_place"):
    house.engine.pause("nope")
