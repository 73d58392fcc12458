"""The scheduler in another process, or with another worker: what was in flight starts again."""

import json

import msgspec
import pytest

from tests.rollouts.helpers import finish_group, groups, make_scheduler, make_settings, make_summary


def test_a_restart_starts_what_was_in_flight_again_and_then_what_it_would_have_drawn():
  machine = make_scheduler()
  machine.weights(0)
  dispatched = machine.dispatch()
  for group in groups(dispatched)[:2]:
    finish_group(machine, group, [0.0, 1.0, 0.0])
  machine.finished(make_summary(dispatched[6], reward=1.0))  # it waits for its group
  machine.finished(make_summary(dispatched[7], reward=None, error="broke"))
  machine.commit(machine.plan_batch())
  state = json.loads(json.dumps(machine.state()))
  machine.weights(1)
  later = machine.dispatch()  # after the commit: only their number is kept
  total = machine.accounting.counts()["dispatched"]
  assert total == 18 and len(later) == 6

  resumed = make_scheduler()
  resumed.restore(state, total)
  assert resumed.next_step == 2
  counts = resumed.accounting.counts()
  assert (counts["dispatched"], counts["trained"], counts["errored"]) == (18, 6, 1)
  assert counts["in_flight"] == 11 and counts["cancelled"] == 0
  assert resumed.dispatch() == []  # no server has weights yet
  resumed.weights(1)
  again = resumed.dispatch()
  plain = [msgspec.structs.replace(dispatch, attempt=0) for dispatch in again]
  assert plain == [dispatched[6], *dispatched[8:], *later]
  assert all(dispatch.continued for dispatch in again)
  assert resumed.accounting.counts() == counts


def test_no_more_is_started_again_at_once_than_may_be_in_flight():
  machine = make_scheduler()
  machine.weights(0)
  for group in groups(machine.dispatch())[:2]:
    finish_group(machine, group, [0.0, 1.0, 0.0])
  machine.commit(machine.plan_batch())
  resumed = make_scheduler(make_settings(max_rollouts_in_flight=5))
  resumed.restore(machine.state(), 12)
  resumed.weights(1)
  first = resumed.dispatch()
  assert [dispatch.rollout_id for dispatch in first] == [6, 7, 8]
  finish_group(resumed, first, [0.0, 1.0, 0.0])
  assert [dispatch.rollout_id for dispatch in resumed.dispatch()] == [9, 10, 11]


def test_a_restart_with_another_group_size_or_of_another_program_is_refused():
  machine = make_scheduler()
  state = machine.state()
  other = make_scheduler(make_settings(rollouts_per_prompt=4))
  with pytest.raises(ValueError, match=r"rollouts_per_prompt: expected 3, .* got 4"):
    other.restore(state, 0)
  del state["rollouts_per_prompt"]
  with pytest.raises(ValueError, match="rollouts_per_prompt"):
    make_scheduler().restore(state, 0)


def test_what_ended_before_a_restart_stays_in_the_baseline_of_its_group():
  settings = make_settings(prompts_per_step=1, rollouts_per_prompt=4)
  machine = make_scheduler(settings)
  machine.weights(0)
  slow, second = groups(machine.dispatch(), 4)
  machine.finished(make_summary(slow[0], reward=1.0))
  finish_group(machine, second, [0.0, 1.0, 0.0, 1.0])
  machine.commit(machine.plan_batch())
  machine.weights(1)
  finish_group(machine, machine.dispatch(), [0.0, 1.0, 0.0, 1.0], version=1)
  machine.commit(machine.plan_batch())
  machine.weights(2)
  finish_group(machine, slow[1:], [0.0, 0.0, 0.0], version=2)
  assert list(machine.plan_batch().advantages) == [1, 2, 3]  # version 0 is stale by now
  state = json.loads(json.dumps(machine.state()))
  assert [kept["in_flight"] for kept in state["groups"]] == [[1, 2, 3]]
  resumed = make_scheduler(settings)
  resumed.restore(state, 12)
  resumed.weights(2)
  for dispatch in resumed.dispatch()[:3]:
    resumed.finished(make_summary(dispatch, reward=0.0, version=2))
  quarter = pytest.approx(-1 / 4)
  assert resumed.plan_batch().advantages == dict.fromkeys((1, 2, 3), quarter)


def test_what_a_lost_worker_had_is_started_again_and_its_group_waits_for_it():
  machine = make_scheduler(make_settings(prompts_per_step=1))
  machine.weights(0)
  first, *_ = groups(machine.dispatch())
  finish_group(machine, first[:2], [0.0, 1.0])
  machine.finished(make_summary(first[2], reward=0.5))
  assert machine.plan_batch() is not None
  machine.again([first[0].rollout_id, first[2].rollout_id])
  assert machine.plan_batch() is None
  started = [d for d in machine.dispatch() if d.group_id == first[0].group_id]
  assert [d.rollout_id for d in started] == [0, 2] and all(d.continued for d in started)
  for dispatch, reward in zip(started, [0.0, 0.5], strict=True):
    machine.finished(make_summary(dispatch, reward=reward))
  assert machine.plan_batch().advantages == {0: -0.5, 1: 0.5, 2: 0.0}
  assert machine.accounting.counts()["errored"] == 0


def test_what_is_lost_before_it_was_started_again_is_an_error_once():
  machine = make_scheduler(make_settings(prompts_per_step=1))
  machine.weights(0)
  first, second, *_ = groups(machine.dispatch())
  machine.again([dispatch.rollout_id for dispatch in (*first[:2], *second)])
  machine.lost([dispatch.rollout_id for dispatch in (first[0], *second)], "worker lost")
  again = machine.dispatch()
  assert again[0].rollout_id == 1 and again[0].continued
  assert [dispatch.continued for dispatch in again[1:]] == [False] * (len(again) - 1)
  assert machine.accounting.counts()["errored"] == 4
  running = machine.accounting.counts()["in_flight"]  # nothing has finished
  assert machine._running == running <= 12
