"""The throughput simulator: runs whose times are known by hand, and what holds of every run."""

import dataclasses
import itertools
import json

import pytest

from intellect3.rollouts import accounting, difficulty, filters, ports
from intellect3.simulation import scenario, throughput
from tests.simulation import scenes


def simulate(run=None, cluster=None, **options):
  return throughput.simulate(run or scenes.run(), cluster or scenes.cluster(), **options)


def test_the_synchronous_loop_waits_for_itself():
  """2 s of sampling, 3 of training, 0.5 to gather, 0.25 to write, 0.25 to load: one by one."""
  report = simulate()
  assert report["step_seconds"]["by_step"] == pytest.approx([5.5] + [6.0] * 9)
  assert report["step_seconds"]["mean"] == pytest.approx(6.0)
  assert report["trainer_idle_share"] == pytest.approx(2.5 / 6.0)
  assert report["inference_idle_share"] == pytest.approx(3.75 / 6.0)
  assert report["inference_paused_share"] == pytest.approx(0.25 / 6.0)
  assert report["staleness"]["histogram"] == {"0": 1.0}
  assert report["sampled_tokens_per_second"] == pytest.approx(4 * 200 / 6.0)
  assert report["trained_tokens_per_second"] == pytest.approx(4 * 208 / 6.0)


def test_the_asynchronous_loop_is_as_fast_as_its_slower_half():
  run = scenes.run(max_off_policy_steps=4, steps=11)
  quick = scenario.Trainer(fixed_seconds=1.0)
  report = simulate(run, scenes.cluster(trainer=quick, sync=scenario.Sync()))
  assert report["step_seconds"]["by_step"] == pytest.approx([3.0] + [2.0] * 10)
  assert report["trainer_idle_share"] == pytest.approx(0.5)
  # As soon as four rollouts end the next four begin: until the last batch is there, none is idle.
  assert report["inference_idle_share"] == pytest.approx(0.0, abs=1e-9)
  # Batch k is trained in the first half of batch k + 1's sampling: of that half the tokens are one
  # version old. (The first batch has no older version to be of; the warm-up is left out.)
  assert report["staleness"]["histogram"] == pytest.approx({"0": 0.5, "1": 0.5})
  slow = scenario.Trainer(fixed_seconds=5.0, gather_seconds=0.5)
  report = simulate(run, scenes.cluster(trainer=slow, sync=scenario.Sync()))
  assert report["step_seconds"]["mean"] == pytest.approx(5.5)
  assert report["trainer_idle_share"] == pytest.approx(0.0, abs=1e-9)


def test_retraction_computes_again_what_ran():
  run = scenes.run(max_off_policy_steps=4, steps=11)
  given = scenes.cluster(
    trainer=scenario.Trainer(fixed_seconds=1.0),
    sync=scenario.Sync(),
    servers=scenes.servers(prefill_tokens_per_second=404.0),
    environments={"default": scenes.environment(prompt_tokens=1)},
  )
  kept, dropped = (
    simulate(run, given),
    simulate(dataclasses.replace(run, sync_mode="retract"), given),
  )
  assert kept["reprefilled"]["retracted"] == 0
  # Each of six updates finds four rollouts of 1 + about 100 tokens: a second of prefill.
  assert dropped["reprefilled"]["retracted"] == 6 * 4 * 101
  longer = dropped["step_seconds"]["mean"] - kept["step_seconds"]["mean"]
  assert longer == pytest.approx(1.0, rel=0.02)


def test_a_step_takes_the_trainers_time_for_its_tokens():
  trainer = scenario.Trainer(fixed_seconds=1.0, seconds_per_token=0.01, read_seconds=0.5)
  report = simulate(cluster=scenes.cluster(trainer=trainer, sync=scenario.Sync()))
  assert report["step_seconds"]["mean"] == pytest.approx(2.0 + 0.5 + 1.0 + 0.01 * 4 * 208)


def test_one_version_is_written_at_a_time():
  run = scenes.run(max_off_policy_steps=4, steps=11)
  trainer = scenario.Trainer(fixed_seconds=1.0, gather_seconds=0.5, write_seconds=4.0)
  report = simulate(run, scenes.cluster(trainer=trainer, sync=scenario.Sync()))
  assert report["step_seconds"]["p50"] == pytest.approx(4.5)


def test_turns_tools_and_rewards_take_their_time():
  given = scenes.environment(turns=4, turn_tokens=10, reward_seconds=1.5)
  report = simulate(cluster=scenes.cluster(environments={"coin": given}))
  assert report["step_seconds"]["mean"] == pytest.approx(6.0 + 1.5)
  assert report["trained_tokens_per_second"] == pytest.approx(4 * (208 + 3 * 10) / 7.5)


def busy(**changes):
  """A run in which everything happens: failures, filters, pools, staleness, several turns."""
  lengths = scenario.Lengths(median=100, sigma=1.5, task_share=0.3, maximum=1500)
  given = scenes.cluster(
    servers=scenes.servers(
      count=3,
      max_running=6,
      decode_batch=(1, 8),
      decode_tokens_per_second=(60.0, 200.0),
      prefill_tokens_per_second=2000.0,
      cache_tokens=3000,
      latency_seconds=0.01,
    ),
    trainer=scenario.Trainer(fixed_seconds=1.0, seconds_per_token=2e-4),
    environments={
      "coin": scenes.environment(
        lengths=lengths,
        turns=3,
        turn_tokens=20,
        tool_seconds=2.0,
        error_rate=0.1,
        solved=(0.0, 0.2, 0.8, 1.0),
      )
    },
    sync=scenario.Sync(load_seconds=0.5, spread_seconds=1.0),
  )
  run = scenes.run(
    **{
      "steps": 12,
      "prompts_per_step": 4,
      "rollouts_per_prompt": 4,
      "max_off_policy_steps": 1,
      "max_rollouts_in_flight": 48,
      "num_workers": 3,
      "pools": difficulty.Pools(easy_threshold=1.0, hard_threshold=0.0, easy_fraction=0.1),
      "group_filters": scenes.filters.Filters(truncated=True),
      "evaluation_tasks": 3,
      "segment_tokens": 64,
      **changes,
    }
  )
  return run, given


@pytest.mark.parametrize("rule", ["drop", "mask"])
@pytest.mark.parametrize("shared", [True, False])
def test_every_rollout_ends_once_and_none_is_too_stale(rule, shared):
  run, given = busy(staleness_rule=rule)
  given = dataclasses.replace(given, clients=scenario.Clients(shared_balance=shared))
  report = simulate(run, given, warm_up_steps=1)
  assert [row["step"] for row in report["rows"]] == list(range(1, 13))
  for row in [*report["rows"], {**report["accounting"]}]:
    ended = sum(row[outcome] for outcome in accounting.OUTCOMES)
    assert row["dispatched"] == ended + row["in_flight"]
  counts = report["accounting"]
  assert counts["in_flight"] == 0
  assert all(counts[name] for name in ("trained", "filtered", "stale", "cancelled", "errored"))
  assert report["staleness"]["max"] <= 1
  assert (report["masked_token_share"] > 0) == (rule == "mask")
  ended, tenths = report["ended"], report["by_length_decile"]
  wanted = ended["trained"] + ended["filtered"] + ended["stale"]
  assert [entry["decile"] for entry in tenths] == list(range(10))
  assert sum(entry["rollouts"] for entry in tenths) == wanted


def test_the_same_seed_gives_the_same_events():
  run, given = busy()
  first, second, other = [], [], []
  assert simulate(run, given, trace=first.append) == simulate(run, given, trace=second.append)
  simulate(run, dataclasses.replace(given, seed=1), trace=other.append)
  assert "".join(first) == "".join(second) != "".join(other)
  events = [json.loads(line) for line in first]
  assert [event["t"] for event in events] == sorted(event["t"] for event in events)
  dispatched = [event["rollout"] for event in events if event["event"] == "dispatched"]
  ended = [event["rollout"] for event in events if event["event"] in accounting.OUTCOMES]
  assert len(dispatched) == len(set(dispatched)) and sorted(ended) == sorted(dispatched)
  # What explains a step: who was asked for a turn, what a batch is of, when servers stood still.
  asked = {(e["rollout"], e["turn"]) for e in events if e["event"] == "asked"}
  batches = [e for e in events if e["event"] == "batch"]
  trained = {e["rollout"] for e in events if e["event"] == "trained"}
  assert {rollout for e in batches for rollout in e["rollouts"]} == trained
  assert {(rollout, turn) for rollout in trained for turn in range(3)} <= asked
  still = [
    (e["event"], e["t"])
    for e in events
    if e.get("server") == "http://server-1" and "rollout" not in e
  ]
  assert [name for name, _ in still[:3]] == ["paused", "loaded", "synced"]
  assert still[1][1] - still[0][1] == pytest.approx(still[2][1])  # its own time to load


def test_events_are_counted_by_kind():
  lines = []
  report = simulate(trace=lines.append)
  events = report["events"]
  assert events["traced"] == len(lines)
  # Ten steps of four rollouts on one server, all of a step ending at once; no warm-up left out.
  assert events["servers"] == 10
  # Hello; for a step Servers, four dispatches and summaries, WriteBatch, BatchWritten and Forget;
  # then word of the last version, and Shutdown.
  assert events["messages"] == 1 + 10 * (1 + 4 + 4 + 1 + 1 + 1) + 2


def test_more_servers_are_never_slower():
  run, given = busy(max_off_policy_steps=3, max_rollouts_in_flight=64)
  seconds = []
  for count in (1, 2, 4, 8):
    servers = dataclasses.replace(given.servers, count=count)
    report = simulate(run, dataclasses.replace(given, servers=servers))
    seconds.append(report["step_seconds"]["mean"])
  assert seconds == sorted(seconds, reverse=True)
  assert seconds[0] > 1.5 * seconds[-1]


def test_a_looser_bound_on_staleness_is_never_slower():
  seconds = [
    simulate(scenes.run(max_off_policy_steps=bound, max_rollouts_in_flight=16))["step_seconds"][
      "mean"
    ]
    for bound in (0, 1, 4)
  ]
  assert seconds == sorted(seconds, reverse=True) and seconds[0] > 1.5 * seconds[-1]


def test_a_timeline_is_sampled_where_asked_for():
  report = simulate(sample_seconds=0.5)
  timeline = report["timeline"]
  assert timeline["seconds"][:3] == [0.0, 0.5, 1.0]
  running = [sum(at) for at in timeline["running"]]
  assert running[:6] == [0, 4, 4, 4, 4, 0]  # the load until 0.25, then 2 s of four rollouts
  assert simulate()["timeline"]["seconds"] == []


def test_a_long_timeline_is_thinned(monkeypatch):
  monkeypatch.setattr(throughput, "MOST_SAMPLES", 40)
  seconds = simulate(sample_seconds=0.5)["timeline"]["seconds"]
  assert 20 <= len(seconds) <= 40 and seconds[-1] > 57.0  # of about 60 s
  steps = {later - sooner for sooner, later in itertools.pairwise(seconds)}
  assert steps == {2.0}


@pytest.mark.parametrize(
  ("run", "given", "message"),
  [
    (
      {},
      {"sync": scenario.Sync(load_seconds=1.0, spread_seconds=50.0)},
      "sync.spread_seconds: .*29",
    ),
    (
      {},
      {"servers": scenes.servers(cache_tokens=1999)},
      "servers.cache_tokens: .* at least the run's max_tokens \\(2000\\), got 1999",
    ),
    ({"max_tokens": 8}, {}, "environments.coin: .* max_tokens \\(8\\), got 8"),
    ({"environment_weights": {"dice": 1.0}}, {}, "weights: expected the environments"),
    ({"sync_mode": "hurry"}, {}, "sync_mode: expected one of"),
    ({"weights_lag": 3}, {}, "weights_lag: expected at most max_off_policy_steps \\(0\\), got 3"),
    ({"segment_tokens": 0}, {}, "segment_tokens: expected an integer >= 1, got 0"),
  ],
)
def test_what_does_not_fit_together_is_refused(run, given, message):
  with pytest.raises(ValueError, match=message):
    simulate(scenes.run(**run), scenes.cluster(**given))


@pytest.mark.parametrize(
  ("run", "environment", "message"),
  [
    ({}, {"error_rate": 1.0}, r"64 groups .* 0 wait for a batch: errored 128 \(Simulated 128\)$"),
    (
      {"group_filters": filters.Filters()},
      {"solved": (1.0,)},
      r"64 groups .* 0 wait for a batch: filtered 128 \(zero_advantage 128\)$",
    ),
  ],
)
def test_a_run_that_never_trains_ends_as_in_production(run, environment, message, caplog):
  cluster = scenes.cluster(environments={"default": scenes.environment(**environment)})
  with pytest.raises(ports.RunFailed, match=message):
    simulate(scenes.run(max_groups_in_vain=64, **run), cluster)
  assert len([entry for entry in caplog.records if entry.levelname == "ERROR"]) == 1


def test_a_warm_up_must_leave_steps():
  with pytest.raises(ValueError, match="warm_up_steps: expected fewer than steps"):
    simulate(warm_up_steps=10)
