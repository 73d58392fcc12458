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
  steps=st.sampled_from([6, 9, 3]),
  prompts=st.sampled_from([2, 1, 3]),
  group=st.integers(2, 3),
  off_policy=st.sampled_from([1, 2, 0]),
  in_flight=st.sampled_from([12, 24, 6, 3]),
  rule=st.sampled_from(["drop", "mask"]),
  order=st.sampled_from(["completion", "dispatch"]),
  drop_zero=st.booleans(),
  drop_truncated=st.booleans(),
  decay=st.sampled_from([None, 0.5]),
  pools=st.booleans(),
)
which = st.integers(0, 7)
spans = st.sampled_from(["old", "spanning", "fresh"])
patterns = st.sampled_from([0x555555, 0x9A5C36, 0x333333, 0, 0xFFFFFF])

ARGUMENTS = {
  "turn": st.tuples(
    st.sampled_from([1, 4, 6]), which, st.sampled_from([24, 12, 5, 2]), patterns, spans
  ),
  "straggle": st.tuples(st.integers(1, 4), st.integers(1, 3), patterns, spans),
  "finish": st.tuples(
    which,
    st.integers(1, 6),
    patterns,
    st.sampled_from(["ok", "error", "truncated", "empty"]),
    spans,
    st.booleans(),
  ),
  "bring": st.tuples(which, st.sampled_from(["ok", "ok", "lost", "fenced"])),
  "hear": st.tuples(which, st.booleans()),
  "write": st.tuples(which, st.sampled_from(["ok", "ok", "ok", "late", "fails"])),
  "land": st.tuples(st.sampled_from(["ok", "ok", "ok", "fails", "torn"])),
  "train": st.tuples(st.integers(1, 3)),
  "join": st.tuples(),
  "ghost": st.tuples(),
  "leave": st.tuples(which),
  "server_lost": st.tuples(which, st.booleans()),
  "server_back": st.tuples(which),
  "wait": st.tuples(st.sampled_from([1.0, 60.0, 101.0])),
  "restart": st.tuples(st.booleans()),
}
FAULTS = ("leave", "server_lost", "wait", "restart")
"""Events that are one in six at most: else nothing would ever be trained."""


def possible(history, calm):
  """The events that fit the moment, the likelier ones several times; no fault where it is calm."""
  links = history.links.values()
  if history.over:
    return ["restart"]
  return [
    name
    for name, times in (
      ("turn", 3),
      ("straggle", 2),
      ("join", 2 * (len(history.links) < len(history.names))),
      ("bring", 2 * (history.syncing is not None)),
      ("leave", bool(links)),
      ("wait", 1),
      ("server_lost", bool(history.told)),
      ("restart", 1),
      ("server_back", None in history.served.values()),
      ("ghost", bool(history.ghosts)),
      ("write", 2 * any(link.writes for link in links)),
      ("land", 2 * (history.landing is not None)),
      ("train", bool(history.untrained)),
      ("hear", 2 * any(link.unheard for link in links)),
      ("finish", 2 * any(link.running for link in links)),
    )
    for _ in range(int(times))
    if not (calm and name in FAULTS)
  ]


class Histories(stateful.RuleBasedStateMachine):
  """One history."""

  make = None
  history = None
  broken = False
  events = faults = 0

  @stateful.initialize(
    config=configs, workers=st.integers(1, 3), servers=st.integers(1, 2), up=st.booleans()
  )
  def begin(self, config, workers, servers, up):
    given = {} if self.make is None else {"make": self.make}
    self.history = History(config, workers=workers, servers=servers, **given)
    for _ in range(workers if up else 0):
      self.do("join")
    for _ in range(servers if up else 0):
      self.do("bring", 0, "ok")

  @stateful.rule(data=st.data())
  def happen(self, data):
    if self.history.done:
      return
    calm = 6 * self.faults >= self.events
    event = data.draw(st.sampled_from(possible(self.history, calm)), label="event")
    self.events += 1
    self.faults += event in FAULTS
    self.do(event, *data.draw(ARGUMENTS[event], label="arguments"))

  def do(self, event, *arguments):
    try:
      getattr(self.history, event)(*arguments)
    except BaseException:
      self.broken = True
      raise

  def teardown(self):
    if self.history is None:
      return
    try:
      if not self.broken:
        self.history.finish_everything()
    finally:
      self.history.close()


def search(machine, *, examples, steps, shrink=True):
  """Raises what the smallest history found raises."""
  stateful.run_state_machine_as_test(
    machine,
    settings=hypothesis.settings(
      max_examples=examples,
      stateful_step_count=steps,
      deadline=None,
      derandomize=True,
      database=None,
      phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
      suppress_health_check=list(hypothesis.HealthCheck),
    ),
  )


def test_every_history_keeps_the_contracts_and_ends():
  search(Histories, examples=250, steps=30)


@pytest.mark.slow
def test_many_long_histories_keep_the_contracts_and_end():
  search(Histories, examples=MANY, steps=60)
