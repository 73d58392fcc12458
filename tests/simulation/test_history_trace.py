"""A planted fault is found, and its smallest history is told line by line."""

import pytest

from intellect3.rollouts import scheduler
from tests.simulation import test_history
from tests.simulation.history_events import History
from tests.simulation.history_ledger import Broken, Config


class Forgetful(scheduler.Scheduler):
  """Leaves a group scored as it was when one of its finished rollouts is lost."""

  def lost(self, rollout_ids, reason):
    finished = [
      key
      for key in rollout_ids
      if (group := self._groups.get(key // self._settings.rollouts_per_prompt)) is not None
      and not group.running
      and self.accounting.is_open(key)
    ]
    for key in finished:
      self._end(key, "errored", reason)
    super().lost([key for key in rollout_ids if key not in finished], reason)


class WithForgetful(test_history.Histories):
  make = Forgetful


@pytest.mark.slow
def test_a_planted_fault_is_found_and_told_as_a_short_history():
  with pytest.raises(Broken) as found:
    test_history.search(WithForgetful, examples=150, steps=12)
  reason, _, trace = str(found.value).partition("\n\n")
  lines = trace.splitlines()
  assert lines[0].startswith("Config(") and lines[-1] == f"BROKEN: {reason}"
  assert len(lines) < 100
  assert any(" is gone" in line or " is fenced" in line for line in lines)


def test_a_planted_fault_is_told_line_by_line():
  history = History(Config(prompts=2, group=3, drop_zero=False), workers=2, make=Forgetful)
  try:
    history.join()
    history.join()
    history.bring(0, "ok")
    history.finish(0, 3, 0b001, "ok", "old", False)
    with pytest.raises(Broken) as found:
      history.leave(0)
      history.finish(0, 3, 0b001, "ok", "old", False)
      history.finish_everything()
    reason, _, trace = str(found.value).partition("\n\n")
    lines = trace.splitlines()
    assert lines[0].startswith("Config(") and lines[-1] == f"BROKEN: {reason}"
    gone = next(line for line in lines if line.endswith("worker_0 is gone"))
    assert gone.split()[:3] == ["0", "s", "v0"] and " er=" in gone
  finally:
    history.close()


def test_the_same_history_is_told_in_the_same_words():
  def trace():
    history = History(Config(steps=3, prompts=2, pools=True), workers=2, servers=2)
    try:
      for event, *arguments in (
        ("join",),
        ("join",),
        ("bring", 1, "ok"),
        ("finish", 3, 3, 0b101, "ok", "spanning", True),
        ("bring", 0, "lost"),
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
