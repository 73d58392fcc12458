"""A planted fault is found, and its smallest history is told line by line."""

import pytest

from intellect3.rollouts import scheduler
from tests.simulation import history_smallest, test_history
from tests.simulation.history_records import Config
from tests.simulation.history_tasks import Broken
from tests.simulation.history_turns import History


class Forgetful(scheduler.Scheduler):
  """Takes what had finished for safe where its worker is gone."""

  def again(self, rollout_ids):
    groups = {key: self._groups.get(self._group_of(key)) for key in rollout_ids}
    super().again([key for key, group in groups.items() if group and key in group.running])


class Sulking(scheduler.Scheduler):
  """Dispatches nothing any more once a worker has left."""

  def again(self, rollout_ids):
    super().again(rollout_ids)
    self._may_dispatch = lambda: False


class WithForgetful(test_history.Histories):
  make = Forgetful


class WithSulking(test_history.Histories):
  make = Sulking


@pytest.mark.slow
def test_a_planted_fault_is_found_and_told_as_a_short_history():
  with pytest.raises(Broken) as found:
    test_history.search(WithForgetful, examples=150, steps=20)
  reason, _, trace = str(found.value).partition("\n\n")
  lines = trace.splitlines()
  assert lines[-1].strip() == f"BROKEN: {reason}"
  assert len(lines) < 45
  assert any(" is gone" in line or " is fenced" in line for line in lines)


def test_a_failing_history_is_all_that_a_test_prints():
  with pytest.raises(pytest.fail.Exception) as failed:
    test_history.told(WithSulking, examples=150, steps=20)
  story = str(failed.value)
  assert not failed.value.pytrace and "Falsifying" not in story
  assert story.startswith("a group may be dispatched, and is not\n\n")
  assert len(story.splitlines()) < 45


STORY = """
a group may be dispatched, and is not

2 workers, 1 servers; 3 steps, 1 x 2 rollouts a step, at most 8 at once, at most 1 steps off policy
    time  has   what happens, and what the orchestrator does -> then
     0 s        the orchestrator starts
     0 s        worker_0 joins
     0 s        worker_1 joins
     0 s        http://0 goes on
              -> sync of v0
     0 s        worker_0 is gone
     0 s        http://0 pauses
     0 s        http://0 loads v0
     0 s        http://0 goes on
     0 s  v0    http://0 passes the canary of v0
              -> servers that may be used: {'http://0': 0}
              -> sync of v0 is over: ['http://0'] have it
              BROKEN: a group may be dispatched, and is not
"""


def test_the_smallest_history_has_only_what_it_needs():
  given = {
    "config": Config(steps=6, prompts=2, group=3, in_flight=24, rule="mask", lag=1),
    "workers": 3,
    "servers": 1,
    "make": Sulking,
  }
  history = History(**given)
  try:
    with pytest.raises(Broken) as found:
      for _ in range(3):
        history.join()
      for _ in range(2):
        history.bring(0)
      history.turn(1, 0, 3, 0x9A5C36, "spanning")
      history.wait(60.0)
      history.leave(1)
      history.finish_everything()
  finally:
    history.close()
  reason = str(found.value).partition("\n")[0]
  story = history_smallest.smallest(History, given, history.events, reason)
  assert story == STORY.removeprefix("\n").removesuffix("\n")


def test_the_same_history_is_told_in_the_same_words():
  def trace():
    history = History(Config(steps=3, prompts=2, pools="mix"), workers=2, servers=2)
    try:
      for event, *arguments in (
        ("join",),
        ("join",),
        ("bring", 1),
        ("turn", 1, 0, 2, 0b101, "old"),
        ("finish", 3, 3, 0b101, "ok", "spanning", True),
        ("pause", 0, "lost"),
        ("leave", 1),
        ("hear", 0, True),
        ("restart", True),
      ):
        getattr(history, event)(*arguments)
      history.finish_everything()
      return history.trace()
    finally:
      history.close()

  first = trace()
  assert first == trace()
  assert "manifest of batch 3" in first and "sync of v3" in first


def test_a_history_that_breaks_no_rule_is_no_fault():
  history = History(Config(steps=2, off_policy=0, in_flight=2))
  try:
    history.finish_everything()
    assert history.done and history.counts()["trained"] == 4
    assert [line for line in history.lines if "BROKEN" in line] == []
  finally:
    history.close()
