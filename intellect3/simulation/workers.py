"""Simulated rollout workers: real messages and real balancing, attempts that were drawn.

Each is a `Link` of the orchestrator. Whatever passes is encoded as production encodes it, and
counted; tokens are numbers of tokens. Which server a turn goes to is `inference.balance`'s word.
"""

import asyncio
import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping

from intellect3 import types
from intellect3.inference import balance
from intellect3.rollouts import messages
from intellect3.simulation import attempts, server, watching

TOKEN_BYTES = 13
"""Of a token in a shard: id, logprob and version of four bytes each, mask of one."""


class Traffic:
  """Messages and bytes between orchestrator and workers, by kind."""

  def __init__(self) -> None:
    self.messages: collections.Counter[str] = collections.Counter()
    self.bytes: collections.Counter[str] = collections.Counter()
    self._last: tuple[object, int] = None, 0  # what goes to all workers is encoded once

  def count(self, message: messages.ToWorker | messages.FromWorker, times: int = 1) -> None:
    """Counts a message, sent so many times, at the size that it would have on the wire."""
    if message is not self._last[0]:
      self._last = message, len(messages.encode(message))
    kind = type(message).__name__
    self.messages[kind] += times
    self.bytes[kind] += times * self._last[1]


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class _Running:
  """An attempt that runs.

  Attributes:
    dispatch, attempt: what was asked for, and what it will turn out to be.
    group: the name that its group's prompt is shared under.
    started: virtual second.
    turn: index of the present one.
    made: sampled tokens by version.
    urls: servers that sampled any.
    home: the last of them; it has `known` tokens cached under `version`.
    context: tokens so far.
    reprefilled, longest_segment: as of `server.Request`, over all turns.
    error: why it fails.
    pending: what it waits for, other than a server.
    slot, request: where a server works for it.
  """

  dispatch: messages.Dispatch
  attempt: attempts.Attempt
  group: str
  started: float
  turn: int = 0
  made: dict[int, int] = dataclasses.field(default_factory=dict)
  urls: dict[str, None] = dataclasses.field(default_factory=dict)
  home: server.Server | None = None
  known: int = 0
  version: int = 0
  context: int = 0
  reprefilled: int = 0
  longest_segment: float = 0.0
  error: str | None = None
  pending: "asyncio.Handle | asyncio.Task[None] | None" = None
  slot: balance.Server | None = None
  request: server.Request | None = None


class Worker:
  """One worker. Belongs to one event loop.

  Args:
    name: unique in the run.
    sizes: tasks by `environment/split`.
    drawn: what attempts turn out to be.
    balancer: picks the servers; may be several workers'.
    hears: whether this worker passes on to it what the orchestrator says of servers.
    servers: by url.
    send: posts a message to the orchestrator.
    traffic: counts messages.
    watch: is told what happens.
    message_seconds: that a message takes, each way.
    write_seconds_per_token: of its shards.
  """

  def __init__(
    self,
    name: str,
    *,
    sizes: Mapping[str, int],
    drawn: attempts.Attempts,
    balancer: balance.Balancer,
    hears: bool,
    servers: Mapping[str, server.Server],
    send: Callable[[str, messages.FromWorker], None],
    traffic: Traffic,
    watch: watching.Watch,
    message_seconds: float,
    write_seconds_per_token: float,
  ) -> None:
    self.name = name
    self._sizes = sizes
    self._drawn = drawn
    self._balancer = balancer
    self._hears = hears
    self._servers = servers
    self._orchestrator = send
    self._traffic = traffic
    self._watch = watch
    self._message_seconds = message_seconds
    self._write_seconds_per_token = write_seconds_per_token
    self._loop = asyncio.get_running_loop()
    self._running: dict[int, _Running] = {}
    self._finished: dict[int, tuple[int, Mapping[int, int]]] = {}  # tokens, sampled by version

  def hello(self) -> messages.Hello:
    """The first message of a connection."""
    return messages.Hello(worker=self.name, sizes=self._sizes)

  def post(self, message: messages.ToWorker) -> None:
    """Delivers a message from the orchestrator a moment later."""
    self._traffic.count(message)
    self._later(self._message_seconds, self._handle, message)

  def close(self) -> None:
    """Ends what runs."""
    for running in self._running.values():
      self._cancel(running)
    self._running.clear()

  def _later(self, seconds: float, act: Callable[..., None], *arguments: object) -> None:
    if seconds:
      self._loop.call_later(seconds, act, *arguments)
    else:
      self._loop.call_soon(act, *arguments)

  def _send(self, message: messages.FromWorker) -> None:
    self._traffic.count(message)
    self._later(self._message_seconds, self._orchestrator, self.name, message)

  def _handle(self, message: messages.ToWorker) -> None:
    match message:
      case messages.Dispatch():
        self._begin(message)
      case messages.Cancel(rollout_ids=ids):
        for rollout_id in ids:
          self._finished.pop(rollout_id, None)
          if rollout_id in self._running:
            self._cancel(self._running.pop(rollout_id))
      case messages.Forget(rollout_ids=ids):
        for rollout_id in ids:
          self._finished.pop(rollout_id, None)
      case messages.WriteBatch():
        self._write(message)
      case messages.Servers(versions=versions) if self._hears:
        self._balancer.set_servers(versions, versions)
      case messages.Loads(loads=loads) if self._hears:
        self._balancer.set_loads(loads)
      case messages.Fence(url=url, reason=reason) if self._hears:
        self._balancer.fence(url, reason)

  # An attempt goes from one call back to the next: tens of thousands run at once.

  def _begin(self, dispatch: messages.Dispatch) -> None:
    running = _Running(
      dispatch=dispatch,
      attempt=self._drawn.draw(dispatch),
      group=f"{dispatch.purpose}-{dispatch.group_id}",
      started=self._loop.time(),
    )
    self._running[dispatch.rollout_id] = running
    running.pending = self._loop.call_soon(self._ask, running)  # in the next round, as a task would

  def _ask(self, running: _Running) -> None:
    """Takes a slot for the next turn; where none is free a task waits for one."""
    running.pending = None
    home = running.home.url if running.home is not None else None
    slot = self._balancer.take(prefer=home, affinity=running.group)
    if slot is not None:
      self._submit(running, slot)
    else:
      running.pending = self._loop.create_task(self._wait(running, home))

  async def _wait(self, running: _Running, home: str | None) -> None:
    try:
      slot = await self._balancer.acquire(prefer=home, affinity=running.group)
    except balance.NoServers as failure:
      running.error = type(failure).__name__
      self._score(running)
    else:
      running.pending = None
      self._submit(running, slot)

  def _submit(self, running: _Running, slot: balance.Server) -> None:
    chosen = self._servers[slot.url]
    turns = running.attempt.turns
    turn = turns[running.turn]
    running.context += turn.given
    running.slot = slot
    running.request = server.Request(
      group=running.group,
      prompt=turns[0].given,
      context=running.context,
      known=running.known if chosen is running.home else 0,
      version=running.version,
      left=turn.sampled,
      ended=functools.partial(self._answered, running, chosen),
    )
    chosen.submit(running.request)

  def _answered(self, running: _Running, chosen: server.Server) -> None:
    """The server has sampled a turn."""
    request, slot = running.request, running.slot
    if request is None or slot is None:
      return  # cancelled meanwhile
    running.request = running.slot = None
    self._balancer.succeeded(slot)
    self._balancer.release(slot)
    for version, count in request.made.items():
      running.made[version] = running.made.get(version, 0) + count
    running.home, running.urls[chosen.url] = chosen, None
    running.context = running.known = request.context
    running.version = request.version
    running.reprefilled += request.reprefilled
    running.longest_segment = max(running.longest_segment, request.longest_segment)
    running.turn += 1
    turns = running.attempt.turns
    if running.turn == len(turns):
      self._score(running)
    elif wait := turns[running.turn].wait_seconds:
      running.pending = self._loop.call_later(wait, self._ask, running)
    else:
      self._ask(running)

  def _score(self, running: _Running) -> None:
    seconds = running.attempt.reward_seconds
    if seconds:
      running.pending = self._loop.call_later(seconds, self._end, running)
    else:
      self._end(running)

  def _end(self, running: _Running) -> None:
    dispatch, attempt, made = running.dispatch, running.attempt, running.made
    error = running.error
    if error is None and attempt.reward is None:
      error = "Simulated"
    well = error is None
    if well and dispatch.purpose == "train":
      self._finished[dispatch.rollout_id] = running.context, made
    self._watch.attempted(running.longest_segment)
    del self._running[dispatch.rollout_id]
    self._send(
      messages.RolloutSummary(
        rollout_id=dispatch.rollout_id,
        group_id=dispatch.group_id,
        purpose=dispatch.purpose,
        environment=dispatch.environment,
        reward=attempt.reward if well else None,
        error=error,
        truncated=attempt.truncated,
        lengths=[running.context] if well else [],
        sampled_tokens=sum(made.values()) if well else 0,
        oldest_version=min(made) if well and made else types.NOT_SAMPLED,
        newest_version=max(made) if well and made else types.NOT_SAMPLED,
        servers=sorted(running.urls),
        metrics={},
        seconds=self._loop.time() - running.started,
        reprefilled_tokens=running.reprefilled,
      )
    )

  def _cancel(self, running: _Running) -> None:
    if running.pending is not None:
      running.pending.cancel()
    request, slot = running.request, running.slot
    running.request = running.slot = None
    if request is not None and slot is not None:
      self._servers[slot.url].withdraw(request)
      self._balancer.release(slot)

  def _write(self, batch: messages.WriteBatch) -> None:
    lengths, fresh = [], []
    for item in batch.items:
      context, made = self._finished[item.rollout_id]
      kept = sum(count for version, count in made.items() if version >= batch.oldest_version)
      lengths.append(context)
      fresh.append(kept)
      self._watch.trained(batch.step, batch.attempt, item.rollout_id, made, batch.oldest_version)
    shard = types.ShardEntry(
      file=f"{self.name}_{batch.attempt}.arrayrecord",
      bytes=TOKEN_BYTES * sum(lengths),
      crc32=0,
      lengths=lengths,
      loss_tokens=fresh,
    )
    written = messages.BatchWritten(
      step=batch.step, attempt=batch.attempt, worker=self.name, shard=shard
    )
    seconds = self._write_seconds_per_token * sum(lengths)
    self._later(seconds, self._send, written)
