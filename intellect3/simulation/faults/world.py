"""What a simulated run has beside servers and trainer: environment, disk, reporter."""

import asyncio
import errno
import functools
import os
import pathlib
import random
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from intellect3 import rollout_log, types
from intellect3.environments import base
from intellect3.rl import outside
from intellect3.simulation.faults import contracts
from intellect3.weights import manifest as manifests

HALF_A_FILE = "half a batch file that is not committed"
HALF_A_JOURNAL = "half a record of a journal"


@dataclass(frozen=True)
class Chat:
  """An environment of some turns with a tool between them, which fails at times.

  Attributes:
    failing: share of attempts that raise.
    turns: at most so many; a rollout of three or more begins a new branch at its third.
    tasks: of each split.
    attempted: is told of each score, under the rollout's name.
    acted: is told that a tool is called, with its number.
    went_on: is told that the rollout has the tool's result.
    felt: is told that an attempt failed, and of turns.
    name: in the run's mix.
  """

  failing: float
  turns: int
  tasks: int
  attempted: Callable[[int, float], None]
  acted: Callable[[int, int], None]
  went_on: Callable[[int, int], None]
  felt: Callable[[str], None]
  name: str = "chat"

  def size(self, split: str) -> int:
    """See Environment."""
    del split
    return self.tasks

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
    rounds = key % self.turns
    if fails and not rounds:
      raise ValueError("the verifier broke")

    async def tool(number: int, seconds: float) -> str:
      self.acted(key, number)
      await asyncio.sleep(seconds)
      if fails:
        raise RuntimeError("the tool broke")
      return "ok"

    for number in range(rounds):
      seconds = 0.1 + conversation.random.random()
      result = await conversation.effect("tool", functools.partial(tool, number, seconds))
      self.went_on(key, number)
      message = {"role": "tool", "content": result}
      # Other tools: what was said so far begins a branch of its own.
      reply = await conversation.send([message], tools=() if number else None)
      self.felt("rollouts of several turns")
      if number:
        self.felt("rollouts of several branches")
    reward = contracts.REWARDS[zlib.crc32(reply.content.encode()) % len(contracts.REWARDS)]
    self.attempted(key, reward)
    return base.Score(reward=reward)


@dataclass(frozen=True)
class Writer:
  """A process that writes: whether it lives, and what ends it."""

  lives: Callable[[], bool]
  die: Callable[[], None]


class Disk:
  """The disk that a run's processes share: the real functions, behind what disks do."""

  def __init__(
    self,
    root: pathlib.Path,
    rng: random.Random,
    note: Callable[[str, str], None],
    felt: Callable[[str], None],
  ) -> None:
    """Args: root: a directory. rng: of durations. note: tells the trace. felt: is told of each
    fault that somebody felt."""
    self.root = root
    self._rng = rng
    self._note, self._felt = note, felt
    self.full = False
    self.slow = 1.0
    self.kill_writer = ""
    """Who next writes so (`shard`, `journal`) ends in the middle of it."""
    self.cut_next_shard = False
    self.cut_next_weights = False

  async def pause(self) -> None:
    """What a write takes."""
    if self.slow > 1.0:
      self._felt("disk_slow")
    await asyncio.sleep(0.02 * self.slow * (0.5 + self._rng.random()))

  def check_room(self) -> None:
    """Raises OSError while it is full."""
    if self.full:
      self._felt("disk_full")
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  async def write_shard(
    self, path: pathlib.Path, records: Iterable[types.TrajectoryRecord], writer: Writer
  ) -> types.ShardEntry:
    """Writes a shard: half of it, then the rest, unless the disk is full or its writer ends."""
    await self.pause()
    entry = rollout_log.write_shard(path, records)
    whole = self._halve(path)
    written = False
    try:
      self._kill(writer, "shard")
      await self.pause()
      self.check_room()
      written = writer.lives()
    finally:
      if written:
        self._write(path, whole)
      else:
        self._note("disk", f"{path.name} is half there")
        self._felt(HALF_A_FILE)
    return entry

  def beside(self, writer: Writer) -> Callable[..., Awaitable[Any]]:
    """What a worker's journal does its work with; of one that ends it does half, or nothing."""

    async def act(function: Callable[..., Any], path: pathlib.Path, *data: bytes) -> Any:
      await self.pause()
      if not writer.lives():
        await asyncio.Event().wait()
      if not data:
        return function(path)
      self.check_room()
      before = self._size(path)
      function(path, *data)
      self._felt("journals written")
      appended = before > 0 and self._size(path) == before + len(data[0])
      written = False
      try:
        if appended:
          self._kill(writer, "journal")
        await self.pause()
        written = writer.lives()
      finally:
        if not written and appended:
          os.truncate(path, before + len(data[0]) // 2)
          self._note("disk", f"{path.name} has half a record")
          self._felt(HALF_A_JOURNAL)
      if not written:
        await asyncio.Event().wait()

    return act

  def _kill(self, writer: Writer, what: str) -> None:
    if self.kill_writer == what:
      self.kill_writer = ""
      self._felt("writer_killed")
      writer.die()

  def cut_shard(self, manifest: types.Manifest) -> None:
    """Loses the end of a batch's file, if that is due."""
    if self.cut_next_shard:
      self.cut_next_shard = False
      directory = rollout_log.step_directory(self.root / "rollouts", manifest.step)
      self._halve(directory / manifest.shards[0].file)
      self._note("disk", f"{manifest.shards[0].file} is half there")

  def cut_weights(self, version: int) -> None:
    """Loses the end of published weights, if that is due."""
    if self.cut_next_weights:
      self.cut_next_weights = False
      self._felt("weights_cut")
      directory = manifests.version_directory(self.root / "weights", version)
      self._halve(directory / "model.safetensors")
      self._note("disk", f"v{version} is half there")

  @staticmethod
  def _write(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)

  @staticmethod
  def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0

  @staticmethod
  def _halve(path: pathlib.Path) -> bytes:
    """Leaves the first half of a file; returns all that it was."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return content


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
    self._real = outside.LogOnDisk(disk.root / "rollouts", disk.root / "journal")

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

  def distrusted(self, url: str, version: int) -> None:
    """See Log."""
    if self._point("log.distrusted"):
      self._disk.check_room()
      self._real.distrusted(url, version)

  def complete(self) -> None:
    """See Log."""
    if self._point("log.complete"):
      self._real.complete()


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
