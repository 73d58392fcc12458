"""What a sweep changes, and nothing else; and the cluster in small."""

import dataclasses

import pytest

from intellect3.rollouts import scheduler
from intellect3.simulation import scenario, settings, sweep

GIVEN = scenario.Scenario(
  name="small",
  servers=scenario.Servers(
    count=4,
    devices=2,
    max_running=64,
    decode_batch=(1, 64),
    decode_tokens_per_second=(50.0, 1600.0),
    prefill_tokens_per_second=1e5,
  ),
  sync=scenario.Sync(load_seconds=1.0),
  trainer=scenario.Trainer(seconds_per_token=2e-3, devices=4),
  environments={"words": scenario.Environment(lengths=scenario.Lengths(median=200, sigma=0.6))},
)
RUN = settings.RunSettings(
  scheduler=scheduler.Settings(
    steps=12,
    prompts_per_step=8,
    rollouts_per_prompt=4,
    max_off_policy_steps=4,
    max_rollouts_in_flight=64,
  ),
  sizes={"words/train": 200, "words/eval": 5},
  environment_weights={"words": 1.0},
  max_new_tokens=1000,
  max_tokens=2000,
  num_workers=4,
  max_concurrency=16,
  evaluation_tasks=3,
)


def test_nodes_go_from_the_servers_to_the_trainer():
  few, many = sweep.splits(RUN, GIVEN, [1, 4], nodes=6)
  assert (few.label, many.label) == ("1 : 5", "4 : 2")
  assert (few.scenario.servers.count, many.scenario.servers.count) == (5, 2)
  assert few.scenario.trainer.seconds_per_token == pytest.approx(4e-3)
  assert many.scenario.trainer.seconds_per_token == pytest.approx(1e-3)
  assert (few.scenario.trainer.devices, many.scenario.trainer.devices) == (2, 8)
  assert few.run == RUN
  with pytest.raises(ValueError, match="trainer_nodes: expected from 1 to 5, got 6"):
    sweep.splits(RUN, GIVEN, [6], nodes=6)


def test_more_rollouts_get_more_slots():
  less, more = sweep.in_flight(RUN, GIVEN, [32, 128])
  assert less.run.scheduler.max_rollouts_in_flight == 32 and less.run.max_concurrency == 16
  assert more.run.scheduler.max_rollouts_in_flight == 128 and more.run.max_concurrency == 32


def test_each_bound_under_each_rule_and_each_segment_in_each_mode():
  found = sweep.staleness(RUN, GIVEN, [1, 8])
  told = [
    (v.series, v.run.scheduler.staleness_rule, v.run.scheduler.max_off_policy_steps, v.x)
    for v in found
  ]
  assert told == [
    ("drop", "drop", 1, 1),
    ("drop", "drop", 8, 8),
    ("mask", "mask", 1, 1),
    ("mask", "mask", 8, 8),
  ]
  found = sweep.segments(RUN, GIVEN, [100])
  assert [(v.series, v.run.sync_mode, v.run.segment_tokens) for v in found] == [
    ("in_place", "in_place", 100),
    ("retract", "retract", 100),
  ]


def test_lengths_change_in_every_environment():
  (variant,) = sweep.lengths(RUN, GIVEN, [400.0], [0.9])
  changed = variant.scenario.environments["words"].lengths
  assert (changed.median, changed.sigma, changed.empirical) == (400.0, 0.9, ())
  assert variant.scenario.servers == GIVEN.servers


def test_slower_servers_take_as_many_times_as_long_for_everything():
  base, servers, _, both = sweep.slower(RUN, GIVEN, [1.0, 4.0])
  assert base.scenario == GIVEN
  assert servers.scenario.servers.decode_tokens_per_second == (12.5, 400.0)
  assert servers.scenario.servers.prefill_tokens_per_second == 2.5e4
  assert servers.scenario.trainer == GIVEN.trainer
  assert both.scenario.servers == servers.scenario.servers
  assert both.scenario.trainer.seconds_per_token == pytest.approx(8e-3)


def test_half_the_cluster_takes_as_long_for_a_step():
  run, given = sweep.shrunk(RUN, GIVEN, 2)
  assert run.scheduler.prompts_per_step == 4 and run.num_workers == 2
  assert given.servers.count == 2 and given.trainer.devices == 2
  whole, half = sweep.simulate(
    [
      sweep.Variant("whole", 1, "", RUN, GIVEN),
      sweep.Variant("half", 2, "", run, given),
    ],
    steps=8,
    least_warm_up=4,
  )
  assert half["step_seconds"] == pytest.approx(whole["step_seconds"], rel=0.15)
  with pytest.raises(ValueError, match="factor: expected a divisor of prompts_per_step"):
    sweep.shrunk(RUN, GIVEN, 3)


def test_a_quicker_trainer_is_never_slower_and_waits_more():
  quick = dataclasses.replace(
    GIVEN, trainer=dataclasses.replace(GIVEN.trainer, seconds_per_token=2e-4)
  )
  told = []
  rows = sweep.simulate(
    [
      sweep.Variant("as it is", 1, "", RUN, GIVEN),
      sweep.Variant("quicker", 2, "", RUN, quick),
    ],
    steps=7,
    least_warm_up=3,
    progress=lambda done, variant: told.append((done, variant.label)),
  )
  assert told == [(0, "as it is"), (1, "quicker")]
  assert rows[1]["step_seconds"] < rows[0]["step_seconds"]
  assert rows[1]["trainer_idle_share"] > rows[0]["trainer_idle_share"]


def test_shorter_runs_are_not_evaluated():
  changed = sweep.with_steps(RUN, 3)
  assert (changed.steps, changed.evaluation_tasks) == (3, 0)


def test_a_run_settles_over_four_times_its_bound():
  assert (sweep.warm_up(RUN, 10), sweep.warm_up(RUN, 20)) == (16, 20)
  (row,) = sweep.simulate([sweep.Variant("a", 1, "", RUN, GIVEN)], steps=4, least_warm_up=1)
  assert row["warm_up_steps"] == 16


def test_a_variant_that_never_trains_is_told_and_left_out():
  failing = scenario.Environment(lengths=scenario.Lengths(median=200), error_rate=1.0)
  never = dataclasses.replace(GIVEN, environments={"words": failing})
  told = []
  rows = sweep.simulate(
    [sweep.Variant("never", 1, "", RUN, never), sweep.Variant("as it is", 2, "", RUN, GIVEN)],
    steps=2,
    least_warm_up=0,
    failed=lambda variant, error: told.append((variant.label, str(error))),
  )
  assert [row["label"] for row in rows] == ["as it is"]
  assert [label for label, _ in told] == ["never"] and "errored" in told[0][1]
