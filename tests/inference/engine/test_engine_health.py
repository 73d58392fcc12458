"""What the health routes see of an engine: work, pauses, missing memory, a stuck step."""

import asyncio

import pytest
from engine_house import House, run
from engine_http import MODEL_A
from scripted import ask, recorded_serving

from intellect3.inference.engine import control
from intellect3.inference.engine.app import make_app
from intellect3.inference.engine.desk import Desk


@pytest.fixture
def house():
  made = House()
  yield made
  made.open_gate()
  assert made.engine.stop() and not made.failures


def age(engine, seconds=1000.0):
  """Makes the last step older than it is."""
  engine._last_step -= seconds


def test_only_work_that_nothing_holds_back_can_stall(house):
  async def scenario():
    engine = house.engine
    age(engine)
    assert not engine.stalled(300)  # there is nothing to do
    house.close_gate()
    house.submit("a")
    house.wait_at_gate()
    assert not engine.stalled(300)  # the time before it came does not count
    age(engine)
    assert engine.stalled(300) and not engine.stalled(3000)
    house.let()
    house.wait_at_gate()
    assert not engine.stalled(300)  # a step has ended
    await house.between_steps(lambda: engine.pause("in_place"))
    age(engine)
    assert not engine.stalled(300)
    await engine.resume()
    house.wait_at_gate()
    assert not engine.stalled(300)  # nor does the pause

  run(scenario)


def health(house, *paths):
  """Asks over the engine of a house; returns the statuses."""

  async def scenario():
    serving = recorded_serving(MODEL_A)
    desk = Desk(asyncio.get_running_loop(), slots=2, queue_limit=4)
    app = make_app(house.engine, desk, serving)
    return [(await ask(app, "GET", path))[0] for path in paths]

  return asyncio.run(scenario())


def test_a_stuck_engine_is_not_healthy(house, monkeypatch):
  monkeypatch.setattr(control, "HEALTH_TIMEOUT_SECONDS", 0.05)
  assert health(house, "/health") == [200]
  house.close_gate()
  house.submit("a")
  house.wait_at_gate()
  assert health(house, "/health", "/health_generate") == [200, 503]
  age(house.engine, control.HEALTH_STALL_SECONDS)
  assert health(house, "/health", "/health_generate") == [503, 503]


def test_an_engine_without_memory_is_asked_for_no_token(house):
  async def scenario():
    await house.engine.release_memory(["kv_cache"])

  run(scenario)
  house.submit("waits")
  age(house.engine, 2 * control.HEALTH_STALL_SECONDS)
  assert health(house, "/health", "/health_generate") == [200, 200]
  assert not house.events

  async def back():
    await house.engine.resume_memory(["kv_cache"])

  run(back)
  house.wait_for("waits")
