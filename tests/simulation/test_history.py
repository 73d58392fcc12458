"""Hypothesis writes histories of a run; the orchestrator must keep its contracts in each.

What is drawn: results of every kind, late and doubled messages, workers and servers that leave and
come back, syncs in parts, several versions at once, batches that fail, are late or half done, and
restarts from the last manifest. After each event the rules of `history` hold; once nothing fails
any more the run reaches its last step.
"""

import collections
import dataclasses
import logging
import os

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from intellect3.rollouts import scheduler
from tests.simulation import history_smallest, history_turns
from tests.simulation.history_records import Config
from tests.simulation.history_tasks import Broken
from tests.simulation.history_turns import History

MANY = int(os.environ.get("HISTORIES", "3000"))

configs = st.builds(
  Config,
  steps=st.sampled_from([9, 6, 12]),
  prompts=st.sampled_from([2, 1, 3]),
  group=st.integers(2, 3),
  off_policy=st.sampled_from([1, 2, 0]),
  in_flight=st.sampled_from([12, 24, 6, 3]),
  rule=st.sampled_from(["drop", "mask"]),
  order=st.sampled_from(["completion", "completion", "dispatch"]),
  drop_zero=st.booleans(),
  drop_truncated=st.booleans(),
  decay=st.sampled_from([None, 0.5]),
  pools=st.sampled_from(["none", "mix", "leave", "solved"]),
  evaluation=st.sampled_from([0, 1, 3]),
  lag=st.sampled_from([0, 0, 1]),
  mode=st.sampled_from(["in_place", "retract"]),
).map(lambda config: dataclasses.replace(config, lag=min(config.lag, config.off_policy)))
which = st.integers(0, 7)
ends = st.sampled_from(["ok"] * 20 + ["refused", "lost", "unheard", "wrong"])
spans = st.sampled_from(["old", "spanning", "fresh"])
stages = st.sampled_from(history_turns.STAGES)
stops = st.none() | stages
patterns = st.sampled_from([0x555555, 0x9A5C36, 0x333333, 0, 0xFFFFFF])

ARGUMENTS = {
  "turn": st.tuples(
    st.sampled_from([1, 2, 4]), which, st.sampled_from([24, 12, 5, 2]), patterns, spans, stops
  ),
  "straggle": st.tuples(
    st.sampled_from([3, 2, 4]), st.integers(1, 3), patterns, st.sampled_from(["old", "spanning"])
  ),
  "finish": st.tuples(
    which,
    st.integers(1, 6),
    patterns,
    st.sampled_from(["ok", "error", "truncated", "empty", "unpublished"]),
    spans,
    st.booleans(),
  ),
  "bring": st.tuples(which),
  "pause": st.tuples(which, ends),
  "load": st.tuples(which, ends),
  "resume": st.tuples(which, ends),
  "canary": st.tuples(which, ends),
  "hear": st.tuples(which, st.booleans()),
  "echo": st.tuples(which),
  "score": st.tuples(which, st.sampled_from([1.0, 0.0, None]), st.booleans()),
  "write": st.tuples(which, st.sampled_from(["ok", "ok", "ok", "late", "fails", "fails late"])),
  "land": st.tuples(st.sampled_from(["ok", "ok", "ok", "fails", "torn"])),
  "train": st.tuples(st.integers(1, 3), st.sampled_from([False, False, False, True])),
  "join": st.tuples(),
  "ghost": st.tuples(),
  "leave": st.tuples(which),
  "die": st.tuples(which),
  "lose": st.tuples(which),
  "forsake": st.tuples(),
  "relapse": st.tuples(which, st.sampled_from(["wrong", "lost", "refused"])),
  "back": st.tuples(which, st.booleans()),
  "relist": st.tuples(which),
  "wait": st.tuples(st.sampled_from([20.0, 60.0, 1.0, 101.0])),
  "restart": st.tuples(st.booleans()),
  "midst": st.tuples(
    st.tuples(st.just(1), which, st.just(24), patterns, spans, stages),
    st.sampled_from(
      ["restart", "restart", "restart", "relapse", "relapse", "leave", "lose", "relist"]
    ),
  ),
}
FAULTS = ("leave", "forsake", "die", "lose", "relapse", "relist", "wait", "restart", "midst")
"""Events that are one in four at most: else nothing would ever be trained."""


CURES = ("wait", "relist")
"""Where there is no server, these help."""

UPDATE = {"pause": 3, "load": 4, "resume": 4, "canary": 6}
"""What a server is asked in turn, and how likely it is that it does: else few came to the end."""

MOMENTS = (
  "of a run that is over",
  "while collecting",
  "while evaluating",
  "while servers are brought weights",
  "before shards are written",
  "before a manifest is there",
)


def possible(history, calm):
  """The events that fit the moment, the likelier ones several times; no fault where it is calm."""
  links, doubles = history.links.values(), history.doubles.values()
  if history.over:
    return ["restart"]
  updating = any(double.calls for double in doubles)
  stuck = links and not (updating or history.told)
  return [
    name
    for name, times in (
      ("finish", 3 * any(link.running for link in links)),
      *((what, times * bool(history.calls(what))) for what, times in UPDATE.items()),
      ("write", 4 * any(link.writes for link in links)),
      ("land", 4 * (history.landing is not None)),
      ("train", 2 * bool(history.untrained)),
      ("hear", any(link.unheard for link in links)),
      ("score", 2 * any(link.exams for link in links)),
      ("ghost", 8 * bool(history.ghosts)),
      ("echo", 2 * bool(history.echoes)),
      ("bring", updating),
      ("turn", 1),
      ("straggle", 2),
      ("join", 2 * (len(links) < len(history.names))),
      ("back", not all(double.up for double in doubles)),
      ("leave", bool(links)),
      ("forsake", bool(links)),
      ("wait", 1),
      ("die", bool(history.told)),
      ("lose", bool(history.told)),
      ("relapse", bool(history.told)),
      ("restart", 1),
      ("midst", 3),
      ("relist", 1),
    )
    for _ in range(int(times))
    if not (calm and name in FAULTS and (not stuck or name not in CURES))
  ]


def moment(history):
  """What is under way, for a restart to break into."""
  if history.over:
    return "of a run that is over"
  if history.phase == "evaluating":
    return "while evaluating"
  if any(double.calls for double in history.doubles.values()):
    return "while servers are brought weights"
  if history.landing is not None:
    return "before a manifest is there"
  if any(link.writes for link in history.links.values()):
    return "before shards are written"
  return "while collecting"


class Histories(stateful.RuleBasedStateMachine):
  """One history."""

  make = scheduler.Scheduler
  history = None
  broken = None  # of the last that broke a rule: what it was given, its events, and the rule
  events = faults = 0
  drawn = None  # what has happened, of all histories of a search

  @stateful.initialize(
    config=configs, workers=st.integers(1, 3), servers=st.integers(1, 2), up=st.booleans()
  )
  def begin(self, config, workers, servers, up):
    self.drawn["histories"] += 1
    self.given = {"config": config, "workers": workers, "servers": servers, "make": self.make}
    self.history = History(**self.given)
    for _ in range(workers if up else 0):
      self.do("join")
    for _ in range(2 * servers if up else 0):  # to go on, then v0
      self.do("bring", 0)

  @stateful.rule(data=st.data())
  def happen(self, data):
    if self.history.done:
      return
    calm = 4 * self.faults >= self.events
    event = data.draw(st.sampled_from(possible(self.history, calm)), label="event")
    self.events += 1
    self.faults += event in FAULTS
    arguments = data.draw(ARGUMENTS[event], label="arguments")
    if event == "midst":  # of a turn
      self.drawn[event] += 1
      turn, fault = arguments
      self.do("turn", *turn)
      if not self.history.over:
        self.do(fault, *data.draw(ARGUMENTS[fault], label="arguments"))
    else:
      self.do(event, *arguments)

  def do(self, event, *arguments):
    """Lets something happen."""
    self.drawn[event] += 1
    if event == "restart":
      self.drawn[f"restart {moment(self.history)}"] += 1
    try:
      getattr(self.history, event)(*arguments)
    except Broken as broken:
      self.found(broken)
      raise

  def found(self, broken):
    reason, history = str(broken).partition("\n")[0], self.history
    events = history.events[: history.finishing if reason == history_smallest.NEVER else None]
    type(self).broken = self.given, events, reason

  def teardown(self):
    if self.history is None:
      return
    try:
      if type(self).broken is None:
        self.history.finish_everything()
    except Broken as broken:
      self.found(broken)
      raise
    finally:
      for fate, count in self.history.counts().items():
        self.drawn[f"rollouts {fate}"] += count
      self.history.close()


def search(machine, *, examples, steps):
  """Searches for a history that breaks a rule.

  Returns:
    How often each event was drawn, and in what moments the orchestrator was stopped.

  Raises:
    Broken: with the smallest history that was found.
  """
  drawn = collections.Counter()
  machine = type(machine.__name__, (machine,), {"broken": None, "drawn": drawn})
  try:
    stateful.run_state_machine_as_test(
      machine,
      settings=hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # shortened by `history_smallest`, event by event
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
      ),
    )
  except BaseException:
    if machine.broken is None:
      raise
  if machine.broken is not None:
    given, events, reason = machine.broken
    story = history_smallest.smallest(History, given, events, reason)
    raise Broken(story or f"{reason}\n(not told again the same way)")
  return drawn


def told(machine, **how):
  """Searches; of a history that breaks a rule the test tells, and of nothing else."""
  logging.disable(logging.CRITICAL)  # of all the others that were told
  story = None
  try:
    drawn = search(machine, **how)
  except Broken as broken:
    story = str(broken)
  finally:
    logging.disable(logging.NOTSET)
  if story is not None:  # out here, where no other exception is told of, too
    pytest.fail(story, pytrace=False)
  return drawn


def test_every_history_keeps_the_contracts_and_ends():
  drawn = told(Histories, examples=160, steps=30)
  # It has come to what it is for: each event, and a stop of the orchestrator in each moment.
  rare = [name for name in ARGUMENTS if not drawn[name]]
  stopped = [what for what in MOMENTS if drawn[f"restart {what}"]]
  assert not rare and len(stopped) >= 3, (rare, stopped, drawn)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_long_histories_keep_the_contracts_and_end():
  told(Histories, examples=MANY, steps=60)
