"""Joins HTTP requests with what the engine's thread reports of their generations.

Everything here lives on the event loop but `Desk.report`, which the engine's thread calls.
"""

import asyncio
from collections.abc import Sequence

from intellect3.inference.engine.asgi import Wire
from intellect3.inference.engine.loop import Engine, Event
from intellect3.inference.engine.parse import Call
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.sequence import Sequence as Generation


class Visit:
  """What one HTTP request waits for: the ends of its generations, or their progress as well."""

  def __init__(self, loop: asyncio.AbstractEventLoop, count: int):
    self.generations: list[Generation] = []
    self._loop, self._running = loop, count
    self._news: dict[int, Event] = {}
    self._waiter: asyncio.Future[None] | None = None

  def take(self, index: int, event: Event) -> None:
    """Notes an event; only the latest of a generation is kept until it is asked for."""
    self._running -= event.finished
    self._news[index] = event
    waiter = self._waiter
    if waiter is not None and not waiter.done():
      waiter.set_result(None)

  async def news(self) -> list[tuple[int, Event]]:
    """The latest event of each generation that went on; empty once all have ended."""
    while self._running and not self._news:
      await self._wait()
    news, self._news = self._news, {}
    return list(news.items())

  async def finished(self) -> list[Generation]:
    while self._running:
      await self._wait()
    return self.generations

  async def _wait(self) -> None:
    self._waiter = self._loop.create_future()
    await self._waiter


class Desk:
  """Takes calls in, keeps who waits for which generation, and ends those of clients that left."""

  def __init__(self, loop: asyncio.AbstractEventLoop, slots: int, queue_limit: int):
    """Makes a desk of an empty house, where `slots` requests run and `queue_limit` may wait."""
    self._loop, self._slots, self._queue_limit = loop, slots, queue_limit
    self._visits: dict[str, tuple[Visit, int]] = {}
    self._rids: dict[str, set[str]] = {}
    self._names: dict[str, list[str]] = {}

  def report(self, events: list[Event]) -> None:
    """For the engine's thread; returns at once."""
    self._loop.call_soon_threadsafe(self._deliver, events)

  async def run(self, engine: Engine, call: Call, wire: Wire | None = None) -> list[Generation]:
    """Runs a call to its end; ends its generations early if the client goes away.

    Raises:
      RequestError: the house is full (503); it could not even be empty enough, or a name is in use
        (400).
    """
    visit = self._admit(engine, call)
    if wire is None:
      return await visit.finished()
    watch = asyncio.ensure_future(self._end_if_gone(engine, call, wire))
    try:
      return await visit.finished()
    finally:
      watch.cancel()

  def admit(self, engine: Engine, call: Call, wire: Wire) -> "tuple[Visit, asyncio.Future[None]]":
    """As `run`, for streams: gives the visit, and a watch over the client that the caller cancels
    at the end."""
    visit = self._admit(engine, call)
    return visit, asyncio.ensure_future(self._end_if_gone(engine, call, wire))

  def rids(self, name: str) -> Sequence[str]:
    """The running generations that a client's name stands for."""
    return list(self._rids.get(name, (name,)))

  def _admit(self, engine: Engine, call: Call) -> Visit:
    requests = call.requests
    most = self._slots + self._queue_limit
    if len(requests) > most:
      raise RequestError(
        f"Expected at most {most} generations in one request (--slots {self._slots}, "
        f"--queue-limit {self._queue_limit}), got {len(requests)}."
      )
    if len(self._visits) + len(requests) > most:
      raise RequestError(
        f"The queue is full (--queue-limit {self._queue_limit}). Please try again later.",
        status=503,
      )
    rids = [request.rid for request in requests]
    for rid in {*rids, *call.names}:
      if rid in self._visits or rid in self._rids:
        raise RequestError(f"rid: {rid!r} is the name of a request that is still running.")
    if len(set(rids)) < len(rids):
      raise RequestError(f"rid: expected a name for each prompt, got {rids}.")
    visit = Visit(self._loop, len(requests))
    for name, named in call.names.items():
      self._rids[name] = set(named)
      for rid in named:
        self._names.setdefault(rid, []).append(name)
    for index, request in enumerate(requests):
      self._visits[request.rid] = (visit, index)
      visit.generations.append(engine.submit(request))
    return visit

  def _deliver(self, events: list[Event]) -> None:
    for event in events:
      rid = event.sequence.request.rid
      found = self._visits.get(rid)
      if found is None:
        continue
      if event.finished:
        self._forget(rid)
      visit, index = found
      visit.take(index, event)

  def _forget(self, rid: str) -> None:
    del self._visits[rid]
    for name in self._names.pop(rid, ()):
      self._rids[name].discard(rid)
      if not self._rids[name]:
        del self._rids[name]

  async def _end_if_gone(self, engine: Engine, call: Call, wire: Wire) -> None:
    await wire.gone()
    for request in call.requests:
      engine.abort(request.rid)
