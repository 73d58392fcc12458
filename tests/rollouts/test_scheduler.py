"""The scheduler: gates, staleness, filters, pools, restart, and contract 3 under any schedule."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from intellect3.rollouts import accounting, credit, difficulty, filters
from tests.rollouts.helpers import finish_group, groups, make_scheduler, make_settings, make_summary


def test_nothing_is_dispatched_before_the_first_weights():
  machine = make_scheduler()
  assert machine.dispatch() == []
  machine.weights(0)
  assert len(machine.dispatch()) == 12


def test_a_group_shares_its_task_and_no_two_rollouts_share_a_seed():
  machine = make_scheduler()
  machine.weights(0)
  dispatched = machine.dispatch()
  for group in groups(dispatched):
    assert len({(d.environment, d.index, d.group_id) for d in group}) == 1
    assert [d.sample for d in group] == [0, 1, 2]
  assert len({d.seed for d in dispatched}) == len(dispatched)


def test_a_synchronous_run_dispatches_exactly_one_batch_per_version():
  machine = make_scheduler(make_settings(max_off_policy_steps=0, max_rollouts_in_flight=100))
  machine.weights(0)
  dispatched = machine.dispatch()
  assert len(dispatched) == 2 * 3
  for group in groups(dispatched):
    finish_group(machine, group, [0.0, 1.0, 0.0])
  plan = machine.plan_batch()
  machine.commit(plan)
  assert machine.dispatch() == []  # v1 is not there yet
  machine.weights(1)
  assert len(machine.dispatch()) == 6


def test_a_synchronous_run_replaces_a_filtered_group_by_one_more():
  machine = make_scheduler(make_settings(max_off_policy_steps=0, max_rollouts_in_flight=100))
  machine.weights(0)
  first, second = groups(machine.dispatch())
  finish_group(machine, first, [1.0, 1.0, 1.0])
  (third,) = groups(machine.dispatch())
  finish_group(machine, second, [0.0, 1.0, 1.0])
  assert machine.plan_batch() is None
  finish_group(machine, third, [0.0, 1.0, 1.0])
  assert machine.dispatch() == []
  assert machine.plan_batch().group_ids == (1, 2)


def test_advantages_are_rewards_minus_the_group_mean_over_all_that_did_not_fail():
  machine = make_scheduler()
  machine.weights(0)
  first, second, *_ = groups(machine.dispatch())
  finish_group(machine, first, [0.0, 1.0, 0.5])
  machine.finished(make_summary(second[0], reward=1.0))
  machine.finished(make_summary(second[1], reward=None, error="tool broke"))
  machine.finished(make_summary(second[2], reward=0.0))
  plan = machine.plan_batch()
  assert plan.advantages == pytest.approx({0: -0.5, 1: 0.5, 2: 0.0, 3: 0.5, 5: -0.5})
  assert machine.accounting.counts()["errored"] == 1


def test_filters_say_why():
  machine = make_scheduler(group_filters=filters.Filters(zero_advantage=True, truncated=True))
  machine.weights(0)
  first, second, *_ = groups(machine.dispatch())
  finish_group(machine, first, [1.0, 1.0, 1.0])
  machine.finished(make_summary(second[0], reward=1.0, truncated=True))
  machine.finished(make_summary(second[1], reward=0.0))
  machine.finished(make_summary(second[2], reward=None, error="E"))
  assert machine.accounting.reasons() == {
    "errored/E": 1,
    "filtered/truncated": 1,
    "filtered/zero_advantage": 3,
  }
  assert sorted(machine.take_forgotten()) == [0, 1, 2, 3]


def test_stale_rollouts_are_dropped_and_their_reward_stays_in_the_baseline():
  machine = make_scheduler(make_settings(max_off_policy_steps=0, prompts_per_step=1))
  machine.weights(0)
  (group,) = groups(machine.dispatch())
  machine.next_step = 3  # as if two steps had been committed meanwhile
  machine.weights(2)
  finish_group(machine, group[:1], [1.0], version=0, newest=2)
  finish_group(machine, group[1:], [0.0, 0.5], version=2)
  plan = machine.plan_batch()
  assert plan.advantages == pytest.approx({1: -0.5, 2: 0.0})
  assert machine.accounting.reasons() == {"stale/drop": 1}


def test_the_mask_rule_keeps_a_rollout_that_has_fresh_tokens():
  machine = make_scheduler(
    make_settings(max_off_policy_steps=0, prompts_per_step=1, staleness_rule="mask")
  )
  machine.weights(0)
  (group,) = groups(machine.dispatch())
  machine.next_step = 3
  finish_group(machine, group[:1], [1.0], version=0, newest=2)
  finish_group(machine, group[1:], [0.0, 0.5], version=0, newest=1)
  plan = machine.plan_batch()
  assert list(plan.advantages) == [0]
  assert plan.oldest_version == 2
  assert machine.accounting.counts()["stale"] == 2


def test_dispatch_order_waits_for_the_oldest_group():
  machine = make_scheduler(make_settings(prompts_per_step=1, batch_order="dispatch"))
  machine.weights(0)
  first, second, *_ = groups(machine.dispatch())
  finish_group(machine, second, [0.0, 1.0, 0.0])
  assert machine.plan_batch() is None
  finish_group(machine, first, [0.0, 1.0, 0.0])
  assert machine.plan_batch().group_ids == (0,)


def test_pools_move_at_the_commit_and_solved_tasks_do_not_come_again():
  pools = difficulty.Pools(easy_threshold=1.0, hard_threshold=0.0)
  machine = make_scheduler(
    make_settings(max_off_policy_steps=0, prompts_per_step=1, steps=50),
    pools=pools,
    sizes={"words": 4},
  )
  machine.weights(0)
  solved, tried = set(), []
  for step in range(1, 4):
    while machine.plan_batch() is None:
      for group in groups(machine.dispatch()):
        tried.append(group[0].index)
        if len(solved) < 2:
          solved.add(group[0].index)
          finish_group(machine, group, [1.0, 1.0, 1.0], version=step - 1)
        else:
          finish_group(machine, group, [0.0, 1.0, 0.0], version=step - 1)
    machine.commit(machine.plan_batch())
    machine.weights(step)
  assert machine.pool_counts() == {"easy": 2, "hard": 0}
  after = tried[3:]
  assert after and not solved & set(after)


def test_no_task_left_is_a_clear_error():
  machine = make_scheduler(
    make_settings(max_off_policy_steps=0, prompts_per_step=1),
    pools=difficulty.Pools(easy_threshold=0.3),
    sizes={"words": 1},
  )
  machine.weights(0)
  finish_group(machine, machine.dispatch(), [0.0, 1.0, 0.0])
  machine.commit(machine.plan_batch())
  machine.weights(1)
  with pytest.raises(difficulty.NoTasksLeft, match="words"):
    machine.dispatch()


def test_versions_never_go_back():
  machine = make_scheduler()
  machine.weights(3)
  with pytest.raises(ValueError, match="at least 3, got 2"):
    machine.weights(2)


def test_losing_a_finished_rollout_scores_its_group_again():
  machine = make_scheduler(make_settings(prompts_per_step=1))
  machine.weights(0)
  first, *_ = groups(machine.dispatch())
  finish_group(machine, first, [0.0, 1.0, 0.5])
  machine.lost([1], "server fenced")
  assert machine.plan_batch().advantages == pytest.approx({0: -0.25, 2: 0.25})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("steps", 0),
    ("rollouts_per_prompt", 0),
    ("max_off_policy_steps", -1),
    ("staleness_rule", "keep"),
    ("batch_order", "random"),
    ("temperature", 0.0),
    ("max_rollouts_in_flight", 2),
  ],
)
def test_bad_settings_are_named(field, value):
  with pytest.raises(ValueError, match=field):
    make_settings(**{field: value})


def test_ending_twice_is_an_error():
  book = accounting.Accounting()
  book.dispatch(1)
  book.end(1, "trained")
  with pytest.raises(accounting.AccountingError, match="not in flight"):
    book.end(1, "stale")


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.data(),
  st.integers(0, 3),
  st.integers(1, 3),
  st.sampled_from(["drop", "mask"]),
  st.sampled_from(["completion", "dispatch"]),
  st.sampled_from([credit.Credit(), credit.Credit(advantage_fn=credit.MovingBaseline())]),
)
def test_accounting_holds_at_every_moment_of_any_schedule(
  data, off_policy, prompts, rule, order, given_credit
):
  """Random interleavings of results, failures, losses, versions, commits and restarts."""
  settings = make_settings(
    steps=6,
    prompts_per_step=prompts,
    max_off_policy_steps=off_policy,
    staleness_rule=rule,
    batch_order=order,
  )
  pools = difficulty.Pools(easy_threshold=1.0, easy_fraction=0.2)
  new = lambda: make_scheduler(  # noqa: E731
    settings, pools=pools, group_filters=filters.Filters(truncated=True), credit=given_credit
  )
  machine = new()
  machine.weights(0)
  running = {}
  ended = set()
  committed = []
  durable, total = None, 0
  actions = [*["finish"] * 6, "commit", "weights", "lose", "again", "restart"]
  for _ in range(data.draw(st.integers(5, 60))):
    for dispatch in machine.dispatch():
      assert dispatch.rollout_id not in running
      assert dispatch.rollout_id not in ended
      assert dispatch.continued == (dispatch.rollout_id < total)
      running[dispatch.rollout_id] = dispatch
    total = max([total, *(key + 1 for key in running)])
    action = data.draw(st.sampled_from(actions))
    baselines = machine.state()["baselines"]
    if action == "finish" and running:
      for key in data.draw(st.lists(st.sampled_from(sorted(running)), unique=True, max_size=6)):
        failed = data.draw(st.booleans()) and data.draw(st.booleans())
        oldest = data.draw(st.integers(0, machine.version))
        machine.finished(
          make_summary(
            running.pop(key),
            reward=None if failed else float(data.draw(st.integers(0, 2))),
            error="broke" if failed else None,
            truncated=data.draw(st.booleans()),
            version=oldest,
            newest=data.draw(st.integers(oldest, machine.version)),
          )
        )
    elif action == "commit":
      plan = machine.plan_batch()
      if plan is not None:
        assert plan.step == len(committed) + 1
        assert len(plan.group_ids) == prompts
        for summary in plan.summaries:
          newest_allowed = plan.step - 1
          bound = summary.oldest_version if rule == "drop" else summary.newest_version
          assert newest_allowed - bound <= off_policy
          assert summary.rollout_id not in ended
          ended.add(summary.rollout_id)
        state_before = machine.accounting.counts()["trained"]
        machine.commit(plan)
        committed.append(plan)
        durable = json.dumps(machine.state())
        trained = machine.accounting.counts()["trained"]
        assert trained == state_before + len(plan.advantages)
    elif action == "weights":
      machine.weights(min(machine.version + 1, max(machine.version, len(committed))))
    elif action == "lose" and running:
      key = data.draw(st.sampled_from(sorted(running)))
      running.pop(key)
      machine.lost([key], "server fenced")
    elif action == "again" and running:
      keys = data.draw(st.lists(st.sampled_from(sorted(running)), unique=True, max_size=6))
      for key in keys:
        running.pop(key)
      machine.again(keys)
    elif action == "restart":
      version = machine.version
      machine = new()
      machine.restore(None if durable is None else json.loads(durable), total)
      machine.weights(version)
      running.clear()
    if action != "commit":
      assert machine.state()["baselines"] == baselines
    machine.accounting.check()
    counts = machine.accounting.counts()
    assert counts["in_flight"] >= len(running)
  machine.cancel_all("end")
  assert machine.accounting.counts()["in_flight"] == 0


def test_a_stale_rollouts_reward_stays_in_the_baseline_when_another_is_lost_later():
  machine = make_scheduler(
    make_settings(max_off_policy_steps=0, prompts_per_step=2, rollouts_per_prompt=4)
  )
  machine.weights(0)
  first, second = groups(machine.dispatch(), 4)
  machine.next_step = 2
  machine.weights(1)
  finish_group(machine, first[:1], [1.0], version=0)
  finish_group(machine, first[1:], [0.0, 0.0, 0.0], version=1)
  assert machine.plan_batch() is None  # drops the stale one, waits for the second group
  machine.lost([first[1].rollout_id], "worker lost")
  finish_group(machine, second, [0.0, 1.0, 0.0, 1.0], version=1)
  plan = machine.plan_batch()
  third = pytest.approx(-1 / 3)
  assert {key: plan.advantages[key] for key in (2, 3)} == {2: third, 3: third}
  counts = machine.accounting.counts()
  assert (counts["stale"], counts["errored"], counts["filtered"]) == (1, 1, 0)
