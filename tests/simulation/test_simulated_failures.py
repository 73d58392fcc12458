"""Servers and workers that are lost and come back, in the throughput simulator."""

import asyncio
import json
import random

import pytest

from intellect3.rollouts import accounting
from intellect3.simulation import (
  clock,
  cluster,
  rates,
  requests,
  scenario,
  server,
  throughput,
  watching,
)
from tests.simulation import scenes
from tests.simulation.test_throughput import busy


@pytest.fixture
def punctual(monkeypatch):
  """What is lost on average after so many seconds is lost after exactly so many."""
  monkeypatch.setattr(random.Random, "expovariate", lambda self, rate: 1.0 / rate)


def test_a_lost_server_takes_the_segments_that_were_not_answered():
  settings = scenes.servers(max_running=1)

  async def main():
    one = server.Server("http://a", settings, rates.Rates(settings), 50)
    one.version = 3
    told = []
    running, waiting = (
      requests.Request(
        group=name,
        prompt=8,
        context=8,
        known=0,
        version=3,
        left=200,
        ended=lambda: told.append("ended"),
        failed=lambda name=name: told.append(name),
      )
      for name in ("a", "b")
    )
    one.submit(running)
    await asyncio.sleep(0.7)  # 70 tokens, 50 of which were told of
    assert (one.running, one.waiting) == (1, 0)
    one.submit(waiting)
    one.lose()
    await asyncio.sleep(2.0)
    assert (told, one.running, one.waiting, one.version) == (["a", "b"], 0, 0, -1)
    late = requests.Request(
      group="c", prompt=1, context=1, known=0, version=3, left=1, ended=None,
      failed=lambda: told.append("c"),
    )  # fmt: skip
    one.submit(late)
    await asyncio.sleep(1.0)
    one.restart()
    await asyncio.sleep(1.0)
    return told, running, waiting, one.settle()

  told, running, waiting, usage = clock.run(main())
  assert told == ["a", "b", "c"]
  assert (running.made, running.left, running.context) == ({3: 50}, 150, 58)
  assert (waiting.made, waiting.left, waiting.context) == ({}, 200, 8)
  assert (usage.decoding, usage.lost) == (pytest.approx(0.7), pytest.approx(3.0))


def test_of_a_broken_segment_the_newest_versions_go_first():
  request = requests.Request(
    group="a", prompt=8, context=108, known=0, version=3, left=20, ended=None,
    made={2: 60, 3: 30, 4: 10}, unfinished=25,
  )  # fmt: skip
  requests.lose_segment(request)
  assert (request.made, request.left, request.context) == ({2: 60, 3: 15}, 45, 83)
  assert request.unfinished == 0


def test_a_server_is_lost_and_back(punctual):
  """Steps of 6 s; the only server is lost in the eighth, 1.25 s into its rollouts, for 5 s.

  Clients ask again after 0.25, 0.5, 1 and 2 s; at the third look without an answer, within 6 s, the
  fleet takes the server out, and brings it weights once it answers.
  """
  given = scenes.cluster(
    failures=scenario.Failures(server_mean_seconds=43.5, server_repair_seconds=5.0)
  )
  events = []
  told = throughput.simulate(
    scenes.run(segment_tokens=50), given, warm_up_steps=4, trace=events.append
  )
  events = [json.loads(line) for line in events]
  lost, back = (
    next(e["t"] for e in events if e["event"] == f"server_{w}") for w in ("lost", "back")
  )
  assert (lost, back) == (pytest.approx(43.5), pytest.approx(48.5))
  assert told["inference_lost_share"] == pytest.approx(5.0 / told["measured_seconds"])
  assert told["errored_share"] == 0.0 and told["ended"]["trained"] == 24
  longer = [seconds - 6.0 for seconds in told["step_seconds"]["by_step"][1:]]
  assert [round(one, 3) for one in longer if one > 1e-6] == [round(max(longer), 3)]
  assert 5.0 < max(longer) < 5.0 + 2 * 2.0 + 1.0  # then looked at every 2 s; 50 tokens again
  # Of each rollout two segments were answered; 25 tokens of the third are lost and sampled again.
  sampled = told["sampled_tokens_per_second"] * told["measured_seconds"]
  assert sampled == pytest.approx(6 * 800 + 4 * 25)


def test_of_a_lost_worker_others_go_on(punctual):
  """Of two workers one after the other is lost, while their rollouts run; no rollout is."""
  given = scenes.cluster(
    failures=scenario.Failures(worker_mean_seconds=13.5, worker_repair_seconds=1.0)
  )
  told = throughput.simulate(scenes.run(num_workers=2, segment_tokens=50), given, warm_up_steps=1)
  assert told["errored_share"] == 0.0
  assert told["ended"]["trained"] == 9 * 4
  assert told["staleness"]["histogram"] == {"0": 1.0}
  assert told["orchestrator"]["messages"]["Hello"] > 2


@pytest.mark.parametrize("shared", [True, False])
def test_with_all_failures_every_rollout_still_ends_once(shared):
  run, given = busy(max_off_policy_steps=3)
  failures = scenario.Failures(
    server_mean_seconds=60.0,
    server_repair_seconds=30.0,
    worker_mean_seconds=60.0,
    worker_repair_seconds=20.0,
  )
  clients = scenario.Clients(shared_balance=shared)
  given = scenario.dataclasses.replace(given, failures=failures, clients=clients)
  first, second = [], []
  told = throughput.simulate(run, given, trace=first.append)
  assert told == throughput.simulate(run, given, trace=second.append) and first == second
  counts = told["accounting"]
  assert counts["dispatched"] == sum(counts[outcome] for outcome in accounting.OUTCOMES)
  assert 0.1 < told["inference_lost_share"] < 0.5
  quiet = throughput.simulate(*busy(max_off_policy_steps=3))
  assert quiet["inference_lost_share"] == 0.0
  assert told["errored_share"] > quiet["errored_share"]
  assert told["sampled_tokens_per_second"] < quiet["sampled_tokens_per_second"]


def test_losses_are_drawn_from_the_scenarios_seed():
  async def lost_at(seed):
    times = []
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(
      cluster.losing(
        random.Random(seed), 10.0, 5.0, lambda: times.append(loop.time()), lambda: None
      )
    )
    await asyncio.sleep(10_000.0)
    task.cancel()
    return times

  one, same, other = (clock.run(lost_at(seed)) for seed in (1, 1, 2))
  assert one == same != other
  assert len(one) == pytest.approx(10_000 / 15, rel=0.15)


def test_finished_rollouts_of_a_lost_worker_are_not_sampled_again(punctual):
  """Three rollouts of a step end after 2 s, the fourth 2 s later; in between all workers are lost.

  The third step's sampling begins at 16.25 s; at 19.3 s the fourth has 105 tokens of a segment that
  nobody was told of.
  """
  given = scenes.cluster(
    servers=scenes.servers(max_running=3),
    failures=scenario.Failures(worker_mean_seconds=19.3, worker_repair_seconds=1.0),
  )
  run = scenes.run(num_workers=2, steps=4)
  told = throughput.simulate(run, given, warm_up_steps=1)
  sampled = told["sampled_tokens_per_second"] * told["measured_seconds"]
  assert sampled == pytest.approx(3 * 800 + 105)
  assert told["ended"]["trained"] == 12 and told["errored_share"] == 0.0


def test_a_batch_that_is_planned_again_counts_once():
  async def main():
    watch = watching.Watch(group_size=2, trace=None, timeout_seconds=9.0)
    watch.trained(5, 1, 0, {4: 100, 2: 50}, 3)
    watch.trained(5, 2, 1, {4: 30}, 3)
    watch.trained(5, 2, 2, {3: 7}, 3)
    return watch.staleness

  assert clock.run(main()) == {5: {0: 30, 1: 7}}


def test_clients_give_up_after_some_failures(punctual):
  """The fleet looks too rarely to see that the only server is gone: six failures in 7.75 s."""
  given = scenes.cluster(
    failures=scenario.Failures(server_mean_seconds=13.5, server_repair_seconds=9.0)
  )
  events = []
  run = scenes.run(steps=4, server_poll_seconds=20.0)
  told = throughput.simulate(run, given, warm_up_steps=1, trace=events.append)
  failed = [json.loads(line) for line in events if '"errored"' in line]
  assert {event["reason"] for event in failed} == {"ServerUnavailable"}
  assert [event["t"] for event in failed[:4]] == pytest.approx([13.5 + 7.75] * 4)
  assert told["errored_share"] > 0


def test_a_server_that_is_lost_while_weights_are_brought_has_none():
  given = scenes.cluster(sync=scenario.Sync(pause_seconds=1.0, load_seconds=4.0))

  async def main():
    watch = watching.Watch(group_size=1, trace=None, timeout_seconds=9.0)
    servers = cluster.Cluster(given, 100, False, watch)
    (url,) = servers.servers
    bringing = asyncio.ensure_future(servers.bring(url, 1, lambda told: None))
    await asyncio.sleep(2.0)
    servers.servers[url].lose()
    servers.servers[url].restart()
    lost = await bringing
    again = await servers.bring(url, 1, lambda told: None)
    return lost, again, servers.servers[url].version, len(watch.syncs)

  lost, again, version, syncs = clock.run(main())
  assert (lost.ok, lost.answered) == (False, False)
  assert (again.ok, version, syncs) == (True, 1, 1)


def test_a_group_is_through_without_those_that_are_lost():
  async def main():
    watch = watching.Watch(group_size=2, trace=None, timeout_seconds=9.0)
    watch.dispatched(6)
    watch.dispatched(7)
    await asyncio.sleep(1.0)
    watch.ended(7, "errored", "worker lost")
    await asyncio.sleep(2.0)
    watch.ended(6, "errored", "worker lost")
    return watch.group_seconds

  assert clock.run(main()) == [(1.0, 3.0)]
