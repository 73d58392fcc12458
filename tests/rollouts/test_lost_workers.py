"""A worker is lost: another one goes on with what it ran, held, wrote or evaluated (contract 7)."""

import asyncio

from intellect3 import rollout_log
from intellect3.rollouts import link, messages, orchestrator
from intellect3.simulation import clock
from tests.rollouts.helpers import all_records
from tests.rollouts.world import World


class Double:
  """A worker that takes all and says nothing."""

  def __init__(self, machine, name):
    self.name, self.posted = name, []
    machine.connected(self, messages.Hello(worker=name, sizes={"coin/train": 40, "coin/eval": 40}))

  def post(self, message):
    self.posted.append(message)

  @property
  def started(self):
    return [each for each in self.posted if isinstance(each, messages.Dispatch)]


def test_an_evaluation_goes_on_with_another_worker(tmp_path):
  async def main():
    world = World(tmp_path, steps=2)
    machine = world.orchestrator(num_workers=2, evaluation_tasks=8)
    whole = link.InProcessLink(machine, world.make_worker("worker_0"))
    doomed = Double(machine, "worker_1")

    async def lose_it():
      while not doomed.started:  # noqa: ASYNC110 - until it has its part of the evaluation
        await asyncio.sleep(0.001)
      assert all(each.purpose == "eval" for each in doomed.started)
      machine.disconnected("worker_1")

    await asyncio.gather(machine.run(), world.trainer(), lose_it())
    await whole.close()
    return world

  world = clock.run(main(), horizon=60.0)
  assert {version: row["tasks"] for version, row in world.evaluations.items()} == {0: 8, 2: 8}


def test_what_a_lost_worker_held_is_made_again_before_its_group_is_trained(tmp_path):
  async def main():
    world = World(tmp_path, steps=3, delay=lambda dispatch: 0.01 * (1 + dispatch.sample))
    machine = world.orchestrator(num_workers=2)
    whole = link.InProcessLink(machine, world.make_worker("worker_0"))
    doomed = link.InProcessLink(machine, world.make_worker("worker_1"))

    async def lose_it():
      while not doomed._worker._finished:  # noqa: ASYNC110 - until it holds something
        await asyncio.sleep(0.001)
      machine.disconnected("worker_1")
      await doomed.close()

    await asyncio.gather(machine.run(), world.trainer(), lose_it())
    await asyncio.sleep(0.1)
    assert not whole._worker._finished  # what is batched or let go of is not kept
    await whole.close()
    return world

  world = clock.run(main(), horizon=60.0)
  last = world.rows[3]
  assert last["errored"] == 0
  ended = sum(last[key] for key in ("trained", "filtered", "stale", "cancelled", "errored"))
  assert last["dispatched"] == ended + last["in_flight"]
  for step in (1, 2, 3):
    manifest = rollout_log.read_manifest(world.log_dir, step)
    assert [shard.file.rpartition("_")[0] for shard in manifest.shards] == ["worker_0"]
    assert len(all_records(world.log_dir, manifest)) == manifest.num_rollouts


def test_a_rollout_that_ends_its_workers_is_an_error_in_the_end(tmp_path):
  async def main():
    world = World(tmp_path, steps=2, prompts_per_step=1, max_rollouts_in_flight=3)
    machine = world.orchestrator(lives=2)
    first = Double(machine, "worker_0")
    run = asyncio.ensure_future(machine.run())
    world.versions.put_nowait(0)
    killed, attempts = [], []
    for _ in range(orchestrator.MOST_WORKERS):
      await asyncio.sleep(0.1)
      killed.append([each.rollout_id for each in first.started])
      attempts += [each.attempt for each in first.started]
      machine.disconnected("worker_0")
      first = Double(machine, "worker_0")
    await asyncio.sleep(0.1)
    counts = machine._scheduler.accounting.counts()
    reasons = machine._scheduler.accounting.reasons()
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    return killed, attempts, [each.rollout_id for each in first.started], counts, reasons

  killed, attempts, after, counts, reasons = clock.run(main(), horizon=60.0)
  assert killed == [[0, 1, 2]] * 4 and after == [3, 4, 5]
  later = attempts[3:]  # each greater than all of this life and of the two before it
  assert attempts[:3] == [0, 0, 0] and sorted(set(later)) == later and later[0] > 2 << 32
  assert counts["errored"] == 3 and counts["in_flight"] == 3
  assert reasons == {"errored/worker lost": 3}


def test_a_shard_of_a_lost_worker_is_not_committed_though_it_was_whole(tmp_path):
  """Its rollouts are made again elsewhere: one batch must not hold them, and another one too."""

  async def main():
    world = World(tmp_path, steps=2, prompts_per_step=2)
    machine = world.orchestrator(num_workers=2)
    whole = link.InProcessLink(machine, world.make_worker("worker_0"))
    doomed = link.InProcessLink(machine, world.make_worker("worker_1"))
    slow = whole._worker._write_shard
    written = asyncio.Event()

    async def write(path, records):
      await written.wait()
      return await slow(path, records)

    whole._worker._write_shard = write

    async def lose_it():
      while not (machine._written and machine._written["worker_1"].done()):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
      machine.disconnected("worker_1")
      await doomed.close()
      written.set()

    await asyncio.gather(machine.run(), world.trainer(), lose_it())
    await whole.close()
    return world

  world = clock.run(main(), horizon=60.0)
  trained = []
  for step in (1, 2):
    manifest = rollout_log.read_manifest(world.log_dir, step)
    assert [shard.file.rpartition("_")[0] for shard in manifest.shards] == ["worker_0"]
    trained += [record.rollout_id for record in all_records(world.log_dir, manifest)]
  assert len(trained) == len(set(trained))
