"""The smallest history that breaks the same rule as a given one.

A history is a list of single events, and an event that does not fit its moment is none: whatever is
left out, the rest can be told again.
"""

import re

from tests.simulation.history_records import Config
from tests.simulation.history_tasks import Broken

SIMPLE = {
  "end": (None, None, "ok", "old", False),
  "score": (0, None, False),
  "hear": (0, False),
  "write": (0, "ok"),
  "land": ("ok",),
  "train": (None, False),
  "wait": (1.0,),
  "restart": (False,),
  "back": (0, False),
  **dict.fromkeys(("pause", "load", "resume", "canary"), (0, "ok")),
  **dict.fromkeys(("leave", "die", "listing", "echo"), (0,)),
}
"""The simplest arguments of events; None stands for one that is kept."""


def kind(reason):
  """What rule was broken, whichever the numbers."""
  return re.sub(r"\d+", "#", re.split(r"[\[({]", reason, maxsplit=1)[0])


MOST_FOR_TWO = 60  # events; of more there are too many pairs
NEVER = "the run never ends"


class Search:
  """Tells histories again. `make` builds one from the keywords that it is given."""

  def __init__(self, make, given, reason, budget):
    self._make, self._kind, self._left = make, kind(reason), budget
    self.given, self.events, self.told = given, None, None

  def again(self, given, events, *, fewer=0):
    """Takes this history where it breaks the rule too and is no longer; says whether."""
    if self._left <= 0:
      return False
    self._left -= 1
    history = None
    try:
      history = self._make(**given)
      for name, arguments in events:
        getattr(history, name)(*arguments)
      if self._kind == NEVER:
        history.finish_everything()
    except Broken as broken:
      done = (history.events if history else [])[: len(events)]
      longer = self.events is not None and len(done) > len(self.events) - fewer
      if longer or kind(str(broken).partition("\n")[0]) != self._kind:
        return False
      self.given, self.events, self.told = given, done, str(broken)
      return True
    finally:
      if history is not None:
        history.close()
    return False

  def leave_out(self):
    """Leaves out what can be, halves first, then quarters, then single events."""
    size = max(1, len(self.events) // 2)
    while True:
      begin = 0
      while begin < len(self.events):
        rest = self.events[:begin] + self.events[begin + size :]
        if not self.again(self.given, rest, fewer=1):
          begin += max(1, size // 2)
      if size == 1:
        return
      size //= 2

  def leave_out_two(self):
    """Leaves out two events that are not neighbours, as one may undo what the other did."""
    first = 0
    while first < len(self.events) <= MOST_FOR_TWO:
      second = first + 2
      while second < len(self.events):
        rest = [e for place, e in enumerate(self.events) if place not in (first, second)]
        if not self.again(self.given, rest, fewer=1):
          second += 1
      first += 1

  def simplify(self):
    """Takes the simplest run and the simplest arguments that do."""
    for field in vars(Config()):
      config = self.given["config"]
      plain = type(config)(**{**vars(config), field: getattr(Config(), field)})
      if plain != config:
        self.again({**self.given, "config": plain}, self.events)
    for field in ("workers", "servers"):
      if self.given[field] > 1:
        self.again({**self.given, field: self.given[field] - 1}, self.events)
    for place in range(len(self.events)):
      if place >= len(self.events):
        return
      name, arguments = self.events[place]
      plain = SIMPLE.get(name, arguments)
      simple = tuple(old if new is None else new for old, new in zip(arguments, plain, strict=True))
      if simple != arguments:
        self.again(self.given, [*self.events[:place], (name, simple), *self.events[place + 1 :]])


def smallest(make, given, events, reason, *, budget=1500):
  """Shortens a history that broke a rule.

  Args:
    make: builds a history from `given`.
    given: keywords: config, workers, servers.
    events: (name, arguments) of its single events.
    reason: the rule that it broke.
    budget: how many histories are told at most.

  Returns:
    The story of the smallest one found; None where the given one breaks nothing when told again.
  """
  if kind(reason) != NEVER:  # what a run needs to end is among the events, where it broke then
    budget *= 2
  search = Search(make, given, reason, budget)
  if not search.again(given, list(events)):
    return None
  before = None
  while before != (search.given, search.events):
    before = search.given, search.events
    search.leave_out()
    search.simplify()
    if before == (search.given, search.events):
      search.leave_out_two()
  return search.told
