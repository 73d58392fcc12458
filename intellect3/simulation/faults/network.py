"""How requests, messages and news travel in the lab, and what can happen to them on their way.

What is possible follows from what carries them. A request over HTTP may be refused, may be carried
out though its answer is lost (its sender asks again: done twice), and may be done long after its
sender gave up, after later ones (a server that hung). Messages between worker and orchestrator are
one TCP stream each way: late they may be, or said twice in a row by their sender, but never out of
order; the stream ends, and what was on its way is lost. News of versions and batches may be lost,
late, twice, out of order: files are the truth.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from intellect3.inference.transport import TransportError
from intellect3.simulation.faults.servers import Server

ONE_WAY_SECONDS = 0.002


class Network:
  """Between everybody and the servers."""

  def __init__(
    self,
    servers: Mapping[str, Server],
    rng: random.Random,
    note: Callable[[str, str], None],
    felt: Callable[[str], None],
  ) -> None:
    """Args: servers: by url. rng: of delays. note: tells the trace. felt: is told of each fault
    that somebody felt."""
    self._servers = servers
    self.rng = rng
    self._note, self._felt = note, felt
    self._unanswered: set[tuple[str, str]] = set()
    self.lost_answers: dict[str, int] = {}
    """How many of the next answers of a server are lost."""
    self.cut: set[str] = set()
    """Servers that nobody reaches."""

  async def request(
    self, method: str, url: str, json: Mapping[str, Any] | bytes | None, timeout: float
  ) -> tuple[int, bytes]:
    """See `inference.transport.Transport`."""
    del method
    base, _, path = url.removeprefix("http://").partition("/")
    server = self._servers[f"http://{base}"]
    path = "/" + path.partition("?")[0]
    if isinstance(json, Mapping):
      json = msgspec.json.encode(json)
    body = msgspec.json.decode(json) if json is not None else {}
    await asyncio.sleep(ONE_WAY_SECONDS * (0.5 + self.rng.random()))
    if not server.alive or server.url in self.cut:
      why = "server_cut_off" if server.alive else server.ended_by
      if why:
        self._felt(why)
      raise TransportError(url, "refused")
    if (server.url, path) in self._unanswered:
      self._unanswered.discard((server.url, path))
      self._felt("message: a request comes twice")
    call = asyncio.get_running_loop().create_task(server.handle(path, body))
    server.calls[call] = None
    call.add_done_callback(lambda task: server.calls.pop(task, None))
    try:
      done, _ = await asyncio.wait({call}, timeout=timeout)
    except asyncio.CancelledError:
      self._left(call, path)
      raise
    if not done:
      self._left(call, path)
      raise TransportError(url, f"no answer within {timeout:g} s")
    if call.cancelled():
      raise TransportError(url, "connection reset")
    status, answer = call.result()
    if self.lost_answers.get(server.url, 0) > 0:
      self.lost_answers[server.url] -= 1
      self._felt("answers_lost")
      self._unanswered.add((server.url, path))
      self._note(server.url, f"answer to {path} is lost")
      raise TransportError(url, "connection reset before the answer")
    await asyncio.sleep(ONE_WAY_SECONDS * (0.5 + self.rng.random()))
    return status, answer

  def _left(self, call: asyncio.Task[tuple[int, bytes]], path: str) -> None:
    """Whoever asked is gone: a generation ends, a control call is carried out all the same."""
    if path == "/generate":
      call.cancel()
    elif path not in ("/model_info", "/server_info"):
      self._felt("message: a request is done after its sender gave up")


class Connection:
  """Implements `Transport` for one process of the run, which may be killed."""

  def __init__(self, network: Network) -> None:
    self._network = network
    self.alive = True

  async def request(
    self, method: str, url: str, json: Mapping[str, Any] | bytes | None, timeout: float
  ) -> tuple[int, bytes]:
    """See Transport."""
    if not self.alive:
      raise TransportError(url, "this process is dead")
    return await self._network.request(method, url, json, timeout)

  async def close(self) -> None:
    """See Transport."""


class Stream:
  """One way of a TCP connection: in order, late, twice in a row, until it ends."""

  def __init__(
    self, deliver: Callable[[bytes], None], rng: random.Random, felt: Callable[[str], None]
  ) -> None:
    """Args: deliver: takes what arrives. rng: of delays. felt: see Network."""
    self._deliver = deliver
    self._rng, self._felt = rng, felt
    self.last = 0.0
    self.open = True
    self.stalled_until = 0.0
    self.twice = 0
    """How many of the next messages come twice."""

  def send(self, data: bytes) -> None:
    """Posts a message; it arrives after those before it."""
    loop = asyncio.get_running_loop()
    arrives = loop.time() + ONE_WAY_SECONDS * (0.5 + self._rng.random())
    if arrives < self.stalled_until:
      arrives = self.stalled_until
      self._felt("worker_late")
    self.last = max(arrives, self.last)
    loop.call_at(self.last, self._arrive, data)
    if self.twice:
      self.twice -= 1
      self._felt("worker_twice")
      loop.call_at(self.last, self._arrive, data)

  def _arrive(self, data: bytes) -> None:
    if self.open:
      self._deliver(data)
    else:
      self._felt("message: lost with its connection")


class News:
  """Words that may be lost, late, twice or out of order: `POST /versions`, `GET /batches`."""

  def __init__(
    self, rng: random.Random, note: Callable[[str, str], None], felt: Callable[[str], None]
  ) -> None:
    """Args: rng: of what becomes of them. note: tells the trace. felt: see Network."""
    self._rng = rng
    self._note, self._felt = note, felt
    self._newest: dict[str, int] = {}

  def tell(self, deliver: Callable[[int], None], number: int, what: str) -> None:
    """Sends a number; `deliver` gets it once, or not at all, or twice, now or later."""
    fate = self._rng.random()
    times = [self._rng.random() * 0.01]
    if fate < 0.45:
      how = "lost" if fate < 0.15 else "late" if fate < 0.3 else "twice"
      self._note("news", f"{what} {number} is {how}")
      self._felt(f"message: news {how}")
      if how == "lost":
        return
      later = self._rng.random() * 20.0
      times = [later] if how == "late" else [*times, later]
    for seconds in times:
      asyncio.get_running_loop().call_later(seconds, self._arrive, deliver, number, what)

  def _arrive(self, deliver: Callable[[int], None], number: int, what: str) -> None:
    if number < self._newest.get(what, number):
      self._felt("message: news out of order")
    self._newest[what] = max(number, self._newest.get(what, number))
    deliver(number)
