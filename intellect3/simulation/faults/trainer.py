"""The simulated trainer: reads batches as the real one does, publishes, keeps checkpoints."""

import asyncio
from collections.abc import Callable

from intellect3 import rollout_log, types
from intellect3.simulation.faults import contracts, truth
from intellect3.simulation.faults.schedule import World
from intellect3.simulation.faults.world import Disk
from intellect3.weights import manifest as manifests

KEEP_WEIGHTS = 4


class Trainer:
  """See the module's docstring. What it computed since its last checkpoint it computes again."""

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
    self._checkpoints = [0]
    self.steps_read: set[int] = set()

  def stall(self, seconds: float) -> None:
    """It does nothing more for a while."""
    self._stalled_until = asyncio.get_running_loop().time() + seconds

  def batch_committed(self, step: int) -> None:
    """It is told of a batch."""
    del step
    self._batch.set()

  def lose_checkpoint(self) -> bool:
    """Its last checkpoint cannot be read; returns whether there was one."""
    if len(self._checkpoints) < 2:
      return False
    self._checkpoints.pop()
    return True

  async def run(self) -> None:
    """Trains from the last checkpoint on; raises ValueError for a batch that is damaged, and
    OSError where the disk is full."""
    last = self._checkpoints[-1]
    self._publish(last)
    for step in range(last + 1, self._world.steps + 1):
      manifest = await self._wait_for(step)
      count = sum(len(entry.lengths) for entry in manifest.shards)
      try:
        records = rollout_log.read_records(self._disk.root / "rollouts", manifest, range(count))
      except ValueError:
        self._ledger.felt.add("shard_cut")
        raise
      self._ledger.read(manifest, list(records.values()))
      if step in self.steps_read:
        self._ledger.felt.add("steps trained again from an older checkpoint")
      self.steps_read.add(step)
      self._note("trainer", f"reads step {step}: {count} records")
      await asyncio.sleep(self._world.train_seconds)
      await self._stand_still()
      self._publish(step)
      if step % self._world.checkpoint_every == 0 or step == self._world.steps:
        self._checkpoints.append(step)

  async def _stand_still(self) -> None:
    seconds = self._stalled_until - asyncio.get_running_loop().time()
    if seconds > 0:
      self._ledger.felt.add("trainer_stalled")
      await asyncio.sleep(seconds)

  def _publish(self, version: int) -> None:
    weights_dir = self._disk.root / "weights"
    newest = manifests.latest(weights_dir)
    if newest is not None and version <= newest:
      return
    self._disk.check_room()
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
