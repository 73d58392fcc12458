"""A house of fixed small sizes with a compiled device in it, and sequences run through both."""

import engine_formula as formula
import numpy as np

from intellect3.inference.engine.device import Device
from intellect3.inference.engine.programs import Shape
from tests.models import helpers

CONFIG = helpers.small()
CONTEXT, SLOTS, PAGES, PAGE, CHUNK, TOP = 64, 4, 36, 8, 4, 3
SHAPE = Shape(steps=4, max_top=TOP, experts=True)


def house(**more):
  sizes = {"slots": SLOTS, "pages": PAGES, "page": PAGE, "rows": 3, "chunk": CHUNK, "steps": 4}
  return formula.batcher(**{**sizes, "context": CONTEXT, **more})


def make_device(config, params):
  made = Device(
    config,
    params,
    slots=SLOTS,
    pages=PAGES,
    page_size=PAGE,
    context_length=CONTEXT,
    shape=SHAPE,
  )
  made.warm_up(*house().padding())
  return made


def serve(device, arrivals, rooms=None, events=()):
  """Runs sequences that arrive at given steps; returns them by rid.

  Args:
    device: computes.
    arrivals: (step, sequence) pairs.
    rooms: the batcher.
    events: (step, function of the batcher) pairs.
  """
  rooms = house(deterministic=True) if rooms is None else rooms
  for turn in range(1000):
    for at, who in arrivals:
      if at == turn:
        rooms.add(who)
    for at, event in events:
      if at == turn:
        event(rooms)
    formula.step(rooms, device.run)
    if rooms.idle and all(at <= turn for at, _ in arrivals):
      return {who.request.rid: who for _, who in arrivals}
  raise AssertionError("not all of them end")


def prompt_of(length, seed=0):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()
