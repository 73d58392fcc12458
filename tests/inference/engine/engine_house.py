"""An engine over a device that is a formula, which computes a step when it is let.

So a test can give commands while a step is being computed, and knows after which step they are
carried out.
"""

import asyncio
import threading

import engine_formula as formula

from intellect3.inference.engine.loop import Engine, Weights

PATIENCE = 20


class GatedDevice:
  """Computes a step when it is let; serves a number as weights."""

  def __init__(self, rooms):
    self.params, self.failure, self.released = 0, None, frozenset()
    self.gate, self.arrived, self.open = threading.Semaphore(0), threading.Semaphore(0), True
    self._formula = formula.Formula(rooms)

  def run(self, plan):
    assert not self.released, "computed without memory"
    if not self.open:
      self.arrived.release()
      assert self.gate.acquire(timeout=PATIENCE)
    if self.failure is not None:
      raise self.failure
    return self._formula(plan)

  def swap(self, params):
    self.params = params

  def release(self, tags):
    self.released |= frozenset(tags)

  def resume(self, tags):
    self.released -= frozenset(tags)


class House:
  """An engine, what it told, and a hand on its gate."""

  def __init__(self, seed=0, **sizes):
    rooms = formula.batcher(**{"slots": 2, "steps": 2, **sizes})
    self.device, self.events, self.failures = GatedDevice(rooms), [], []
    self.told = threading.Condition()
    self.engine = Engine(
      self.device,
      rooms,
      Weights("dir", "0"),
      seed=seed,
      on_events=self.take,
      on_failure=self.fail,
    )
    self.engine.start()

  def take(self, events):
    with self.told:
      self.events += events
      self.told.notify_all()

  def fail(self, error):
    with self.told:
      self.failures.append(error)
      self.told.notify_all()

  @property
  def finished(self):
    return {event.sequence.request.rid: event.sequence for event in self.events if event.finished}

  def submit(self, rid, new=5, prompt=(1, 2), **more):
    return self.engine.submit(formula.request(rid, prompt, new, **more))

  def wait_for(self, *rids):
    with self.told:
      assert self.told.wait_for(lambda: set(rids) <= set(self.finished), PATIENCE), self.finished

  def close_gate(self):
    """From now on the device is at rest in each step until it is let."""
    self.device.gate, self.device.arrived = threading.Semaphore(0), threading.Semaphore(0)
    self.device.open = False

  def wait_at_gate(self):
    assert self.device.arrived.acquire(timeout=PATIENCE)
    self.device.arrived.release()

  def let(self, steps=1):
    for _ in range(steps):
      assert self.device.arrived.acquire(timeout=PATIENCE)
      self.device.gate.release()

  def open_gate(self):
    self.device.open = True
    self.device.gate.release(1000)

  async def between_steps(self, command):
    """Gives a command while a step is being computed; it is carried out after that step."""
    self.wait_at_gate()
    future = command()
    self.let()
    return await asyncio.wait_for(future, PATIENCE)

  def update(self, version, *, flush=True, abort=False):
    weights = Weights(f"dir{version}", str(version))
    return self.engine.update(version, weights, flush_cache=flush, abort_running=abort)


def run(scenario):
  async def limited():
    await asyncio.wait_for(scenario(), 3 * PATIENCE)

  asyncio.run(limited())
