"""Every figure of the report, worked by hand: of counts that were made up, and of small runs."""

import asyncio
import collections
import dataclasses
import types

import pytest

from intellect3.rollouts import messages
from intellect3.simulation import (
  clock,
  rates,
  report,
  requests,
  scenario,
  server,
  throughput,
  traffic,
  watching,
  window,
)
from tests.simulation import scenes

LENGTHS = range(10, 201, 10)


def mark(seconds, **changed):
  """Nothing counted, but what is said."""
  given = {
    "usages": [server.Usage(), server.Usage()],
    "counts": dict.fromkeys(("trained", "filtered", "stale", "cancelled", "errored"), 0),
    "outcomes": 0,
    "groups": 0,
    "slow_segments": 0,
    "messages": collections.Counter(),
    "bytes": collections.Counter(),
    **changed,
  }
  return window.Mark(seconds=seconds, **given)


def outcomes():
  """Of 20 lengths: the shortest filtered, the longest stale, some tokens of two others masked."""
  ended = {10: "filtered", 200: "stale"}
  masked = {100: 50, 190: 19}
  kept = [(length, ended.get(length, "trained"), masked.get(length, 0)) for length in LENGTHS]
  return [*kept, (7000, "errored", 0), (7000, "cancelled", 0)]


def made(**changed):
  """A report of three steps, the first of them warm-up."""
  steps = {
    1: {"tokens": 9e9, "waiting": 0.0, "begun": 4.0, "stepped": 9.0, "ended": 10.0},
    2: {"tokens": 1000, "waiting": 10.0, "begun": 15.0, "stepped": 19.0, "ended": 20.0},
    3: {"tokens": 3000, "waiting": 20.0, "begun": 22.0, "stepped": 39.0, "ended": 40.0},
  }
  row = collections.defaultdict(float)
  watch = types.SimpleNamespace(
    started=1.0,
    steps=steps,
    commits={1: 3.0, 2: 12.0, 3: 23.0},
    rows={
      1: row | {"staleness_mean": 9.0, "stale": 2, "trained": 10},
      2: row | {"staleness_mean": 1.0, "stale": 3, "trained": 13, CONTINUED: 30.0},
      3: row | {"staleness_mean": 2.5, "stale": 3, "trained": 17, CONTINUED: 12.0},
    },
    staleness={
      1: collections.Counter({7: 1000}),
      2: collections.Counter({0: 300, 1: 100}),
      3: collections.Counter({1: 100}),
    },
    outcomes=[(9999, "stale", 0), *outcomes(), (9999, "stale", 0)],
    group_seconds=[(99.0, 99.0), (1.0, 4.0), (3.0, 8.0), (99.0, 99.0)],
    syncs=[(0, "http://a", 0.0, 1.0)],
  )
  given = {
    "watch": watch,
    "begun": mark(3.0, outcomes=1, groups=1),
    "done": mark(23.0, outcomes=1 + len(outcomes()), groups=3),
    "warm_up": 1,
    "samples": [(0.5, [1, 2], [3, 4], 5)],
    "counts": {"dispatched": 77},
    "events": {"messages": 4321},
    **changed,
  }
  return report.make(scenes.run(steps=3), scenes.cluster(), **given)


CONTINUED = "reprefilled_tokens/continued"


def test_steps_and_the_trainer():
  told = made()
  assert told["trainer_idle_share"] == pytest.approx((5 + 2) / 30)
  assert told["step_seconds"]["by_step"] == [9.0, 10.0, 20.0]
  assert [told["step_seconds"][name] for name in ("mean", "p50", "p90")] == [15.0, 15.0, 19.0]
  assert told["trained_tokens_per_second"] == pytest.approx(4000 / 30)
  assert (told["virtual_seconds"], told["measured_seconds"]) == (40.0, 20.0)
  assert told["drift"] == pytest.approx(
    {
      "seconds_per_token": (20 / 3000) / (10 / 1000) - 1,
      "rollout_staleness": 1.5,
      "stale_share": 0 / 4 - 1 / 4,
    }
  )
  assert made(warm_up=2)["drift"] == {}


def test_staleness_is_of_tokens_and_of_rollouts():
  told = made()["staleness"]
  assert told == {
    "token_mean": pytest.approx(200 / 500),
    "rollout_mean": pytest.approx(1.75),
    "max": 1,
    "histogram": pytest.approx({"0": 0.6, "1": 0.4}),
  }


def test_losses_by_length():
  told = made()
  trained = sum(LENGTHS) - 10 - 200
  assert told["stale_share"] == pytest.approx(1 / 19)
  assert told["masked_token_share"] == pytest.approx(69 / trained)
  assert told["filtered_share"] == pytest.approx(1 / 20)
  tenths = told["by_length_decile"]
  assert [(one["low"], one["high"], one["rollouts"]) for one in tenths] == [
    (20 * index + 10, 20 * index + 20, 2) for index in range(10)
  ]
  assert (tenths[0]["filtered_share"], tenths[0]["stale_share"]) == (0.5, 0.0)
  assert tenths[4]["masked_token_share"] == pytest.approx(50 / (90 + 100))
  assert (tenths[9]["stale_share"], tenths[9]["masked_token_share"]) == (0.5, pytest.approx(0.1))


def test_groups_queues_and_servers():
  before = server.Usage(decoding=5.0, running=100.0, sampled=7.0, most_waiting=90, prefilled=4)
  after = [
    server.Usage(
      decoding=11.0,
      prefilling=3.0,
      paused=1.0,
      running=160.0,
      waiting=30.0,
      most_waiting=6,
      sampled=1007.0,
      prefilled=54,
      retracted=21,
      evicted=2,
    ),
    server.Usage(decoding=20.0, running=40.0, waiting=10.0, most_waiting=4),
  ]
  told = made(
    begun=mark(3.0, usages=[before, server.Usage()], outcomes=1, groups=1),
    done=mark(23.0, usages=after, outcomes=23, groups=3),
  )
  assert told["groups"]["first_seconds"] == pytest.approx({"p50": 2.0, "p90": 2.8, "p99": 2.98})
  assert told["groups"]["last_seconds"] == pytest.approx({"p50": 6.0, "p90": 7.6, "p99": 7.96})
  # Two servers for 20 s each: 6 and 20 s of decoding, 3 of prefill, 1 paused.
  assert told["inference_idle_share"] == pytest.approx(1 - 30 / 40)
  assert told["inference_prefill_share"] == pytest.approx(3 / 40)
  assert told["inference_paused_share"] == pytest.approx(1 / 40)
  assert told["queues"] == {
    "running_per_server": pytest.approx(100 / 40),
    "waiting_per_server": pytest.approx(40 / 40),
    "most_waiting": 6,
    "evicted": 2,
  }
  assert told["sampled_tokens_per_second"] == pytest.approx(1000 / 20)
  assert told["reprefilled"] == {"retracted": 21, "continued": 42.0, "prefilled": 50}


def test_messages_ends_and_what_is_of_the_whole_run():
  ended = {"trained": 12, "filtered": 3, "stale": 1, "cancelled": 2, "errored": 7}
  counter = collections.Counter
  told = made(
    begun=mark(3.0, messages=counter(A=10), bytes=counter(A=1000), counts=ended, slow_segments=5),
    done=mark(
      23.0,
      messages=counter(A=30, B=10),
      bytes=counter(A=5000, B=100),
      counts={name: 2 * count for name, count in ended.items()},
      slow_segments=9,
    ),
  )
  assert told["orchestrator"] == {
    "messages_per_second": pytest.approx(30 / 20),
    "bytes_per_second": pytest.approx(4100 / 20),
    "messages": {"A": 20, "B": 10},
    "bytes": {"A": 4000, "B": 100},
  }
  assert told["ended"] == ended
  assert told["errored_share"] == pytest.approx(7 / 25)
  assert told["slow_segments"] == 4
  assert told["accounting"] == {"dispatched": 77} and told["events"] == {"messages": 4321}
  assert told["timeline"] == {
    "seconds": [0.5],
    "running": [[1, 2]],
    "waiting": [[3, 4]],
    "clients_waiting": [5],
  }
  assert [row["committed"] for row in told["training"]] == [3.0, 12.0, 23.0]
  assert told["syncs"] == [[0, "http://a", 0.0, 1.0]]


def test_a_crowded_server():
  """Half a second of prefill for each group, 2 s for the first three rollouts, 2 for the fourth.

  Then 3 s of training, 0.5 to gather, 0.25 to write, 0.25 to load: 9 s a step.
  """
  crowded = scenes.servers(max_running=3, prefill_tokens_per_second=16.0)
  told = throughput.simulate(
    scenes.run(timeout_seconds=4.5), scenes.cluster(servers=crowded), warm_up_steps=4
  )
  assert told["step_seconds"]["by_step"][1:] == pytest.approx([9.0] * 9)
  assert told["measured_seconds"] == pytest.approx(6 * 9.0)
  assert told["trainer_idle_share"] == pytest.approx(5.5 / 9)
  assert told["inference_prefill_share"] == pytest.approx(1 / 9)
  assert told["inference_paused_share"] == pytest.approx(0.25 / 9)
  assert told["inference_idle_share"] == pytest.approx(3.75 / 9)
  assert told["queues"] == {
    "running_per_server": pytest.approx((3 * 3 + 1 * 2) / 9),
    "waiting_per_server": pytest.approx(1 * 3 / 9),
    "most_waiting": 1,
    "evicted": 0,
  }
  # The first group's rollouts end after 3 s; of the second group one does, the other after 5.
  assert told["groups"]["first_seconds"]["p99"] == pytest.approx(3.0)
  assert told["groups"]["last_seconds"] == pytest.approx({"p50": 4.0, "p90": 5.0, "p99": 5.0})
  assert told["sampled_tokens_per_second"] == pytest.approx(800 / 9)
  assert told["reprefilled"] == {"retracted": 0, "continued": 0, "prefilled": 6 * 16}
  assert told["slow_segments"] == 6  # 5 s, the wait among them
  assert told["ended"] == {"trained": 24, "filtered": 0, "stale": 0, "cancelled": 0, "errored": 0}
  sent = told["orchestrator"]
  assert sent["messages"] == {
    "Dispatch": 24,
    "RolloutSummary": 24,
    "WriteBatch": 6,
    "BatchWritten": 6,
    "Forget": 6,
    "Servers": 6,
  }
  assert sent["messages_per_second"] == pytest.approx(72 / (6 * 9))
  of_servers = [messages.encode(messages.Servers(versions={"http://server-0": v})) for v in (4, 9)]
  assert sent["bytes"]["Servers"] == 6 * len(of_servers[0]) == 6 * len(of_servers[1])
  assert sent["bytes_per_second"] == pytest.approx(sum(sent["bytes"].values()) / (6 * 9))


@pytest.mark.parametrize("shared", [True, False])
def test_every_worker_is_told_of_the_loads(shared):
  """At each look at the servers, one in 2 s of the 6 of a step: also where they share a balance."""
  given = scenes.cluster(
    servers=scenes.servers(count=2), clients=scenario.Clients(shared_balance=shared)
  )
  told = throughput.simulate(scenes.run(num_workers=3), given, warm_up_steps=4)
  assert told["orchestrator"]["messages"]["Loads"] == 6 * 3 * 3
  loads = messages.Loads(loads={"http://server-0": (1, 0), "http://server-1": (1, 0)})
  assert told["orchestrator"]["bytes"]["Loads"] == 6 * 3 * 3 * len(messages.encode(loads))


def test_without_a_warm_up_it_begins_with_the_first_weights():
  given = scenes.cluster(
    servers=scenes.servers(count=2),
    sync=scenario.Sync(load_seconds=2.0, spread_seconds=6.0),
  )
  told = throughput.simulate(scenes.run(steps=1, sync_patience_seconds=60.0), given)
  ready, committed = max(sync[3] for sync in told["syncs"][:2]), told["training"][0]["committed"]
  assert told["warm_up_steps"] == 0 and ready > 2.5
  # From when both are there: 2 s of four rollouts, and 3.5 s of the trainer.
  assert told["measured_seconds"] == pytest.approx(committed - ready) == pytest.approx(2.0)
  assert told["step_seconds"]["by_step"] == [pytest.approx(5.5)]
  assert told["trainer_idle_share"] == pytest.approx(2.0 / 5.5)
  assert told["inference_paused_share"] == 0.0
  assert told["queues"]["running_per_server"] == pytest.approx(2.0)


def test_a_turn_under_new_weights_is_computed_again():
  """Two turns of 1 s, half a second for each to get back: weights come 1.25 s into each round."""
  given = scenes.cluster(
    trainer=scenario.Trainer(fixed_seconds=1.25),
    sync=scenario.Sync(),
    servers=scenes.servers(latency_seconds=0.5),
    environments={"default": scenes.environment(turns=2, turn_tokens=10)},
  )
  told = throughput.simulate(scenes.run(max_off_policy_steps=4, steps=9), given, warm_up_steps=1)
  assert told["step_seconds"]["mean"] == pytest.approx(3.0)
  # Of two groups the first one's 8 + 100 tokens, and the other's 100: the prompt is there by then.
  assert told["reprefilled"]["continued"] == 8 * 2 * (108 + 100)
  assert told["staleness"]["token_mean"] == pytest.approx(0.5)  # the first turn's
  assert told["staleness"]["rollout_mean"] == pytest.approx(1.0)  # its oldest token


def test_a_server_that_always_runs_is_never_idle():
  run = dataclasses.replace(scenes.run(max_off_policy_steps=4, steps=8, max_rollouts_in_flight=8))
  slow = scenario.Trainer(fixed_seconds=0.5)
  told = throughput.simulate(run, scenes.cluster(trainer=slow, sync=scenario.Sync()))
  assert told["inference_idle_share"] == pytest.approx(0.0, abs=1e-9)
  assert told["queues"]["running_per_server"] == pytest.approx(8.0)


def test_servers_are_idle_where_the_trainer_is_behind():
  """Batches are sampled in 2 s of the trainer's 5, also while the last ones lie ready for it."""
  given = scenes.cluster(trainer=scenario.Trainer(fixed_seconds=5.0), sync=scenario.Sync())
  told = throughput.simulate(scenes.run(max_off_policy_steps=2, steps=20), given)
  assert told["step_seconds"]["mean"] == pytest.approx(5.0)
  assert told["inference_idle_share"] == pytest.approx(3 / 5)
  assert told["trainer_idle_share"] == pytest.approx(0.0, abs=1e-9)


def test_the_longest_queue_is_that_since_the_mark():
  settings = scenes.servers(max_running=1)

  async def main():
    one = server.Server("http://a", settings, rates.Rates(settings), 1000)
    for _ in range(4):
      one.submit(
        requests.Request(
          group="g", prompt=1, context=1, known=0, version=0, left=100, ended=lambda: None
        )
      )
    await asyncio.sleep(2.5)
    watch = watching.Watch(group_size=1, trace=None, timeout_seconds=9.0)
    counted = window.mark(2.5, servers=[one], counts={}, watch=watch, traffic=traffic.Traffic())
    await asyncio.sleep(2.0)
    return counted.usages[0].most_waiting, one.settle().most_waiting

  assert clock.run(main()) == (3, 1)
