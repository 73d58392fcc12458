"""The servers of a run while it goes: who is there, who has which weights, who may be used.

Place in the ring: the orchestrator's book of servers, over `control`. Each server is

    joining -> serving -> lost -> serving ..       or fenced, until it leaves the list

A server joins by being in the list of the wanted ones, which may change at any time. It is brought
to the current version and has to pass the canary before anybody is told to use it. One that gives
no answer, or serves weights it was not brought (it was restarted), is lost: it is looked at again,
less and less often, and comes back the way it joined. One whose answers are wrong is fenced: nobody
asks it again unless it leaves the list and comes back.

Nothing here probes `/health`: of a paused server that makes a broken one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from intellect3.inference.control import ServerControl
from intellect3.inference.load import ServerLoad, counted
from intellect3.inference.weight_sync import ServerSync

logger = logging.getLogger(__name__)

_AWAY = ("joining", "lost")

Bring = Callable[[str, int, Callable[[ServerSync], None]], Awaitable[ServerSync]]
"""Brings a version to the server of a url and checks it; tells of a failed load before the server
generates again."""


class Watcher(Protocol):
  """Who is told what happens to the servers."""

  def servers(self, versions: Mapping[str, int]) -> None:
    """These may be used from now on, and have these versions."""

  def loads(self, loads: Mapping[str, tuple[int, int]]) -> None:
    """What servers have: (running, waiting)."""

  def failed(self, url: str, version: int, reason: str, *, for_good: bool) -> None:
    """What this server made with this version or newer was never checked; use it no more."""


@dataclass(frozen=True, kw_only=True)
class Settings:
  """How patient a fleet is.

  Attributes:
    poll_seconds: between two looks at the servers and at the list.
    lost_after: looks in a row without an answer after which a server is lost.
    probe_max_seconds: between two looks at a lost server at most; it begins at `poll_seconds` and
      doubles.
    patience_seconds: how long after its start a sync waits for the others at least, once one server
      has the new weights; three times as long as that one took, where that is more.
  """

  poll_seconds: float = 2.0
  lost_after: int = 3
  probe_max_seconds: float = 60.0
  patience_seconds: float = 30.0

  def __post_init__(self) -> None:
    for name in ("poll_seconds", "lost_after", "probe_max_seconds", "patience_seconds"):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")


@dataclass(eq=False)
class _Member:
  url: str
  lock: asyncio.Lock  # of the url: one that left and came back may still be in a load
  state: str = "joining"
  version: int | None = None
  reason: str = ""
  misses: int = 0
  backoff: float = 0.0
  due: float = 0.0
  counters: Mapping[str, int] | None = None
  task: asyncio.Task | None = None


class Fleet:
  """See the module's docstring. Belongs to one event loop."""

  def __init__(
    self,
    control: ServerControl,
    *,
    bring: Bring,
    wanted: Callable[[], Sequence[str]],
    watcher: Watcher,
    settings: Settings,
  ):
    """Makes a fleet; nothing is sent before `sync` or `watch`.

    Args:
      control: carries the calls.
      bring: see `Bring`.
      wanted: the list of servers as of now.
      watcher: is told of changes.
      settings: how patient to be.
    """
    self._control = control
    self._bring = bring
    self._wanted = wanted
    self._watcher = watcher
    self._settings = settings
    self._version: int | None = None
    self._members: dict[str, _Member] = {}
    self._locks: dict[str, asyncio.Lock] = {}
    self._told: Mapping[str, int] | None = None
    self._newest = 0  # version that was ever told
    self._tasks: dict[asyncio.Task, None] = {}  # in order, as a set is not
    self._counted: dict[str, int] = {}
    self._reconcile()

  @property
  def states(self) -> dict[str, str]:
    """Each server's state, with the reason where it is lost or fenced."""
    return {
      url: f"{member.state}: {member.reason}" if member.reason else member.state
      for url, member in self._members.items()
    }

  def take_counted(self) -> dict[str, int]:
    """What the servers that tell counters have counted since the last call."""
    counted_now, self._counted = self._counted, {}
    return counted_now

  async def sync(self, version: int) -> list[ServerSync]:
    """Brings a version to every server, each as soon as it can, and tells of each at once.

    Returns when every server is done, or when those that are not have taken too long after the
    first (`Settings.patience_seconds`); these are lost for now.

    Args:
      version: becomes the current one, which servers that join are brought.

    Returns:
      How it went with each server that was not lost or fenced before.
    """
    clock = asyncio.get_running_loop().time
    started = clock()
    self._version = version
    tasks = {
      self._spawn(self._take(member)): member
      for member in self._members.values()
      if member.state in ("joining", "serving")
    }
    results: list[ServerSync] = []
    pending = list(tasks)
    deadline: float | None = None
    while pending:
      limit = None if deadline is None else max(0.0, deadline - clock())
      finished, _ = await asyncio.wait(pending, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
      done = [task for task in pending if task in finished]
      pending = [task for task in pending if task not in finished]
      results += [task.result() for task in done]
      if deadline is None and any(result.ok for result in results):
        deadline = started + max(self._settings.patience_seconds, 3.0 * (clock() - started))
      if not done and deadline is not None:
        for task in pending:
          results.append(self._give_up(tasks[task], version, clock() - started))
          task.cancel()
        break
    self._tell()  # also that there is none
    return results

  def refuse(self, version: int, reason: str) -> list[ServerSync]:
    """Fences every server, lost ones too: this version must reach none, and the run has left theirs
    behind.

    Returns:
      One entry for each that was not fenced before.
    """
    results = []
    for member in self._members.values():
      if member.task is not None:  # it would come back with what the run has left behind
        member.task.cancel()
      if member.state != "fenced":
        why = f"{member.url}: weights v{version}: {reason}"
        self._fail(member, version, why, for_good=True)
        results.append(ServerSync(member.url, why, 0.0, {}))
    self._tell()
    return results

  async def watch(self) -> None:
    """Looks at the list and at the servers for ever; cancel it to end."""
    while True:
      await asyncio.sleep(self._settings.poll_seconds)
      self._reconcile()
      if self._version is None:
        continue
      now = asyncio.get_running_loop().time()
      for member in self._members.values():
        away = member.state in _AWAY and not member.lock.locked()
        if away and member.task is None and now >= member.due:
          member.task = self._spawn(self._return(member))
      await self._look_at_serving()

  async def close(self) -> None:
    """Ends what is on its way."""
    for task in list(self._tasks):
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)

  # One server.

  async def _take(self, member: _Member) -> ServerSync:
    """Brings the current version to one server and notes what came of it."""
    async with member.lock:
      assert self._version is not None
      version = self._version
      if member.state == "serving" and member.version == version:
        return ServerSync(member.url, None, 0.0, {})  # it came back a moment ago
      told: list[ServerSync] = []

      def unusable(result: ServerSync) -> None:
        told.append(result)
        self._note_failure(member, version, result)

      result = await self._bring(member.url, version, unusable)
    present = self._members.get(member.url)
    if present is None:
      return result  # it left meanwhile
    if result.reason is None:
      member = present  # perhaps it left and came back
      member.state, member.version, member.reason = "serving", version, ""
      member.misses, member.backoff = 0, 0.0
      self._tell()
    elif not told:
      self._note_failure(member, version, result)
    return result

  async def _return(self, member: _Member) -> None:
    """Tries to bring back a server that joins or was lost; notes when to try again."""
    try:
      async with member.lock:
        looked = await self._control.look(member.url)
        if looked.ok or looked.answered:
          self._control.admit(member.url)
      if not (looked.ok or looked.answered):
        member.reason = looked.error or ""
        self._postpone(member)
        return
      while self._members.get(member.url) is member and (
        member.state in _AWAY or (member.state == "serving" and member.version != self._version)
      ):
        if not (await self._take(member)).ok:
          return
      logger.info("server %s is there, with weights v%s", member.url, member.version)
    finally:
      member.task = None

  def _note_failure(self, member: _Member, version: int, result: ServerSync) -> None:
    if self._members.get(member.url) is member:
      assert result.reason is not None
      self._fail(member, version, result.reason, for_good=result.answered)
      self._tell()

  def _fail(self, member: _Member, version: int, reason: str, *, for_good: bool) -> None:
    member.state = "fenced" if for_good else "lost"
    member.version, member.reason = None, reason
    self._postpone(member)
    logger.error("server %s is %s: %s", member.url, member.state, reason)
    self._watcher.failed(member.url, version, reason, for_good=for_good)

  def _lose(self, member: _Member, reason: str) -> None:
    """A server that served checked weights gives no answer: what it made is sound."""
    logger.warning("server %s is lost: %s", member.url, reason)
    member.state, member.version, member.reason = "lost", None, reason
    self._postpone(member)
    self._tell()

  def _give_up(self, member: _Member, version: int, seconds: float) -> ServerSync:
    reason = f"{member.url}: weights v{version}: not done after {seconds:.0f} s, long after others"
    self._fail(member, version, reason, for_good=False)
    self._tell()
    return ServerSync(member.url, reason, seconds, {}, answered=False)

  def _postpone(self, member: _Member) -> None:
    least, most = self._settings.poll_seconds, self._settings.probe_max_seconds
    member.backoff = min(most, member.backoff * 2.0) if member.backoff else least
    member.due = asyncio.get_running_loop().time() + member.backoff

  # All of them.

  def _reconcile(self) -> None:
    """Takes in who joined the list and lets go who left it."""
    wanted = list(dict.fromkeys(self._wanted()))
    for url in wanted:
      if url not in self._members:
        self._members[url] = _Member(url, self._locks.setdefault(url, asyncio.Lock()))
    gone = [url for url in self._members if url not in wanted]
    for url in gone:
      del self._members[url]
      logger.info("server %s has left", url)
    if gone:
      self._tell()

  async def _look_at_serving(self) -> None:
    # One that is being synced is paused at times and is left alone.
    members = [
      member
      for member in self._members.values()
      if member.state == "serving" and not member.lock.locked()
    ]
    asked = [member.version for member in members]
    outcomes = await asyncio.gather(*(self._control.look(member.url) for member in members))
    loads: dict[str, tuple[int, int]] = {}
    for member, before, outcome in zip(members, asked, outcomes, strict=True):
      # What it said before it was synced says nothing of it now.
      if member.state != "serving" or member.lock.locked() or member.version != before:
        continue
      if outcome.value is None:
        # An answer that tells nothing is a sign of life, and no reason to prefer or avoid it.
        member.misses = 0 if outcome.answered else member.misses + 1
        if member.misses >= self._settings.lost_after:
          self._lose(member, outcome.error or "")
        continue
      member.misses = 0
      version, load = outcome.value
      if version != member.version:
        has = "weights of no version" if version is None else f"v{version}"
        self._lose(member, f"serves {has}, was brought v{member.version}: restarted?")
        continue
      loads[member.url] = (load.running, load.waiting)
      self._count(member, load)
    if len(loads) > 1:
      self._watcher.loads(loads)

  def _count(self, member: _Member, load: ServerLoad) -> None:
    if member.counters is not None:
      for name, count in counted(member.counters, load.counters).items():
        self._counted[name] = self._counted.get(name, 0) + count
    member.counters = load.counters

  def _tell(self) -> None:
    """Tells who may be used: those that serve the newest version that any has had.

    Versions never go back: where all that have the newest are lost, whoever asks waits for one.
    """
    serving = {
      member.url: member.version
      for member in self._members.values()
      if member.state == "serving" and member.version is not None
    }
    self._newest = max(self._newest, *serving.values(), 0)
    versions = {url: version for url, version in serving.items() if version == self._newest}
    if versions != self._told:
      self._told = versions
      self._watcher.servers(versions)

  def _forget(self, task: asyncio.Task) -> None:
    self._tasks.pop(task, None)

  def _spawn(self, work: Awaitable) -> asyncio.Task:
    task = asyncio.ensure_future(work)
    self._tasks[task] = None
    task.add_done_callback(self._forget)
    return task
