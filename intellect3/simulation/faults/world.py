"""The parts of a simulated run that are no server: environment, disk, reporter, trainer."""

import asyncio
import errno
import os
import pathlib
import random
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from intellect3 import rollout_log, types
from intellect3.environments import base
from intellect3.rl import outside
from intellect3.simulation.faults import contracts, truth
from intellect3.simulation.faults.schedule import World
from intellect3.weights import manifest as manifests

NUM_TASKS = 40
KEEP_WEIGHTS = 4


@dataclass(frozen=True)
class Chat:
  """An environment of one or two turns with a tool between them, which fails at times.

  Attributes:
    failing: share of attempts that raise.
    attempted: is told of each score, under the rollout's name.
    name: in the run's mix.
  """

  failing: float
  attempted: Callable[[int, float], None]
  name: str = "chat"

  def size(self, split: str) -> int:
    """See Environment."""
    del split
    return NUM_TASKS

  def task(self, split: str, index: int) -> types.Task:
    """See Environment."""
    return types.Task(
      task_id=f"{self.name}/{split}/{index}",
      environment=self.name,
      prompt=[{"role": "user", "content": f"{'short' if index % 6 else 'long'} {index}"}],
    )

  async def run(self, task: types.Task, conversation: base.Conversation) -> base.Score:
    """See Environment."""
    key = contracts.rollout_key(conversation.random)
    fails = conversation.random.random() < self.failing
    reply = await conversation.send(task.prompt)
    if key % 2:

      async def tool() -> str:
        await asyncio.sleep(0.1 + conversation.random.random())
        if fails:
          raise RuntimeError("the tool broke")
        return "ok"

      result = await conversation.effect("tool", tool)
      reply = await conversation.send([{"role": "tool", "content": result}])
    elif fails:
      raise ValueError("the verifier broke")
    reward = contracts.REWARDS[zlib.crc32(reply.content.encode()) % len(contracts.REWARDS)]
    self.attempted(key, reward)
    return base.Score(reward=reward)


class Disk:
  """The disk that a run's processes share: the real functions, behind what disks do."""

  def __init__(self, root: pathlib.Path, rng: random.Random, note: Callable[[str, str], None]):
    """Args: root: a directory. rng: of durations. note: tells the trace."""
    self.root = root
    self._rng = rng
    self._note = note
    self.full = False
    self.slow = 1.0
    self.cut_next_shard = False
    self.cut_next_weights = False

  async def pause(self) -> None:
    """What a write takes."""
    await asyncio.sleep(0.02 * self.slow * (0.5 + self._rng.random()))

  def check_room(self) -> None:
    """Raises OSError while it is full."""
    if self.full:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  async def write_shard(
    self, path: pathlib.Path, records: Iterable[types.TrajectoryRecord]
  ) -> types.ShardEntry:
    """Writes a shard; a full disk holds half of it."""
    await self.pause()
    entry = rollout_log.write_shard(path, records)
    if self.full:
      self._halve(path)
    self.check_room()
    await self.pause()
    return entry

  def cut_shard(self, manifest: types.Manifest) -> None:
    """Loses the end of a batch's file, if that is due."""
    if self.cut_next_shard:
      self.cut_next_shard = False
      directory = rollout_log.step_directory(self.root / "rollouts", manifest.step)
      self._halve(directory / manifest.shards[0].file)

  def cut_weights(self, version: int) -> None:
    """Loses the end of published weights, if that is due."""
    if self.cut_next_weights:
      self.cut_next_weights = False
      directory = manifests.version_directory(self.root / "weights", version)
      self._halve(directory / "model.safetensors")

  def _halve(self, path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    self._note("disk", f"{path.name} is half there")


class Log:
  """Implements `rl.outside.Log` for one life of the orchestrator."""

  def __init__(
    self,
    disk: Disk,
    ledger: contracts.Ledger,
    point: Callable[[str], bool],
  ) -> None:
    """Args: disk: see there. ledger: is told of commits. point: passes a place where the life may
    end; whether it still goes on."""
    self._disk = disk
    self._ledger = ledger
    self._point = point
    self._real = outside.LogOnDisk(disk.root / "rollouts")

  def left(self) -> outside.Left:
    """See Log."""
    return self._real.left()

  async def commit(self, manifest: types.Manifest) -> None:
    """See Log."""
    if not self._point("log.commit.before"):
      return
    await self._disk.pause()
    self._disk.check_room()
    if not self._point("log.commit"):
      return
    self._ledger.commits(manifest)
    await self._real.commit(manifest)
    self._disk.cut_shard(manifest)
    self._point("log.commit.after")

  def is_committed(self, step: int) -> bool:
    """See Log."""
    return self._real.is_committed(step)

  def dispatched(self, total: int) -> None:
    """See Log."""
    if self._point("log.dispatched"):
      self._disk.check_room()
      self._real.dispatched(total)


class Weights(outside.WeightsOnDisk):
  """Implements `rl.outside.Weights`; reading takes a while."""

  def __init__(self, disk: Disk, point: Callable[[str], bool]) -> None:
    """Args: see Log."""
    super().__init__(disk.root / "weights")
    self._disk = disk
    self._point = point

  async def verify(self, version: int) -> list[str]:
    """See Weights."""
    await self._disk.pause()
    wrong = manifests.verify(self.directory(version))
    self._point("weights.verified")
    return wrong


class Reporter:
  """Implements `rl.outside.Reporter`: into the trace."""

  def __init__(self, note: Callable[[str, str], None]) -> None:
    """Args: note: tells the trace."""
    self._note = note

  def step(self, step: int, row: Mapping[str, float]) -> None:
    """See Reporter."""
    counts = " ".join(f"{key}={row[key]:g}" for key in ("dispatched", "trained", "in_flight"))
    self._note("orchestrator", f"step {step} {counts}")

  def evaluation(self, version: int, row: Mapping[str, float]) -> None:
    """See Reporter."""
    self._note("orchestrator", f"evaluation v{version} of {len(row)} metrics")

  def status(self, phase: str, detail: Mapping[str, Any]) -> None:
    """See Reporter."""
    self._note("orchestrator", f"{phase} {dict(detail)}")

  def truncate_after(self, step: int) -> None:
    """See Reporter."""

  def close(self) -> None:
    """See Reporter."""


class Trainer:
  """Reads batches as the trainer does, publishes versions, keeps checkpoints."""

  def __init__(
    self,
    world: World,
    disk: Disk,
    ledger: contracts.Ledger,
    *,
    tell: Callable[[int], None],
    note: Callable[[str, str], None],
  ) -> None:
    """Args: world: see there. disk: see there. ledger: judges batches. tell: of a published
    version. note: tells the trace."""
    self._world, self._disk, self._ledger = world, disk, ledger
    self._tell, self._note = tell, note
    self._batch = asyncio.Event()
    self._stalled_until = 0.0
    self._checkpoint = 0
    self.steps_read: set[int] = set()

  def stall(self, seconds: float) -> None:
    """It does nothing more for a while."""
    self._stalled_until = asyncio.get_running_loop().time() + seconds

  def batch_committed(self, step: int) -> None:
    """It is told of a batch."""
    del step
    self._batch.set()

  async def run(self) -> None:
    """Trains from the last checkpoint on; raises ValueError for a batch that is damaged."""
    if self._checkpoint == 0:
      self._publish(0)
    for step in range(self._checkpoint + 1, self._world.steps + 1):
      manifest = await self._wait_for(step)
      count = sum(len(entry.lengths) for entry in manifest.shards)
      records = rollout_log.read_records(self._disk.root / "rollouts", manifest, range(count))
      self._ledger.read(manifest, list(records.values()))
      self.steps_read.add(step)
      self._note("trainer", f"reads step {step}: {count} records")
      await asyncio.sleep(self._world.train_seconds)
      await asyncio.sleep(max(0.0, self._stalled_until - asyncio.get_running_loop().time()))
      self._publish(step)
      if step % self._world.checkpoint_every == 0 or step == self._world.steps:
        self._checkpoint = step

  def _publish(self, version: int) -> None:
    weights_dir = self._disk.root / "weights"
    newest = manifests.latest(weights_dir)
    if newest is not None and version <= newest:
      return
    keep = max(KEEP_WEIGHTS, self._world.max_off_policy_steps + 2)
    truth.publish(weights_dir, version, keep)
    self._ledger.published(version)
    self._note("trainer", f"publishes v{version}")
    self._disk.cut_weights(version)
    self._tell(version)

  async def _wait_for(self, step: int) -> types.Manifest:
    while True:
      manifest = rollout_log.read_manifest(self._disk.root / "rollouts", step)
      if manifest is not None:
        return manifest
      self._batch.clear()
      try:
        async with asyncio.timeout(2.0):
          await self._batch.wait()
      except TimeoutError:
        pass
