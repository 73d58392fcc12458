"""A run that gets nowhere: when it is told, when it ends, and that slow runs go on."""

import asyncio
import logging

import pytest

from intellect3.rollouts import accounting, in_vain, orchestrator
from tests.rollouts.helpers import make_scheduler, make_settings, make_summary
from tests.rollouts.world import World


def account_of(**reasons):
  """An accounting in which so many rollouts ended, by `outcome_reason`."""
  account = accounting.Accounting()
  for key, count in reasons.items():
    outcome, _, reason = key.partition("_")
    for _ in range(count):
      number = account.counts()["dispatched"]
      account.dispatch(number)
      account.end(number, outcome, reason)
  return account


def told(count, waiting=0, most=256, account=None, vain=None):
  """At which of `count` groups people are told, and at which the run ends, or None."""
  vain = vain or in_vain.InVain(most)
  account = account or account_of(errored_Broken=1)
  alarms = []
  for number in range(1, count + 1):
    vain.ended()
    try:
      if vain.alarm(waiting, account) is not None:
        alarms.append(number)
    except in_vain.NothingToTrain:
      return alarms, number
  return alarms, None


def test_people_are_told_at_each_doubling_until_the_end():
  assert told(1000) == ([2, 4, 8, 16, 32, 64, 128], 256)
  assert told(3, most=1) == ([], 1)


def test_groups_that_wait_for_a_batch_allow_as_many_more():
  assert told(1000, waiting=2) == ([6, 12, 24, 48, 96, 192, 384], 768)


def test_a_batch_begins_the_count_again():
  vain = in_vain.InVain(256)
  assert told(255, vain=vain) == ([2, 4, 8, 16, 32, 64, 128], None)
  vain.batched({})
  assert told(255, vain=vain) == ([2, 4, 8, 16, 32, 64, 128], None)


def test_the_reason_names_what_happened_since_the_last_batch():
  vain = in_vain.InVain(1)
  vain.batched({"errored/Early": 7, "errored/Common": 1, "trained/": 3})
  vain.ended()
  account = account_of(
    errored_Early=7,
    errored_Common=1001,
    errored_a=2,
    errored_b=3,
    errored_c=4,
    filtered_truncated=5,
  )
  with pytest.raises(in_vain.NothingToTrain) as raised:
    vain.alarm(0, account)
  assert str(raised.value) == (
    "1 groups ended since the last batch with nothing to train, 0 wait for a batch: "
    "errored 1,009 (Common 1,000, c 4, b 3), filtered 5 (truncated 5)"
  )


def play(scheduler, most, outcome, version=0):
  """Ends every group as `outcome(group_id)` says; returns groups that ended, batches and why."""
  ended = batches = 0
  scheduler.weights(version)
  for _ in range(most):
    for dispatch in scheduler.dispatch():
      scheduler.finished(outcome(dispatch))
      ended += dispatch.sample == 0
    try:
      scheduler.alarm()
    except in_vain.NothingToTrain as error:
      return ended, batches, str(error)
    if (plan := scheduler.plan_batch()) is not None:
      scheduler.commit(plan)
      scheduler.weights(plan.step)
      batches += 1
  return ended, batches, None


def solved(dispatch):
  return make_summary(dispatch, reward=float(dispatch.sample == 0), version=0)


def failed(dispatch):
  return make_summary(dispatch, reward=None, error="Broken")


def alike(dispatch):
  return make_summary(dispatch, reward=1.0)


@pytest.mark.parametrize(
  ("outcome", "named"), [(failed, "errored 48 (Broken 48)"), (alike, "filtered 48 (zero_adv")]
)
def test_the_scheduler_counts_groups_that_failed_and_groups_without_a_signal(outcome, named):
  settings = make_settings(max_groups_in_vain=16)
  ended, batches, reason = play(make_scheduler(settings), 1000, outcome)
  assert (ended, batches) == (16, 0)
  assert named in reason


def test_a_run_that_finds_little_to_train_goes_on():
  settings = make_settings(
    max_groups_in_vain=16, prompts_per_step=8, steps=3, max_off_policy_steps=5
  )

  def rarely(every):
    return lambda dispatch: (failed, solved)[dispatch.group_id % every == 0](dispatch)

  # 8 groups of every 9 fail, 64 for each batch: four times the limit, but some groups wait.
  ended, batches, reason = play(make_scheduler(settings), 1000, rarely(9))
  assert (batches, reason) == (3, None) and ended >= 3 * 64
  # Fewer than one in 17 is of use.
  assert play(make_scheduler(settings), 1000, rarely(40))[1:2] == (0,)


def test_groups_that_are_too_old_when_they_are_complete_are_in_vain():
  settings = make_settings(max_groups_in_vain=16, max_off_policy_steps=0)
  before, scheduler = make_scheduler(settings), make_scheduler(settings)
  play(before, 2, failed)
  scheduler.restore({**before.state(), "next_step": 3}, 0)  # what failed before is not named again
  _, batches, reason = play(scheduler, 1000, solved, version=2)  # sampled with v0
  assert batches == 0 and "errored" not in reason and "stale" in reason


def test_a_run_whose_every_attempt_fails_ends_with_the_reason(tmp_path, caplog):
  world = World(tmp_path, failing=1.0, delay=lambda dispatch: 0.0, max_groups_in_vain=40)
  with (
    caplog.at_level(logging.WARNING, logger=orchestrator.__name__),
    pytest.raises(orchestrator.RunFailed, match=r"NothingToTrain: \d+ groups.*errored.*Runtime"),
  ):
    asyncio.run(world.run())
  assert "32 groups ended since the last batch" in caplog.text
  assert any("in_vain" in detail for _, detail in world.phases)
