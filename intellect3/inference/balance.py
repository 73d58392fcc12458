"""Which server gets the next request, and who waits for one.

The rule (`choose`), among the servers that may be used and have room:

1. One that failed a moment ago is left alone while there is another. One that said it was full
   (503) has no room for a while, and then as much as it took before; each request that ends well
   there adds a little.
2. A request with a home goes there unless the home is clearly busier than the least busy one:
   load(home) > 1.25 x least load + `spill`. The home of a conversation is the server that holds its
   prefix; that of a new member of a group is drawn from the group's name (`home_of`), the same in
   every client, so that the group's prompt is prefilled once.
3. Otherwise the least busy, then the longest unused.

Load is what this client has there and what others have, by the server's own last word. Waiting is
first come, first served, and bounded: a slot that comes free goes to whoever waited longest.
"""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SPILL_FACTOR = 1.25
"""A home may be this many times as busy as the least busy server, and `spill` requests more."""

_HOMES = 1024
"""Keys whose homes a balancer remembers."""


class NoServers(Exception):
  """No server came free, or none was there at all, for as long as was allowed to wait."""


@dataclass(eq=False)
class Server:
  """A server as its clients see it.

  Attributes:
    url: its address.
    in_flight: slots taken by this client.
    others: requests of other clients there, by its last word.
    version: the weights it has, as the orchestrator told; None before it did.
    failures: failed requests since the last good one.
    blocked_until: on the event loop's clock; until then others are preferred.
    room: requests of this client that it has shown it takes; infinite before it was ever full.
    refusals: times in a row that it was full.
    full_until: on the event loop's clock; until then it has no room.
    last_used: number of the last slot given, counted over all servers.
    listed: whether new requests may go there.
    fenced: why nothing is sent to it any more, or None.
    requests: what is on its way, so that a fence can end it.
  """

  url: str
  in_flight: int = 0
  others: int = 0
  version: int | None = None
  failures: int = 0
  blocked_until: float = 0.0
  room: float = math.inf
  refusals: int = 0
  full_until: float = 0.0
  last_used: int = 0
  listed: bool = True
  fenced: str | None = None
  requests: dict[asyncio.Future, None] = field(default_factory=dict)

  @property
  def open(self) -> bool:
    """Whether requests may be sent to it."""
    return self.listed and self.fenced is None

  @property
  def load(self) -> int:
    """Requests there, running or waiting, of everybody."""
    return self.in_flight + self.others


def home_of(key: str, urls: Iterable[str]) -> str | None:
  """The server that a key belongs to; the same for everybody who sees the same servers.

  Of the keys of a server that leaves each goes to another server of its own, and one that joins
  takes its share of all (rendezvous hashing).
  """
  return max(
    urls,
    key=lambda url: hashlib.blake2b(f"{key}\0{url}".encode(), digest_size=8).digest(),
    default=None,
  )


def others_load(running: int, waiting: int, own: int) -> int:
  """What other clients have on a server that reports `running` and `waiting`, `own` being ours."""
  return max(0, running + waiting - own)


def choose(
  servers: Mapping[str, Server], *, room: int, now: float, home: str | None, spill: int
) -> Server | None:
  """The server for the next request, by the module's rule.

  Args:
    servers: all that are known, by url.
    room: requests that this client may have on one server.
    now: the event loop's time.
    home: url of the server that holds the request's prefix, or None.
    spill: how many requests the home may have more than the least busy one.

  Returns:
    A server with room, or None where there is none.
  """
  best: Server | None = None
  blocked: list[Server] = []
  least = used = 0
  for server in servers.values():  # every request of a run comes by here: the load is asked first
    load = server.in_flight + server.others
    if best is not None and (load > least or (load == least and server.last_used >= used)):
      continue
    if not _has_room(server, room, now):
      continue
    if server.blocked_until > now:
      blocked.append(server)
    else:
      best, least, used = server, load, server.last_used
  at_home = None if home is None else servers.get(home)
  if at_home is not None and not _has_room(at_home, room, now):
    at_home = None
  if best is None:
    if not blocked:
      return None
    best = min(blocked, key=lambda server: (server.load, server.last_used))
  elif at_home is not None and at_home.blocked_until > now:
    at_home = None
  if at_home is not None and at_home.load <= SPILL_FACTOR * best.load + spill:
    return at_home
  return best


def _has_room(server: Server, room: int, now: float) -> bool:
  more = server.in_flight + 1
  return server.open and server.full_until <= now and more <= room and more <= server.room


@dataclass(eq=False)
class _Turn:
  """Somebody who waits, and where it would like to go."""

  slot: "asyncio.Future[Server]"
  home: str | None


class Balancer:
  """The set of servers and the queue for their slots. Belongs to one event loop."""

  def __init__(
    self,
    urls: Sequence[str],
    max_concurrency: int,
    *,
    max_waiting: int = 10_000,
    max_wait_seconds: float = 600.0,
    spill: int = 16,
  ):
    """Makes a balancer.

    Args:
      urls: addresses.
      max_concurrency: slots of each server.
      max_waiting: how many may wait for a slot.
      max_wait_seconds: how long each may.
      spill: see `choose`.
    """
    for name, value, least in (
      ("max_concurrency", max_concurrency, 1),
      ("max_waiting", max_waiting, 0),
      ("max_wait_seconds", max_wait_seconds, 0),
      ("spill", spill, 0),
    ):
      if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    self._max_concurrency = max_concurrency
    self._max_waiting = max_waiting
    self._max_wait_seconds = max_wait_seconds
    self._spill = spill
    self._servers: dict[str, Server] = {}
    self._homes: dict[str, str | None] = {}  # of the last keys, while the set stays as it is
    self._waiting: deque[_Turn] = deque()
    self._slots_given = 0
    self._time: Callable[[], float] | None = None  # the loop's, once one runs
    self.set_servers(urls)

  @property
  def open(self) -> list[Server]:
    """Servers that may be sent requests."""
    return [server for server in self._servers.values() if server.open]

  @property
  def waiting(self) -> int:
    """How many wait for a slot."""
    return sum(not turn.slot.done() for turn in self._waiting)

  def fence_reason(self, url: str) -> str | None:
    """Why a server is fenced; None where it is not, or is not known."""
    return self._servers[url].fenced if url in self._servers else None

  def set_servers(self, urls: Iterable[str], versions: Mapping[str, int] | None = None) -> None:
    """Replaces the set. A server that left keeps what is in flight there; fences stay.

    Args:
      urls: addresses.
      versions: the weights that each has; those left out keep what was told of them. One whose
        weights are told was checked again: its fence is lifted.
    """
    wanted = dict.fromkeys(urls)
    for url in versions or {}:
      if url in self._servers and self._servers[url].fenced is not None:
        del self._servers[url]
    for url in wanted:
      self._servers.setdefault(url, Server(url))
    for url, server in list(self._servers.items()):
      server.listed = url in wanted
      server.version = (versions or {}).get(url, server.version)
      if not server.listed and server.fenced is None and server.in_flight == 0:
        del self._servers[url]
    self._homes.clear()
    self._serve_waiting()

  def set_loads(self, loads: Mapping[str, tuple[int, int]]) -> None:
    """Takes what servers say they have: (running, waiting) by url."""
    for url, (running, waiting) in loads.items():
      if url in self._servers:
        server = self._servers[url]
        server.others = others_load(running, waiting, server.in_flight)

  def fence(self, url: str, reason: str) -> None:
    """Takes a server out and cancels its requests; an unknown one is remembered as fenced."""
    server = self._servers.setdefault(url, Server(url))
    if server.fenced is None:
      server.fenced = reason
      self._homes.clear()
      for request in list(server.requests):
        request.cancel()

  def admit(self, url: str) -> None:
    """Adds a server, or lifts its fence."""
    if url not in self._servers or not self._servers[url].open:
      self._servers[url] = Server(url)
      self._homes.clear()
      self._serve_waiting()

  def refused(self, server: Server, seconds: float) -> None:
    """Notes that a server was full: no failure, but no room there for a while.

    Args:
      server: which still counts the request that it refused.
      seconds: how long, unless a request ends well there before.
    """
    loop = asyncio.get_running_loop()
    # What it holds of ours besides is what it takes; one must be able to ask again.
    server.room = max(1.0, min(server.room, server.in_flight - 1.0))
    if server.full_until <= loop.time():  # one refusal of those that come together
      server.refusals += 1
      server.full_until = loop.time() + seconds
      # A moment later, since a timer may fire a little early.
      loop.call_later(seconds + 1e-3, self._serve_waiting)

  def succeeded(self, server: Server) -> None:
    """Notes that a request ended well."""
    server.failures = server.refusals = 0
    server.blocked_until = server.full_until = 0.0
    server.room += 1.0 / server.room

  def take(self, *, prefer: str | None = None, affinity: str | None = None) -> Server | None:
    """Takes a slot if one is free now; see `acquire`."""
    home = self._home(prefer, affinity)
    return None if (server := self._choose(home)) is None else self._take(server)

  async def acquire(
    self,
    *,
    prefer: str | None = None,
    affinity: str | None = None,
    within: float | None = None,
  ) -> Server:
    """Waits for a slot and takes it; `release` gives it back.

    Args:
      prefer: url of the server that holds the request's prefix, if one does.
      affinity: name of the group whose members share a prefix; gives the home where `prefer` is
        None or its server is gone.
      within: seconds to wait at most; None for `max_wait_seconds`.

    Raises:
      NoServers: no slot came free in time, or too many wait already.
    """
    if (server := self.take(prefer=prefer, affinity=affinity)) is not None:
      return server
    if self.waiting >= self._max_waiting:
      raise NoServers(f"{self._why_none()}; {self._max_waiting} requests wait already")
    limit = self._max_wait_seconds if within is None else within
    slot = asyncio.get_running_loop().create_future()
    turn = _Turn(slot, self._home(prefer, affinity))
    self._waiting.append(turn)
    try:
      async with asyncio.timeout(limit):
        return await turn.slot
    except asyncio.CancelledError:
      self._give_up(turn)
      raise
    except TimeoutError:
      self._give_up(turn)
      raise NoServers(f"{self._why_none()} within {limit:g} s") from None

  def release(self, server: Server) -> None:
    """Gives a slot back."""
    server.in_flight -= 1
    self._serve_waiting()

  def _give_up(self, turn: _Turn) -> None:
    if turn.slot.done() and not turn.slot.cancelled():
      # Cancelled between being given the slot and waking up: the slot goes to the next.
      self.release(turn.slot.result())
    turn.slot.cancel()

  def _home(self, prefer: str | None, affinity: str | None) -> str | None:
    if prefer is not None and prefer in self._servers and self._servers[prefer].open:
      return prefer
    if affinity is None:
      return None
    if affinity not in self._homes:  # the members of a group come one after the other
      if len(self._homes) == _HOMES:
        self._homes.clear()
      self._homes[affinity] = home_of(affinity, [server.url for server in self.open])
    return self._homes[affinity]

  def _choose(self, home: str | None) -> Server | None:
    if self._time is None:
      self._time = asyncio.get_running_loop().time  # once: it asks the system each time
    return choose(
      self._servers,
      room=self._max_concurrency,
      now=self._time(),
      home=home,
      spill=self._spill,
    )

  def _take(self, server: Server) -> Server:
    self._slots_given += 1
    server.last_used = self._slots_given
    server.in_flight += 1
    return server

  def _serve_waiting(self) -> None:
    """Gives free slots to those who wait."""
    while self._waiting:
      turn = self._waiting[0]
      if turn.slot.done():
        self._waiting.popleft()
      elif (server := self._choose(turn.home)) is not None:
        self._waiting.popleft()
        turn.slot.set_result(self._take(server))
      else:
        return

  def _why_none(self) -> str:
    if any(server.room < self._max_concurrency for server in self.open):
      rooms = ", ".join(f"{server.url} took {server.room:.0f}" for server in self.open)
      return f"no server had room (503: {rooms})"
    if self.open:
      return f"no server had room (each {self._max_concurrency} requests)"
    fenced = [f"{s.url} ({s.fenced})" for s in self._servers.values() if s.fenced is not None]
    return f"all servers are fenced: {', '.join(fenced)}" if fenced else "no server was there"
