"""A simulated trainer: takes each step's batch when it is committed, and publishes weights.

As in `rl.train_loop`: wait, read, step, bring the weights to the host; they are written beside the
next step, one version at a time, and then they are out.
"""

import asyncio
from collections.abc import Callable

from intellect3 import types
from intellect3.simulation import scenario, watching


class Trainer:
  """The trainer and the directory of its weights. Belongs to one event loop.

  Args:
    settings: its speed.
    served: from the newest published version to the one that servers are to have.
    watch: is told what happens.
  """

  def __init__(
    self, settings: scenario.Trainer, served: Callable[[int], int], watch: watching.Watch
  ) -> None:
    self._settings = settings
    self._served = served
    self._watch = watch
    self._batches: asyncio.Queue[types.Manifest] = asyncio.Queue()
    self._manifests: dict[int, types.Manifest] = {}
    self._newest = 0
    self._published = asyncio.Event()
    self._writing: asyncio.Task[None] | None = None

  async def commit(self, manifest: types.Manifest) -> None:
    """Keeps a manifest, as its rename would."""
    self._manifests[manifest.step] = manifest

  def batch_committed(self, step: int) -> None:
    """A step's batch is there."""
    self._batches.put_nowait(self._manifests.pop(step))

  async def next_version(self, version: int) -> int:
    """Waits until servers are to have more than `version`; returns what."""
    while self._served(self._newest) <= version:
      self._published.clear()
      await self._published.wait()
    return self._served(self._newest)

  async def run(self, steps: int) -> None:
    """Trains all steps."""
    clock = asyncio.get_running_loop().time
    settings = self._settings
    ended = clock()
    for step in range(1, steps + 1):
      manifest = await self._batches.get()
      if manifest.step != step:
        raise ValueError(f"manifest.step: expected {step}, got {manifest.step}")
      arrived = clock()
      await asyncio.sleep(settings.read_seconds)
      begun = clock()
      tokens = sum(sum(shard.lengths) for shard in manifest.shards)
      await asyncio.sleep(settings.step_seconds(tokens))
      stepped = clock()
      if self._writing is not None:
        await self._writing
      await asyncio.sleep(settings.gather_seconds)
      self._writing = asyncio.ensure_future(self._write(step))
      spans = {"arrived": arrived, "begun": begun, "stepped": stepped, "ended": clock()}
      self._watch.stepped(step, tokens, ended, spans)
      ended = clock()
    assert self._writing is not None
    await self._writing

  async def _write(self, version: int) -> None:
    await asyncio.sleep(self._settings.write_seconds)
    self._newest = version
    self._watch.event("published", version=version)
    self._published.set()
