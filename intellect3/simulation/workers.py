"""Simulated rollout workers: real messages and real balancing, attempts that were drawn.

Each is a `Link` of the orchestrator. Whatever passes is encoded as production encodes it, and
counted; tokens are numbers of tokens. Which server a turn goes to is `inference.balance`'s word.
"""

import asyncio
import collections
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

  def count(self, message: messages.ToWorker | messages.FromWorker) -> None:
    """Counts a message at the size that it would have on the wire."""
    kind = type(message).__name__
    self.messages[kind] += 1
    self.bytes[kind] += len(messages.encode(message))


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
    self._running: dict[int, asyncio.Task[None]] = {}
    self._finished: dict[int, tuple[int, Mapping[int, int]]] = {}  # tokens, sampled by version

  def hello(self) -> messages.Hello:
    """The first message of a connection."""
    return messages.Hello(worker=self.name, sizes=self._sizes)

  def post(self, message: messages.ToWorker) -> None:
    """Delivers a message from the orchestrator a moment later."""
    self._traffic.count(message)
    self._later(self._message_seconds, self._handle, message)

  async def close(self) -> None:
    """Ends what runs."""
    tasks = list(self._running.values())
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

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
        self._running[message.rollout_id] = self._loop.create_task(self._run(message))
      case messages.Cancel(rollout_ids=ids):
        for rollout_id in ids:
          self._finished.pop(rollout_id, None)
          if rollout_id in self._running:
            self._running.pop(rollout_id).cancel()
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

  async def _run(self, dispatch: messages.Dispatch) -> None:
    started = self._loop.time()
    attempt = self._drawn.draw(dispatch)
    affinity = f"{dispatch.purpose}-{dispatch.group_id}"
    made: dict[int, int] = {}  # sampled tokens by version
    urls: dict[str, None] = {}
    home: server.Server | None = None
    context = known = version = reprefilled = 0
    longest = 0.0
    error: str | None = None
    for turn in attempt.turns:
      if turn.wait_seconds:
        await asyncio.sleep(turn.wait_seconds)
      try:
        slot = await self._balancer.acquire(prefer=home.url if home else None, affinity=affinity)
      except balance.NoServers as failure:
        error = type(failure).__name__
        break
      chosen = self._servers[slot.url]
      context += turn.given
      request = server.Request(
        group=affinity,
        prompt=attempt.turns[0].given,
        context=context,
        known=known if chosen is home else 0,
        version=version,
        left=turn.sampled,
        done=self._loop.create_future(),
      )
      chosen.submit(request)
      try:
        await request.done
        self._balancer.succeeded(slot)
      finally:
        if not request.done.done() or request.done.cancelled():
          chosen.withdraw(request)
        self._balancer.release(slot)
      for key, count in request.made.items():
        made[key] = made.get(key, 0) + count
      home, urls[chosen.url] = chosen, None
      context = known = request.context
      version = request.version
      reprefilled += request.reprefilled
      longest = max(longest, request.longest_segment)
    if attempt.reward_seconds:
      await asyncio.sleep(attempt.reward_seconds)
    if error is None and attempt.reward is None:
      error = "Simulated"
    sampled = sum(made.values())
    if dispatch.purpose == "train" and error is None:
      self._finished[dispatch.rollout_id] = context, made
    self._watch.attempted(longest)
    del self._running[dispatch.rollout_id]
    self._send(
      messages.RolloutSummary(
        rollout_id=dispatch.rollout_id,
        group_id=dispatch.group_id,
        purpose=dispatch.purpose,
        environment=dispatch.environment,
        reward=attempt.reward if error is None else None,
        error=error,
        truncated=attempt.truncated,
        lengths=[context] if error is None else [],
        sampled_tokens=sampled if error is None else 0,
        oldest_version=min(made) if made and error is None else types.NOT_SAMPLED,
        newest_version=max(made) if made and error is None else types.NOT_SAMPLED,
        servers=sorted(urls),
        metrics={},
        seconds=self._loop.time() - started,
        reprefilled_tokens=reprefilled,
      )
    )

  def _write(self, batch: messages.WriteBatch) -> None:
    lengths, fresh = [], []
    for item in batch.items:
      context, made = self._finished[item.rollout_id]
      kept = sum(count for version, count in made.items() if version >= batch.oldest_version)
      lengths.append(context)
      fresh.append(kept)
      self._watch.trained(batch.step, item.rollout_id, made, batch.oldest_version)
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
