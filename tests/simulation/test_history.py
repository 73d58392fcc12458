"""Hypothesis writes histories of a run; the orchestrator must keep its contracts in each.

What is drawn: results of every kind, late and doubled messages, workers and servers that leave and
come back, syncs in parts, several versions at once, batches that fail, are late or half done, and
restarts from the last manifest. After each event the rules of `history` hold; once nothing fails
any more the run reaches its last step.
"""

import os

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from tests.simulation.history_events import History
from tests.simulation.history_ledger import Config

MANY = int(os.environ.get("HISTORIES", "3000"))

configs = st.builds(
  Config,
  steps=st.integers(2, 6),
  prompts=st.integers(1, 2),
  group=st.integers(2, 3),
  off_policy=st.integers(0, 2),
  in_flight=st.sampled_from([3, 6, 12, 24]),
  rule=st.sampled_from(["drop", "mask"]),
  order=st.sampled_from(["completion", "dispatch"]),
  drop_zero=st.booleans(),
  drop_truncated=st.booleans(),
  decay=st.sampled_from([None, 0.5]),
  pools=st.booleans(),
)
some = st.integers(0, 7)
FAULTS = ("leave", "restart", "server_lost", "wait")


def when(holds):
  """Of an event that can happen where this holds of the history, while the run goes on."""
  return stateful.precondition(lambda self: not self.history.over and bool(holds(self.history)))


def rarely(holds):
  """The same, and there were not too many faults of late: else nothing is ever trained."""
  return stateful.precondition(
    lambda self: (
      not self.history.over and bool(holds(self.history)) and 10 * self.faults < self.events
    )
  )


def anyone(attribute):
  return when(lambda history: any(getattr(link, attribute) for link in history.links.values()))


class Histories(stateful.RuleBasedStateMachine):
  """One history."""

  make = None
  history = None

  @stateful.initialize(
    config=configs, workers=st.integers(1, 3), servers=st.integers(1, 2), up=st.booleans()
  )
  def begin(self, config, workers, servers, up):
    given = {} if self.make is None else {"make": self.make}
    self.history = History(config, workers=workers, servers=servers, **given)
    self.broken, self.events, self.faults = False, 0, 0
    for _ in range(workers if up else 0):
      self.do("join")
    for _ in range(servers if up else 0):
      self.do("bring", 0, "ok")

  def do(self, event, *arguments):
    self.events += 1
    self.faults += event in FAULTS
    try:
      getattr(self.history, event)(*arguments)
    except BaseException:
      self.broken = True
      raise

  @when(lambda history: len(history.links) < len(history.names))
  @stateful.rule()
  def join(self):
    self.do("join")

  @when(lambda history: history.syncing is not None)
  @stateful.rule(which=some, how=st.sampled_from(["ok", "ok", "ok", "lost", "fenced"]))
  def bring(self, which, how):
    self.do("bring", which, how)

  @anyone("running")
  @stateful.rule(
    which=some,
    count=st.sampled_from([1, 2, 3, 6]),
    pattern=st.integers(0, 63),
    kind=st.sampled_from(["ok", "ok", "ok", "error", "truncated", "empty"]),
    span=st.sampled_from(["old", "fresh", "spanning"]),
    late=st.booleans(),
  )
  def finish(self, which, count, pattern, kind, span, late):
    self.do("finish", which, count, pattern, kind, span, late)

  @anyone("running")
  @stateful.rule(which=some, count=st.integers(1, 12), pattern=st.integers(0, 63))
  def finish_many(self, which, count, pattern):
    self.do("finish", which, count, pattern, "ok", "old", False)

  @when(lambda history: True)
  @stateful.rule(
    which=some,
    count=st.integers(1, 12),
    pattern=st.integers(0, 63),
    span=st.sampled_from(["old", "fresh", "spanning"]),
  )
  def turn(self, which, count, pattern, span):
    self.do("turn", which, count, pattern, span)

  @when(lambda history: history.untrained)
  @stateful.rule()
  def weights(self):
    self.do("new_weights")

  @anyone("unheard")
  @stateful.rule(which=some, twice=st.booleans())
  def hear(self, which, twice):
    self.do("hear", which, twice)

  @anyone("writes")
  @stateful.rule(which=some, how=st.sampled_from(["ok", "ok", "ok", "late", "fails"]))
  def write(self, which, how):
    self.do("write", which, how)

  @when(lambda history: history.landing is not None)
  @stateful.rule(how=st.sampled_from(["ok", "ok", "ok", "fails", "torn"]))
  def land(self, how):
    self.do("land", how)

  @when(lambda history: history.untrained)
  @stateful.rule(count=st.integers(1, 3))
  def train(self, count):
    self.do("train", count)

  @rarely(lambda history: history.links)
  @stateful.rule(which=some)
  def leave(self, which):
    self.do("leave", which)

  @when(lambda history: history.ghosts)
  @stateful.rule()
  def ghost(self):
    self.do("ghost")

  @rarely(lambda history: history.told)
  @stateful.rule(which=some, fenced=st.booleans())
  def server_lost(self, which, fenced):
    self.do("server_lost", which, fenced)

  @when(lambda history: None in history.served.values())
  @stateful.rule(which=some)
  def server_back(self, which):
    self.do("server_back", which)

  @rarely(lambda history: True)
  @stateful.rule(seconds=st.sampled_from([1.0, 1.0, 10.0, 60.0, 101.0]))
  def wait(self, seconds):
    self.do("wait", seconds)

  @stateful.precondition(lambda self: self.history.over or 10 * self.faults < self.events)
  @stateful.rule(ghosts=st.booleans())
  def restart(self, ghosts):
    self.do("restart", ghosts)

  def teardown(self):
    if self.history is None:
      return
    try:
      if not self.broken:
        self.history.finish_everything()
    finally:
      self.history.close()


def search(machine, *, examples, steps, shrink=True):
  phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]
  stateful.run_state_machine_as_test(
    machine,
    settings=hypothesis.settings(
      max_examples=examples,
      stateful_step_count=steps,
      deadline=None,
      derandomize=True,
      database=None,
      phases=phases,
      suppress_health_check=list(hypothesis.HealthCheck),
    ),
  )


def test_every_history_keeps_the_contracts_and_ends():
  search(Histories, examples=150, steps=40)


@pytest.mark.slow
def test_many_long_histories_keep_the_contracts_and_end():
  search(Histories, examples=MANY, steps=80)
