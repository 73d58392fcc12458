"""Which server gets the next request: the least loaded of those that are not fenced.

Waiting is first come, first served: a slot that comes free is handed to whoever waited longest, so
while anyone waits no slot is free for a newcomer.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


class NoServers(Exception):
  """Every server is fenced or none was given."""


@dataclass(eq=False)
class Server:
  """A server as its clients see it.

  Attributes:
    url: its address.
    in_flight: slots taken.
    failures: failed requests since the last good one.
    blocked_until: on the event loop's clock; until then others are preferred.
    last_used: number of the last slot given, counted over all servers.
    fenced: why nothing is sent to it any more, or None.
    requests: what is on its way, so that a fence can end it.
  """

  url: str
  in_flight: int = 0
  failures: int = 0
  blocked_until: float = 0.0
  last_used: int = 0
  fenced: str | None = None
  requests: set[asyncio.Future] = field(default_factory=set)


class Balancer:
  """The set of servers and the queue for their slots. Belongs to one event loop."""

  def __init__(self, urls: Sequence[str], max_concurrency: int):
    """Args: urls: addresses. max_concurrency: slots of each server."""
    if max_concurrency < 1:
      raise ValueError(f"max_concurrency: expected at least 1, got {max_concurrency}")
    self._max_concurrency = max_concurrency
    self._servers: dict[str, Server] = {}
    self._waiting: deque[asyncio.Future[Server]] = deque()
    self._slots_given = 0
    self.set_servers(urls)

  @property
  def open(self) -> list[Server]:
    """Servers that are not fenced."""
    return [server for server in self._servers.values() if server.fenced is None]

  @property
  def waiting(self) -> int:
    """How many wait for a slot."""
    return sum(not turn.done() for turn in self._waiting)

  def fence_reason(self, url: str) -> str | None:
    """Why a server is fenced; None where it is not, or is not known."""
    return self._servers[url].fenced if url in self._servers else None

  def set_servers(self, urls: Iterable[str]) -> None:
    """Replaces the set. A server that left keeps what is in flight there; fences stay."""
    kept = {url: server for url, server in self._servers.items() if server.fenced is not None}
    for url in urls:
      kept.setdefault(url, self._servers.get(url) or Server(url))
    self._servers = kept
    self._serve_waiting()

  def fence(self, url: str, reason: str) -> None:
    """Takes a server out and cancels its requests; an unknown one is remembered as fenced."""
    server = self._servers.setdefault(url, Server(url))
    if server.fenced is None:
      server.fenced = reason
      for request in server.requests:
        request.cancel()
      self._serve_waiting()

  def admit(self, url: str) -> None:
    """Adds a server, or lifts its fence."""
    if url not in self._servers or self._servers[url].fenced is not None:
      self._servers[url] = Server(url)
      self._serve_waiting()

  async def acquire(self) -> Server:
    """Waits for a slot and takes it; `release` gives it back. NoServers where none is left."""
    if not self.open:
      raise NoServers(self._why_none())
    if (server := self._least_loaded()) is not None:
      return self._take(server)
    turn: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    self._waiting.append(turn)
    try:
      return await turn
    except asyncio.CancelledError:
      # Cancelled between being given the slot and waking up: the slot goes to the next.
      if turn.done() and not turn.cancelled() and turn.exception() is None:
        self.release(turn.result())
      raise

  def release(self, server: Server) -> None:
    """Gives a slot back."""
    server.in_flight -= 1
    self._serve_waiting()

  def _least_loaded(self) -> Server | None:
    """The open server with room: failing ones last, then by load, then the longest unused."""
    now = asyncio.get_running_loop().time()
    return min(
      (server for server in self.open if server.in_flight < self._max_concurrency),
      key=lambda server: (server.blocked_until > now, server.in_flight, server.last_used),
      default=None,
    )

  def _take(self, server: Server) -> Server:
    self._slots_given += 1
    server.last_used = self._slots_given
    server.in_flight += 1
    return server

  def _serve_waiting(self) -> None:
    """Gives free slots to those who wait; with no server left, tells them all."""
    while self._waiting:
      if self._waiting[0].done():
        self._waiting.popleft()
      elif not self.open:
        self._waiting.popleft().set_exception(NoServers(self._why_none()))
      elif (server := self._least_loaded()) is not None:
        self._waiting.popleft().set_result(self._take(server))
      else:
        return

  def _why_none(self) -> str:
    fenced = [f"{server.url} ({server.fenced})" for server in self._servers.values()]
    return f"all servers are fenced: {', '.join(fenced)}" if fenced else "no server was given"
