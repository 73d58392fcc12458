"""Events that are made of others: a good while in which all goes well, but for the stragglers."""

from tests.simulation.history import POLL
from tests.simulation.history_events import History as Single
from tests.simulation.history_tasks import Broken

STAGES = ("score", "write", "land", "train", "pause", "load", "resume", "canary", "half")
"""Where a turn may be left: `half` is when the first server has the new weights."""


class History(Single):
  """A world that things happen to, one by one or many at a time."""

  def finish(self, which, count, pattern, kind, span, late):
    """`count` rollouts end, but for the oldest `which`: `pattern` is their rewards, bit by bit."""
    running = sorted(key for link in self.links.values() for key in link.running)
    begin = which % max(1, len(running))
    for place, key in enumerate(running[begin : begin + count]):
      self.end(key, float(pattern >> place & 1), kind, span, late)

  def bring(self, which):
    """A server does all that it is asked to."""
    waiting = [double for double in self.doubles.values() if double.calls]
    if not waiting:
      return
    double = waiting[which % len(waiting)]
    while double.calls and not self.over:
      what = double.calls[0].what
      place = [other for other, _ in self.calls(what)].index(double)
      getattr(self, what)(place, "ok")

  def lose(self, which):
    """A server is gone, and is missed."""
    self.die(which)
    self.wait(POLL)

  def forsake(self):
    """All workers are gone, and none comes in time."""
    while self.links and not self.over:
      self.leave(0)
    self.wait(101.0)

  def relapse(self, which, how):
    """A server is gone, comes back, and fails the canary of the version that it had served."""
    self.lose(which)
    self.back(which, False)
    self.wait(POLL)
    for what in ("pause", "load", "resume"):
      getattr(self, what)(0, "ok")
    self.canary(0, how)

  def relist(self, which):
    """A server leaves the list and joins it again: what it was fenced for is forgotten."""
    self.listing(which)
    self.listing(which)

  def turn(self, rounds, which, count, pattern, span, stop=None):
    """Rollouts end, see `finish`, and whatever waits is done; `rounds` times.

    The last time only until `stop`, one of `STAGES`, is next.
    """
    for left in reversed(range(rounds)):
      last = stop if left == 0 else None
      while not self.over and any(double.calls for double in self.doubles.values()):
        self.bring(0)
      if last == "score":
        return
      while not self.over and any(link.exams for link in self.links.values()):
        self.score(0, float(pattern & 1), False)
      self.finish(which, count, pattern, "ok", span, False)
      if last == "write":
        return
      while not self.over and any(link.writes for link in self.links.values()):
        self.write(0, "ok")
      if last == "land":
        return
      self.land("ok")
      if last == "train":
        return
      self.train(len(self.untrained), False)
      if last is not None:
        self._update_until(last)
        return
      self.wait(1.0)

  def _update_until(self, stop):
    for what in ("pause", "load", "resume", "canary"):
      if what == stop:
        return
      getattr(self, what)(0, "ok")

  def straggle(self, rounds, count, pattern, span):
    """The oldest rollouts run on while others end, are trained on, and change the weights."""
    self.turn(rounds, self.config.group, 1 << 10, 0x9A5C36, "fresh")
    while not self.over and any(double.calls for double in self.doubles.values()):
      self.bring(0)
    self.finish(0, count, pattern, "ok", span, False)

  def finish_everything(self):
    """All faults are over. The run comes to its end in bounded time, whatever went before."""
    self.finishing, lines = len(self.events), len(self.lines)
    for turn in range(60 * (self.config.steps + 1)):
      if self.done:
        return
      if self.over:
        self.restart(False)
      for _ in self.names:
        self.join()
      for index, double in enumerate(self.doubles.values()):
        self.back(0, False)
        if turn % 8 == 7 and double.good is None and not double.calls:
          self.relist(index)
        if not double.listed:
          self.listing(index)
      while not self.over and any(link.unheard for link in self.links.values()):
        self.hear(0, False)
      self.turn(1, 0, 1 << 10, (0b1001, 0b0110, 0b0101)[turn % 3] * 0x1111, "spanning")
      self.wait(1.0 if self.told else POLL)
    del self.lines[lines + 40 :]
    raise Broken(self.story("the run never ends", self.loop.waiting()))
