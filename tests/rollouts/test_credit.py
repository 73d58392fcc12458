"""Credit: reshaped rewards, and baselines that move at commits alone, in dispatch order."""

import asyncio
import json

import msgspec
import numpy as np
import pytest

from intellect3 import rollout_log
from intellect3.losses import advantages
from intellect3.rollouts import credit, filters
from tests.rollouts.helpers import all_records, make_scheduler, make_settings, make_summary
from tests.rollouts.world import World

MOVING = credit.Credit(advantage_fn=credit.MovingBaseline(decay=0.5))


def by_group(dispatches, size=3):
  return [dispatches[i : i + size] for i in range(0, len(dispatches), size)]


def finish(machine, group, rewards, **changes):
  for dispatch, reward in zip(group, rewards, strict=True):
    machine.finished(make_summary(dispatch, reward=reward, **changes))


def commit(machine):
  plan = machine.plan_batch()
  machine.commit(plan)
  return plan


def test_baselines_move_at_the_commit_and_later_groups_are_compared_with_them():
  machine = make_scheduler(credit=MOVING)
  machine.weights(0)
  first, second, third, fourth = by_group(machine.dispatch())
  finish(machine, second, [1.0, 1.0, 0.0])
  finish(machine, first, [0.0, 1.0, 1.0])
  assert machine.state()["baselines"] == {}
  plan = commit(machine)
  # Nobody had a baseline: each against the mean of the two others.
  assert plan.advantages == pytest.approx({0: -1, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: -1})
  assert machine.state()["baselines"] == pytest.approx({"words": 4 / 6})
  assert machine.credit_metrics([0, 1]) == pytest.approx({"baseline/words": 4 / 6})
  machine.weights(1)
  finish(machine, third, [0.0, 0.0, 1.0])
  finish(machine, fourth, [1.0, 1.0, 1.0])  # above the baseline: no zero advantage
  plan = commit(machine)
  third_part = pytest.approx(1 / 3)
  assert plan.advantages[9] == plan.advantages[11] == third_part
  assert plan.advantages[6] == pytest.approx(-2 / 3)
  after = 0.5**6 * 4 / 6 + (1 - 0.5**6) * 4 / 6
  assert machine.state()["baselines"] == pytest.approx({"words": after})


def test_who_finished_first_changes_no_bit():
  rewards = {0: [0.3, 0.1, 0.9], 1: [0.7, 0.6, 0.2]}
  states = []
  for order in ([0, 1], [1, 0]):
    for samples in ([0, 1, 2], [2, 0, 1]):
      machine = make_scheduler(credit=MOVING)
      machine.weights(0)
      groups = by_group(machine.dispatch())
      for index in order:
        for sample in samples:
          summary = make_summary(groups[index][sample], reward=rewards[index][sample])
          machine.finished(summary)
      commit(machine)
      states.append(machine.state()["baselines"])
  assert all(state == states[0] for state in states)


def test_a_group_of_one_has_a_baseline_and_is_trained():
  machine = make_scheduler(make_settings(rollouts_per_prompt=1), credit=MOVING)
  machine.weights(0)
  first, second = machine.dispatch()[:2]
  machine.finished(make_summary(first, reward=1.0))
  machine.finished(make_summary(second, reward=0.5))
  assert commit(machine).advantages == {0: 1.0, 1: 0.5}  # nobody before: against 0
  assert machine.accounting.reasons() == {}


def test_what_is_left_of_a_group_is_kept_only_where_the_baseline_is_not_the_groups():
  for chosen, reasons in (
    (credit.Credit(), {"errored/E": 2, "filtered/no_baseline": 1}),
    (MOVING, {"errored/E": 2}),
  ):
    machine = make_scheduler(make_settings(prompts_per_step=1), credit=chosen)
    machine.weights(0)
    first, *_ = by_group(machine.dispatch())
    for dispatch in first[1:]:
      machine.finished(make_summary(dispatch, reward=None, error="E"))
    machine.finished(make_summary(first[0], reward=1.0))
    assert machine.accounting.reasons() == reasons
    assert (machine.plan_batch() is None) == (chosen is not MOVING)


def test_one_rollout_a_prompt_needs_a_baseline_of_another_kind():
  with pytest.raises(ValueError, match="rollouts_per_prompt: expected an integer >= 2 with an adv"):
    make_scheduler(make_settings(rollouts_per_prompt=1))


def test_agents_have_baselines_of_their_own():
  machine = make_scheduler(make_settings(prompts_per_step=1), credit=MOVING)
  machine.weights(0)
  first, *_ = by_group(machine.dispatch())
  for dispatch, agent, reward in zip(first, ("", "black", "white"), (0.5, 1.0, -1.0), strict=True):
    machine.finished(make_summary(dispatch, reward=reward, agent=agent))
  commit(machine)
  expected = {"words": 0.5, "words/black": 1.0, "words/white": -1.0}
  assert machine.state()["baselines"] == expected


def test_filtered_groups_and_reshaped_rewards_move_baselines_and_pools_keep_the_environments():
  halved = credit.Credit(
    advantage_fn=credit.MovingBaseline(decay=0.0),
    reward_fn=lambda rewards, lengths: rewards / lengths,
  )
  machine = make_scheduler(
    make_settings(prompts_per_step=1), credit=halved, group_filters=filters.Filters(truncated=True)
  )
  machine.weights(0)
  first, second, *_ = by_group(machine.dispatch())
  finish(machine, first, [1.0, 1.0, 1.0], truncated=True, sampled_tokens=4)
  finish(machine, second, [1.0, 0.0, 0.0], sampled_tokens=2)
  plan = commit(machine)
  assert plan.advantages == pytest.approx({3: 0.5, 4: -0.25, 5: -0.25})
  mean = (3 * 0.25 + 0.5) / 6
  row = machine.credit_metrics(range(6))
  assert row == pytest.approx({"baseline/words": mean, "shaped_reward": mean})
  assert machine.credit_metrics(range(6)) == pytest.approx({"baseline/words": mean})  # told once
  result = filters.evaluate_group(
    [make_summary(second[0], reward=1.0, sampled_tokens=2)], filters.Filters(), halved, {}
  )
  assert (result.mean_reward, dict(result.rewards)) == (1.0, {3: 0.5})


def test_rewards_enter_the_baselines_once_though_a_group_is_scored_again():
  machine = make_scheduler(make_settings(prompts_per_step=1), credit=MOVING)
  machine.weights(0)
  first, second, *_ = by_group(machine.dispatch())
  finish(machine, second, [1.0, 0.0, 0.0])
  finish(machine, first, [0.0, 0.0, 1.0])
  machine.lost([second[1].rollout_id], "worker lost")  # before the commit: not counted
  commit(machine)
  moved = machine.state()["baselines"]
  assert moved == pytest.approx({"words": 2 / 5})
  machine.lost([second[2].rollout_id], "server fenced")  # after it: what is left has counted
  # Compared with what was there when it was complete, nothing: its own rewards are not in it.
  assert commit(machine).advantages == {second[0].rollout_id: 1.0}
  assert machine.state()["baselines"] == moved


def test_a_restart_goes_on_with_the_same_bits_through_json():
  machine = make_scheduler(make_settings(prompts_per_step=1), credit=MOVING)
  machine.weights(0)
  for group, rewards in zip(
    by_group(machine.dispatch()), ([0.1, 0.2, 0.7], [0, 1, 1]), strict=False
  ):
    finish(machine, group, rewards)
  commit(machine)
  resumed = make_scheduler(make_settings(prompts_per_step=1), credit=MOVING)
  resumed.restore(json.loads(json.dumps(machine.state())), 0)
  assert resumed.state()["baselines"] == machine.state()["baselines"] != {}
  for broken in ([1], {"words": None}, {"words": float("nan")}):
    with pytest.raises(ValueError, match="baselines: expected finite numbers by agent"):
      resumed.restore({**machine.state(), "baselines": broken}, 0)


def trained(world):
  """(step, rollout, advantage) of every record."""
  return [
    (manifest.step, record.rollout_id, record.advantage)
    for manifest in manifests(world)
    for record in all_records(world.log_dir, manifest)
  ]


def manifests(world):
  steps = rollout_log.committed_steps(world.log_dir)
  return [rollout_log.read_manifest(world.log_dir, step) for step in steps]


def test_a_synchronous_run_stopped_and_resumed_has_the_same_baselines_to_the_bit(tmp_path):
  def world(name, steps=6):
    return World(
      tmp_path / name,
      steps=steps,
      max_off_policy_steps=0,
      batch_order="dispatch",
      rollouts_per_prompt=2,
      prompts_per_step=3,
      group_filters=filters.Filters(zero_advantage=False),
      credit=credit.Credit(advantage_fn=credit.MovingBaseline(decay=0.9)),
      delay=lambda dispatch: 0.001 * (1 + dispatch.seed % 5),
    )

  whole = world("whole")
  asyncio.run(whole.run())
  states = [manifest.scheduler_state["baselines"] for manifest in manifests(whole)]
  assert len({state["coin"] for state in states}) == 6

  broken = world("broken", steps=3)
  asyncio.run(broken.run())
  last = manifests(broken)[-1]
  assert last.scheduler_state["baselines"] == states[2]
  resumed = world("broken")
  asyncio.run(resumed.run(scheduler_state=last.scheduler_state, first_step=4))
  assert [manifest.scheduler_state["baselines"] for manifest in manifests(resumed)] == states
  assert trained(resumed) == trained(whole)
  for row, state in zip(resumed.rows.values(), states[3:], strict=True):
    assert row["baseline/coin"] == state["coin"]


def test_a_tasks_agent_reaches_the_baselines(tmp_path):
  world = World(tmp_path, steps=1, credit=MOVING)
  sides = ("heads", "tails", "")
  task = world.environment.task
  world.environment.task = lambda split, index: msgspec.structs.replace(
    task(split, index), agent=sides[index % 3]
  )
  asyncio.run(world.run())
  names = set(manifests(world)[0].scheduler_state["baselines"])
  assert names == {"coin/heads", "coin/tails", "coin"}


def test_the_shaped_reward_is_told_of_the_rollouts_that_the_reward_is_told_of(tmp_path):
  tenth = credit.Credit(reward_fn=lambda rewards, lengths: rewards / 10 - lengths)
  world = World(tmp_path, steps=4, credit=tenth)
  asyncio.run(world.run())
  for row in world.rows.values():
    assert row["shaped_reward"] == pytest.approx(row["reward"] / 10 - 4)
  assert not any("shaped_reward" in row for row in ran_plain(tmp_path / "plain").values())


def ran_plain(path):
  world = World(path, steps=1)
  asyncio.run(world.run())
  return world.rows


def test_an_advantage_function_that_fails_ends_the_run(tmp_path):
  def breaks(rewards, group_ids):
    raise RuntimeError("no advantage today")

  world = World(tmp_path, credit=credit.Credit(advantage_fn=breaks))
  with pytest.raises(Exception, match="RuntimeError: no advantage today"):
    asyncio.run(world.run())


def moving_baseline_itself(rewards, ids):
  return advantages.moving_baseline(rewards, ids, np.zeros(1), decay=0.9)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"advantage_fn": 3}, "advantage_fn: expected a function of rewards .* got 3: 'int' object is"),
    ({"advantage_fn": advantages.moving_baseline}, "got moving_baseline: .*missing 1 required"),
    ({"advantage_fn": moving_baseline_itself}, "expected a function .* got moving_baseline_itself"),
    ({"advantage_fn": lambda r, g: r[:2]}, r"advantage_fn: .* of shape \[4\], got array"),
    ({"advantage_fn": lambda r, g: r / 0}, "advantage_fn: expected finite floating numbers"),
    (
      {"advantage_fn": credit.MovingBaseline},
      "advantage_fn: expected a function .* MovingBaseline:",
    ),
    (
      {"reward_fn": advantages.length_penalty},
      "reward_fn: expected a function .* got length_penal",
    ),
    ({"reward_fn": lambda r, n: None}, "reward_fn: expected finite floating numbers"),
    ({"reward_fn": lambda r: r}, "reward_fn: expected a function of rewards .N. and lengths"),
  ],
)
def test_functions_that_do_not_fit_are_named(changes, message):
  with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
    credit.Credit(**changes).check()


def test_functions_that_fit_are_taken():
  for function in (
    advantages.group_mean,
    advantages.group_standardised,
    advantages.leave_one_out,
    advantages.mean_normalised,
    credit.MovingBaseline(),
  ):
    credit.Credit(advantage_fn=function).check()
  relative = lambda r, n: advantages.relative_length_penalty(r, n, coefficient=0.1)  # noqa: E731
  credit.Credit(reward_fn=relative).check()


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), True])
def test_a_decay_out_of_range_is_named(decay):
  with pytest.raises(ValueError, match=r"MovingBaseline.decay: expected in \[0, 1\)"):
    credit.MovingBaseline(decay=decay)
