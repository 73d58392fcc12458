"""Simulated rollout workers: real messages and real balancing, attempts that were drawn.

Each is a `Link` of the orchestrator. Whatever passes is encoded as production encodes it, and
counted; tokens are numbers of tokens. Which server a turn goes to is `inference.balance`'s word.
"""

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping

from intellect3 import types
from intellect3.inference import balance
from intellect3.rollouts import messages
from intellect3.simulation import attempts, requests, server, watching
from intellect3.simulation import traffic as traffic_lib

TOKEN_BYTES = 13
"""Of a token in a shard: id, logprob and version of four bytes each, mask of one."""


RETRIES, BACKOFF_SECONDS, BACKOFF_MAX_SECONDS = 5, 0.5, 30.0
"""Of the client, by default (`inference.client`)."""


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
    left: tokens of the present turn still to be sampled; 0 before it has begun.
    failures: requests in a row that were lost with their servers.
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
  left: int = 0
  failures: int = 0
  pending: "asyncio.Handle | asyncio.Task[None] | None" = None
  slot: balance.Server | None = None
  request: server.Request | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Finished:
  """A rollout that a worker holds: its tokens, those sampled by version, what was told of it."""

  context: int
  made: Mapping[int, int]
  summary: messages.RolloutSummary


Journal = dict[int, _Running | Finished]
"""What lost workers had of their rollouts, by id: another one goes on from there."""


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
    journal: of all workers.
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
    traffic: traffic_lib.Traffic,
    watch: watching.Watch,
    journal: Journal,
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
    self._journal = journal
    self._message_seconds = message_seconds
    self._write_seconds_per_token = write_seconds_per_token
    self._loop = asyncio.get_running_loop()
    self._running: dict[int, _Running] = {}
    self._finished: dict[int, Finished] = {}
    self._lost = False

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

  def lose(self) -> None:
    """Is gone, with all but what its journal has."""
    self._lost = True
    for rollout_id, running in self._running.items():
      request = running.request
      self._cancel(running)
      if request is not None:
        requests.lose_segment(request)
        self._keep(running, request)
      running.home, running.known, running.pending = None, 0, None
      self._journal[rollout_id] = running
    self._journal.update(self._finished)
    self._running.clear()
    self._finished.clear()

  def _later(self, seconds: float, act: Callable[..., None], *arguments: object) -> None:
    if seconds:
      self._loop.call_later(seconds, act, *arguments)
    else:
      self._loop.call_soon(act, *arguments)

  def _send(self, message: messages.FromWorker) -> None:
    self._traffic.count(message)
    self._later(self._message_seconds, self._deliver, message)

  def _deliver(self, message: messages.FromWorker) -> None:
    if not self._lost:
      self._orchestrator(self.name, message)

  def _handle(self, message: messages.ToWorker) -> None:
    if self._lost:
      return
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
    kept = self._journal.pop(dispatch.rollout_id, None) if dispatch.continued else None
    if isinstance(kept, Finished):
      self._finished[dispatch.rollout_id] = kept
      self._send(kept.summary)
      return
    running = kept or _Running(
      dispatch=dispatch,
      attempt=self._drawn.draw(dispatch),
      group=f"{dispatch.purpose}-{dispatch.group_id}",
      started=self._loop.time(),
    )
    self._running[dispatch.rollout_id] = running
    go_on = self._ask if running.turn < len(running.attempt.turns) else self._score
    running.pending = self._loop.call_soon(go_on, running)  # in the next round, as a task would

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
    if not running.left:
      running.context += turn.given
      running.left = turn.sampled
    running.slot = slot
    running.request = server.Request(
      group=running.group,
      prompt=turns[0].given,
      context=running.context,
      known=running.known if chosen is running.home else 0,
      version=running.version,
      left=running.left,
      ended=functools.partial(self._answered, running, chosen),
      failed=functools.partial(self._failed, running),
    )
    self._watch.event(
      "asked", rollout=running.dispatch.rollout_id, turn=running.turn, server=slot.url
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
    self._keep(running, request)
    running.home, running.urls[chosen.url] = chosen, None
    running.known, running.version = request.context, request.version
    running.failures = 0
    running.turn += 1
    turns = running.attempt.turns
    if running.turn == len(turns):
      self._score(running)
    elif wait := turns[running.turn].wait_seconds:
      running.pending = self._loop.call_later(wait, self._ask, running)
    else:
      self._ask(running)

  def _keep(self, running: _Running, request: server.Request) -> None:
    """Takes what a request has of the turn."""
    for version, count in request.made.items():
      running.made[version] = running.made.get(version, 0) + count
    running.context, running.left = request.context, request.left
    running.reprefilled += request.reprefilled
    running.longest_segment = max(running.longest_segment, request.longest_segment)

  def _failed(self, running: _Running) -> None:
    """The server is lost: another one is asked for what is left, as the client does."""
    request, slot = running.request, running.slot
    if request is None or slot is None:
      return  # cancelled meanwhile
    running.request = running.slot = None
    slot.failures += 1
    slot.blocked_until = self._loop.time() + _backoff(slot.failures)
    self._balancer.release(slot)
    self._keep(running, request)
    if request.made:
      running.urls[slot.url] = None
    running.home, running.known = None, 0
    running.failures += 1
    if running.failures > RETRIES:
      running.error = "ServerUnavailable"
      self._score(running)
    else:
      wait = 0.5 * _backoff(running.failures)  # on average
      running.pending = self._loop.call_later(wait, self._ask, running)

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
    self._watch.attempted(running.longest_segment)
    del self._running[dispatch.rollout_id]
    summary = messages.RolloutSummary(
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
    if well and dispatch.purpose == "train":
      self._finished[dispatch.rollout_id] = Finished(running.context, made, summary)
    self._send(summary)

  def _cancel(self, running: _Running) -> None:
    if running.pending is not None:
      running.pending.cancel()
    request, slot = running.request, running.slot
    running.request = running.slot = None
    if request is not None and slot is not None:
      self._servers[slot.url].withdraw(request)
      self._balancer.release(slot)

  def _write(self, batch: messages.WriteBatch) -> None:
    ids = [item.rollout_id for item in batch.items]
    self._watch.batch(batch.step, batch.attempt, self.name, ids)
    lengths, fresh = [], []
    for item in batch.items:
      finished = self._finished[item.rollout_id]
      context, made = finished.context, finished.made
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


def _backoff(failures: int) -> float:
  return min(BACKOFF_MAX_SECONDS, BACKOFF_SECONDS * 2.0 ** (failures - 1))
