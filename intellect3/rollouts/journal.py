"""The journal: what an unfinished rollout has, kept so that another process can go on with it.

Place in the ring: beside the conversation (contract 7). After a crash a rollout's coroutine is run
again from its start; turns, effects and times that the journal holds are given to it as they were,
and a turn that was cut off goes on from the tokens it has.

    RUN/journal/rollout_000000123/0      a file an attempt, removed once it is trained or let go

A file is begun only when a rollout has had something for `seconds`, so a rollout that is over by
then costs nothing, and a crash costs at most so much time, or a segment. An effect is on disk
before its rollout goes on. What is written survives a process, not a disk that loses its cache.

A file is a row of frames (length, CRC-32, record); what follows a damaged one is ignored. Who takes
a rollout over, a higher attempt, begins a file of its own with what it found: a process that was
only thought dead writes and removes nothing of those that came after it.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import shutil
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from intellect3 import types
from intellect3.rollouts import messages

logger = logging.getLogger(__name__)

Act = Callable[..., Awaitable[Any]]
"""Runs a function with its arguments, beside the event loop."""

_HEAD = struct.Struct("<II")


class JournalFailed(Exception):
  """The journal cannot be read or written: the run must end, or a crash would lose work."""


class JournalMismatch(Exception):
  """The rollout, run again, asks for something else than its journal holds."""


class _Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
  dispatch: messages.Dispatch


class _Sampled(msgspec.Struct, frozen=True, array_like=True, tag="sampled"):
  turn: int
  prompt: int  # CRC-32 of its ids
  piece: types.Generation


class _Turned(msgspec.Struct, frozen=True, array_like=True, tag="turned"):
  turn: int
  finish_reason: str
  reprefilled_tokens: int


class _Effect(msgspec.Struct, frozen=True, array_like=True, tag="effect"):
  path: str
  result: bytes


class _Now(msgspec.Struct, frozen=True, array_like=True, tag="now"):
  seconds: float


_Record = _Begun | _Sampled | _Turned | _Effect | _Now


@dataclasses.dataclass
class Recorded:
  """What a journal holds of a rollout.

  Attributes:
    prompts: turn -> CRC-32 of its prompt's ids.
    pieces: turn -> what was sampled of it.
    turned: turn -> how it ended.
    effects: call path -> its result, encoded.
    times: what `now` gave, in order.
  """

  prompts: dict[int, int] = dataclasses.field(default_factory=dict)
  pieces: dict[int, list[types.Generation]] = dataclasses.field(default_factory=dict)
  turned: dict[int, _Turned] = dataclasses.field(default_factory=dict)
  effects: dict[str, bytes] = dataclasses.field(default_factory=dict)
  times: collections.deque[float] = dataclasses.field(default_factory=collections.deque)

  def add(self, record: _Record) -> None:
    """Takes the next record."""
    match record:
      case _Sampled(turn=turn, prompt=prompt, piece=piece):
        self.prompts[turn] = prompt
        self.pieces.setdefault(turn, []).append(piece)
      case _Turned(turn=turn):
        self.turned[turn] = record
      case _Effect(path=path, result=result):
        self.effects[path] = result
      case _Now(seconds=seconds):
        self.times.append(seconds)


class Journal:
  """What a rollout had in earlier processes, and what keeps what it gets.

  This one keeps nothing; `Store` makes those that do.
  """

  def __init__(self, recorded: Recorded | None = None) -> None:
    self._recorded = recorded or Recorded()
    self._time_offset = 0.0
    if self._recorded.times:  # time goes on where it was, as if the crash had not taken any
      self._time_offset = self._recorded.times[-1] - asyncio.get_running_loop().time()

  # Turns.

  def turn(self, turn: int, prompt: Sequence[int]) -> tuple[types.Generation | None, bool]:
    """What a turn has so far, None for nothing, and whether it is whole.

    Raises JournalMismatch where its prompt was another.
    """
    recorded = self._recorded
    pieces = recorded.pieces.get(turn)
    if pieces is None:
      return None, False
    if recorded.prompts[turn] != _crc(prompt):
      raise JournalMismatch(
        f"turn {turn}: the prompt is not the one that was journaled; an environment must take the "
        "same path again, with all randomness, time and outside effects from its conversation"
      )
    end = recorded.turned.get(turn)
    if end is not None:
      return types.joined(pieces, end.finish_reason, end.reprefilled_tokens), True
    last = pieces[-1].finish_reason
    return types.joined(pieces, last, 0), last == "stop"

  def sampled(self, turn: int, prompt: Sequence[int], piece: types.Generation) -> None:
    """A piece of a turn has come."""
    self._keep(_Sampled(turn, _crc(prompt), piece))

  def turned(self, turn: int, generation: types.Generation) -> None:
    """A turn has ended."""
    self._keep(_Turned(turn, generation.finish_reason, generation.reprefilled_tokens))

  # Effects and time.

  def effect(self, path: str) -> bytes | None:
    """The encoded result of an effect, or None where it was not recorded."""
    return self._recorded.effects.get(path)

  async def keep_effect(self, path: str, result: bytes) -> None:
    """Records an effect; raises JournalFailed."""
    self._keep(_Effect(path, result))

  def now(self, clock: Callable[[], float]) -> float:
    """Seconds: those that were recorded, then the clock's, the event loop's, from there on."""
    if self._recorded.times:
      return self._recorded.times.popleft()
    seconds = clock() + self._time_offset
    self._keep(_Now(seconds))
    return seconds

  def _keep(self, record: _Record) -> None:
    pass


class _Kept(Journal):
  """A journal with a file."""

  def __init__(
    self, store: "Store", path: pathlib.Path, recorded: Recorded, records: Sequence[_Record]
  ) -> None:
    super().__init__(recorded)
    self._store = store
    self.path = path
    self._unwritten = list(records)
    self._timer: asyncio.TimerHandle | None = None
    self._writing = asyncio.Lock()
    self.exists = len(records) > 1  # some process has begun the file
    self._mine = False
    self.dropped = False

  def _keep(self, record: _Record) -> None:
    if self.dropped:
      return
    self._unwritten.append(record)
    if self._timer is None:
      loop = asyncio.get_running_loop()
      self._timer = loop.call_later(self._store.seconds, self._write_beside)

  def _write_beside(self) -> None:
    self._store.spawn(self._write())

  async def keep_effect(self, path: str, result: bytes) -> None:
    """See Journal."""
    self._keep(_Effect(path, result))
    await self._write()

  async def _write(self) -> None:
    async with self._writing:
      self.stop()
      if self.dropped or not self._unwritten:
        return
      records, self._unwritten = self._unwritten, []
      data = b"".join(_frame(types.encode(record)) for record in records)
      self.exists = True
      try:
        await self._store.act(_append if self._mine else _begin, self.path, data)
      except OSError as error:
        if self._mine and isinstance(error, FileNotFoundError):
          self.dropped = True  # a later attempt has ended the rollout, or the run is complete
          return
        self._store.failed(f"journal: {_told(self.path)}: {error}")
        raise JournalFailed(str(error)) from error
      self._mine = True

  def stop(self) -> None:
    """Writes nothing of its own accord until something comes."""
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None

  async def remove(self) -> None:
    """Removes the file of a dropped journal."""
    async with self._writing:
      try:
        await self._store.act(_remove, self.path)
      except OSError as error:
        self._store.failed(f"journal: {_told(self.path)}: {error}")


class Store:
  """The journals of one worker process. Belongs to one event loop.

  Args:
    directory: of all journals of the run.
    seconds: how long something may wait until it is written.
    failed: is told why nothing can be written.
    act: runs a function that waits for the disk, beside the event loop.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    seconds: float,
    failed: Callable[[str], None],
    act: Act = asyncio.to_thread,
  ) -> None:
    self._directory = directory
    self.seconds = seconds
    self.failed = failed
    self.act = act
    self._open: dict[int, _Kept] = {}
    self._tasks: dict[asyncio.Task[None], None] = {}

  async def open(self, dispatch: messages.Dispatch) -> Journal:
    """The journal of a rollout that begins, or goes on where another process left it.

    One that is there and cannot be read is told of: the run ends.
    """
    path = self._directory / f"rollout_{dispatch.rollout_id:09d}" / str(dispatch.attempt)
    begun = msgspec.structs.replace(dispatch, attempt=0)
    records: list[_Record] = []
    recorded = Recorded()
    if dispatch.continued:
      try:
        records = _decoded(path, await self.act(read, path))
      except OSError as error:
        self.failed(f"journal: {_told(path)}: {error}")
      if records[:1] != [_Begun(begun)]:
        records = []  # another rollout's, of a configuration before, or nobody's
      for record in records:
        recorded.add(record)
    kept = _Kept(self, path, recorded, records or [_Begun(begun)])
    self._open[dispatch.rollout_id] = kept
    return kept

  def drop(self, rollout_id: int) -> None:
    """The rollout is over: nothing of it is kept any longer."""
    kept = self._open.pop(rollout_id, None)
    if kept is not None:
      kept.dropped = True
      kept.stop()
      if kept.exists:
        self.spawn(kept.remove())

  def spawn(self, work: Any) -> None:
    """Lets a coroutine run beside; what it raises has been told already."""
    task = asyncio.ensure_future(work)
    self._tasks[task] = None
    task.add_done_callback(self._done)

  def _done(self, task: asyncio.Task[None]) -> None:
    del self._tasks[task]
    if not task.cancelled() and not isinstance(task.exception(), JournalFailed | None):
      raise task.exception()  # type: ignore[misc]

  async def close(self) -> None:
    """Leaves the files as they are, as a crash would."""
    for kept in self._open.values():
      kept.dropped = True
      kept.stop()
    for task in list(self._tasks):
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)


def read(path: pathlib.Path) -> list[bytes]:
  """The records of the last attempt at this path's rollout that has any, up to a damaged one."""
  for number in sorted(_attempts(path.parent), reverse=True):
    try:
      data = (path.parent / str(number)).read_bytes()
    except FileNotFoundError:  # removed meanwhile
      continue
    if payloads := _payloads(data):
      return payloads
  return []


def _attempts(directory: pathlib.Path) -> list[int]:
  """The numbers of a rollout's files."""
  try:
    return [int(name) for name in os.listdir(directory) if name.isdigit()]
  except FileNotFoundError:
    return []


def _payloads(data: bytes) -> list[bytes]:
  payloads: list[bytes] = []
  place = 0
  while len(data) - place >= _HEAD.size:
    length, crc = _HEAD.unpack_from(data, place)
    payload = data[place + _HEAD.size : place + _HEAD.size + length]
    if len(payload) < length or zlib.crc32(payload) != crc:
      break
    place += _HEAD.size + length
    payloads.append(payload)
  return payloads


def _decoded(path: pathlib.Path, payloads: Sequence[bytes]) -> list[_Record]:
  try:
    return [types.decode(payload, _Record) for payload in payloads]  # type: ignore[arg-type]
  except msgspec.ValidationError as error:
    logger.warning("journal %s: of another version of this program: %s", _told(path), error)
    return []


def clear(directory: pathlib.Path) -> None:
  """Removes all journals of a run that is complete."""
  shutil.rmtree(directory, ignore_errors=True)


def _told(path: pathlib.Path) -> str:
  return f"{path.parent.name}/{path.name}"


def _frame(payload: bytes) -> bytes:
  return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _begin(path: pathlib.Path, data: bytes) -> None:
  """Makes an attempt's file: whole, or not at all."""
  temporary = path.with_name(f"{path.name}.tmp")
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # the one before removed the empty directory
      temporary.write_bytes(data)
      return os.replace(temporary, path)


def _append(path: pathlib.Path, data: bytes) -> None:
  # Not created again: a later attempt may have removed it.
  with open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
    file.write(data)


def _remove(path: pathlib.Path) -> None:
  """Removes an attempt's file and those before it."""
  for number in _attempts(path.parent):
    if number <= int(path.name):
      (path.parent / str(number)).unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # a later one has its own there, or nobody had any
    path.parent.rmdir()


def _crc(ids: Sequence[int]) -> int:
  return zlib.crc32(np.asarray(ids, np.int32).tobytes())
