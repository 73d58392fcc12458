"""Orchestrator and workers together, over both links, with a policy that needs no server."""

import asyncio
import time

import numpy as np
import pytest

from intellect3 import rollout_log
from intellect3.rollouts import link, messages, orchestrator
from tests.rollouts.helpers import all_records, free_port
from tests.rollouts.world import SlowShards, Sync, World


def identity(row):
  ended = sum(row[key] for key in ("trained", "filtered", "stale", "cancelled", "errored"))
  return row["dispatched"] == ended + row["in_flight"]


def test_a_run_in_process_commits_every_step_and_the_identity_holds_in_every_row(tmp_path):
  world = World(tmp_path, failing=0.2)
  asyncio.run(world.run(evaluation_tasks=7))
  assert rollout_log.committed_steps(world.log_dir) == [1, 2, 3, 4, 5]
  assert sorted(world.rows) == [1, 2, 3, 4, 5]
  for step, row in world.rows.items():
    assert identity(row)
    assert row["staleness_max"] <= 1
    assert rollout_log.read_manifest(world.log_dir, step).metrics == row
  last = world.rows[5]
  assert last["errored"] > 0 and last["ended/errored/RuntimeError"] > 0
  assert sorted(world.evaluations) == [0, 5]
  assert world.evaluations[0]["tasks"] == 7
  phase, counts = world.phases[-1]
  assert phase == "done" and counts["in_flight"] == 0


def test_groups_never_mix_tasks_and_advantages_follow_their_own_group(tmp_path):
  world = World(tmp_path, prompts_per_step=3)
  asyncio.run(world.run())
  for step in range(1, 6):
    by_group = {}
    for record in all_records(world.log_dir, rollout_log.read_manifest(world.log_dir, step)):
      by_group.setdefault(record.group_id, []).append(record)
    assert len(by_group) == 3
    for records in by_group.values():
      assert len({record.task_id for record in records}) == 1
      rewards = np.array([record.reward for record in records])
      np.testing.assert_allclose([r.advantage for r in records], rewards - rewards.mean())


def test_slow_rollouts_go_stale_and_are_counted_by_length(tmp_path):
  slow = lambda dispatch: 0.3 if dispatch.group_id % 5 == 1 else 0.001  # noqa: E731
  world = World(tmp_path, steps=8, delay=slow, max_off_policy_steps=1, max_rollouts_in_flight=60)
  asyncio.run(world.run())
  last = world.rows[8]
  assert last["stale"] > 0
  assert world.phases[-1][1]["cancelled"] > 0  # what still ran when the last batch was full
  assert any(
    key.startswith("stale_share/length_decile_") for key in set().union(*world.rows.values())
  )


def test_workers_over_sockets_and_another_goes_on_with_what_one_that_dies_had(tmp_path):
  async def scenario():
    world = World(tmp_path, steps=6, delay=lambda d: 0.03)
    machine = world.orchestrator(num_workers=2)
    server = link.OrchestratorServer(
      machine,
      version_published=lambda version: None,
      batch_exists=lambda step: rollout_log.read_manifest(world.log_dir, step) is not None,
      poll_seconds=0.2,
    )
    port = free_port()
    await server.start("127.0.0.1", port)
    url = f"http://127.0.0.1:{port}"
    remote = [
      asyncio.create_task(
        link.run_remote_worker(url, world.make_worker(f"worker_{n}"), patience_seconds=5)
      )
      for n in range(2)
    ]

    async def kill_one():
      await world.second_step.wait()
      while not machine._holdings.load["worker_1"]:  # noqa: ASYNC110 - until it has something to lose
        await asyncio.sleep(0.001)
      remote[1].cancel()

    try:
      await asyncio.wait_for(asyncio.gather(machine.run(), world.trainer(), kill_one()), 30)
    finally:
      await server.close()
    await asyncio.wait_for(remote[0], 5)  # it was told Shutdown
    return world

  world = asyncio.run(scenario())
  assert "ended/errored/worker lost" not in world.rows[6]
  assert all(identity(row) for row in world.rows.values())
  shards = {
    s.file.rpartition("_")[0]
    for n in range(1, 7)
    for s in rollout_log.read_manifest(world.log_dir, n).shards
  }
  assert shards == {"worker_0", "worker_1"}


def test_a_fenced_server_poisons_what_it_made_and_the_last_one_ends_the_run(tmp_path):
  world = World(tmp_path, steps=5)
  world.sync_results[2] = Sync(healthy=(), fenced={"http://a": "canary logprob off by 0.3"})
  with pytest.raises(orchestrator.RunFailed, match="canary logprob off"):
    asyncio.run(world.run())
  assert rollout_log.committed_steps(world.log_dir)[-1] <= 4


def test_a_worker_that_cannot_write_ends_the_run_with_the_reason(tmp_path):
  world = World(tmp_path)
  (tmp_path / "rollouts").write_text("a file where a directory should be")
  with pytest.raises(orchestrator.RunFailed, match="worker_0"):
    asyncio.run(world.run())


def test_messages_are_small():
  dispatch = messages.Dispatch(
    rollout_id=10**6,
    group_id=10**5,
    sample=15,
    environment="software_engineering",
    split="train",
    index=10**6,
    seed=2**62,
    temperature=1.0,
  )
  summary = messages.RolloutSummary(
    rollout_id=10**6,
    group_id=10**5,
    purpose="train",
    environment="software_engineering",
    reward=1.0,
    error=None,
    truncated=False,
    lengths=[65536, 40000],
    sampled_tokens=60000,
    oldest_version=100,
    newest_version=104,
    servers=["http://10.0.0.1:30000", "http://10.0.0.2:30000"],
    metrics={"tests_passed": 0.5},
    seconds=1200.0,
  )
  assert len(messages.encode(dispatch)) + len(messages.encode(summary)) < 1024
  assert messages.decode_from_worker(messages.encode(summary)) == summary


def test_the_long_poll_answers_when_the_batch_is_there(tmp_path):
  async def scenario():
    import aiohttp

    world = World(tmp_path)
    server = link.OrchestratorServer(
      world.orchestrator(),
      version_published=lambda version: None,
      batch_exists=lambda step: step == 1,
      poll_seconds=0.2,
    )
    port = free_port()
    await server.start("127.0.0.1", port)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
      assert (await session.get("/batches/1")).status == 200
      began = time.monotonic()
      assert (await session.get("/batches/2")).status == 204
      assert time.monotonic() - began >= 0.2
      waiting = asyncio.create_task(session.get("/batches/2"))
      await asyncio.sleep(0.05)
      server.batch_committed(2)
      assert (await waiting).status == 200
    await server.close()

  asyncio.run(scenario())


def test_every_worker_is_told_of_the_end_however_many_there_are(tmp_path):
  async def scenario():
    world = World(tmp_path, steps=2)
    machine = world.orchestrator(num_workers=4)
    server = link.OrchestratorServer(
      machine, version_published=lambda version: None, batch_exists=lambda step: False
    )
    port = free_port()
    await server.start("127.0.0.1", port)
    remote = [
      asyncio.create_task(
        link.run_remote_worker(
          f"http://127.0.0.1:{port}", world.make_worker(f"worker_{n}"), patience_seconds=5
        )
      )
      for n in range(4)
    ]
    await asyncio.wait_for(asyncio.gather(machine.run(), world.trainer()), 30)
    await server.close()
    await asyncio.wait_for(asyncio.gather(*remote), 10)

  asyncio.run(scenario())


def test_a_late_answer_to_an_abandoned_plan_never_enters_the_next_one(tmp_path):
  async def scenario():
    world = World(tmp_path, steps=3, prompts_per_step=4)
    machine = world.orchestrator(num_workers=2)
    slow = SlowShards(machine, world.make_worker("worker_0"))
    doomed = SlowShards(machine, world.make_worker("worker_1"))

    async def kill_while_the_first_batch_is_written():
      while not (slow.held and doomed.held):  # noqa: ASYNC110 - until both answers wait
        await asyncio.sleep(0.002)
      machine.disconnected("worker_1")
      await asyncio.sleep(0.01)
      slow.release()

    await asyncio.wait_for(
      asyncio.gather(machine.run(), world.trainer(), kill_while_the_first_batch_is_written()), 30
    )
    await slow.close()
    await doomed.close()
    return world

  world = asyncio.run(scenario())
  for step in (1, 2, 3):
    manifest = rollout_log.read_manifest(world.log_dir, step)
    records = all_records(world.log_dir, manifest)
    assert len(records) == manifest.num_rollouts
    assert all(entry.file.startswith("worker_0_") for entry in manifest.shards)
    by_group = {}
    for record in records:
      by_group.setdefault(record.group_id, []).append(record)
    assert len(by_group) == 4
  assert "ended/errored/worker lost" not in world.rows[3]
