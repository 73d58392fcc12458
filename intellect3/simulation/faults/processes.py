"""The processes of a run in the lab: one life of the orchestrator, its workers, their connections.

A process that is killed does nothing more that others could see, whatever its code still does:
requests, messages and writes of the dead go nowhere. Workers end with their connection, as those of
`rollouts.link.run_remote_worker` do, and are started again.
"""

import asyncio
import pathlib
from collections.abc import Callable, Iterable
from typing import Protocol

from intellect3 import types
from intellect3.inference import transport
from intellect3.rl import roles
from intellect3.rl import worker as worker_role
from intellect3.rollouts import link, messages, scheduler, worker
from intellect3.rollouts import orchestrator as orchestrator_lib
from intellect3.simulation.faults import contracts, network, schedule, world

KILLED = "killed"


class Surroundings(Protocol):
  """The part of `lab.Lab` that processes see."""

  plan: schedule.Schedule
  network: network.Network
  disk: world.Disk
  ledger: contracts.Ledger

  def note(self, who: str, what: str) -> None: ...

  def batch_committed(self, step: int) -> None: ...

  def felt(self, what: str) -> None: ...

  def nonce(self) -> str: ...


class Life:
  """One orchestrator process, from its start to its end; also the door to it."""

  def __init__(self, lab: Surroundings, shared: roles.Shared) -> None:
    """Args: lab: see there. shared: what its roles share."""
    self._lab = lab
    self.shared = shared
    self.alive = True
    self.connection = network.Connection(lab.network)
    self.task: asyncio.Task[None] | None = None
    self.scheduler: scheduler.Scheduler | None = None
    self.orchestrator: orchestrator_lib.Orchestrator | None = None
    self._version_published: Callable[[int], None] = lambda version: None
    self._keepers: list[asyncio.Task[None]] = []
    self._present: dict[int, Process] = {}
    self.links: dict[str, Process] = {}
    self._armed: dict[str, int] = {}

  def note(self, who: str, what: str) -> None:
    """A line of the trace, while it lives."""
    if self.alive:
      self._lab.note(who, what)

  # Its end.

  def kill(self, why: str) -> None:
    """Ends the process at once."""
    if self.alive:
      self._lab.note("lab", f"the orchestrator is killed: {why}")
      if why.startswith(("a fault", "at ")):
        self._lab.felt("orchestrator_killed")
      if self.scheduler is not None and self.scheduler.accounting.in_flight:
        self._lab.felt("orchestrator ended with rollouts in flight")
      self.alive = self.connection.alive = False
      if self.task is not None:
        asyncio.get_running_loop().call_soon(self.task.cancel)

  def arm(self, point: str) -> None:
    """Kills it now, or when it passes a point (`NAME COUNT`) so many times."""
    if not point:
      self.kill("a fault")
    else:
      name, _, count = point.partition(" ")
      self._armed[name] = int(count)

  def point(self, name: str) -> bool:
    """It passes a place where it may end; returns whether it goes on."""
    if self.alive and name in self._armed:
      self._armed[name] -= 1
      if self._armed[name] <= 0:
        del self._armed[name]
        self.kill(f"at {name}")
    if self.alive and self.scheduler is not None:
      self._lab.ledger.moment(self.scheduler.accounting)
    return self.alive

  async def end(self) -> None:
    """Ends its workers with it."""
    for keeper in self._keepers:
      keeper.cancel()
    await asyncio.gather(*self._keepers, return_exceptions=True)
    for process in list(self._present.values()):
      process.die()
      await process.closed()

  # The door (`rl.conducting.Door`).

  def open_door(
    self, orchestrator: orchestrator_lib.Orchestrator, version_published: Callable[[int], None]
  ) -> "Life":
    """Makes it the door of an orchestrator."""
    self.orchestrator = orchestrator
    self._version_published = version_published
    return self

  async def start(self) -> None:
    """See Door."""
    for index in range(self.shared.num_workers):
      self._keepers.append(asyncio.ensure_future(self._keep(index)))

  def batch_committed(self, step: int) -> None:
    """See Door."""
    if self.alive:
      self._lab.batch_committed(step)

  async def close(self) -> None:
    """See Door: what is posted arrives, then connections end."""
    await asyncio.sleep(2 * network.ONE_WAY_SECONDS)

  def version_published(self, version: int) -> None:
    """It is told of new weights."""
    self._version_published(version)

  # Workers.

  def make_worker(self, index: int) -> link.MakeWorker:
    """The factory of one worker, of `rl.worker`."""
    if self.shared.num_workers:
      return lambda send: self._build(index, self.connection, self._writer(), send)

    def make(send: Callable[[messages.FromWorker], None]) -> worker.Worker:
      def spied(message: messages.FromWorker) -> None:
        self.spy(message)
        send(message)

      made = self._build(index, self.connection, self._writer(), spied)
      handle = made.handle

      def hear(message: messages.ToWorker) -> None:
        if self.alive:
          self.spy(message)
          handle(message)

      made.handle = hear  # type: ignore[method-assign]
      return made

    return make

  def _writer(self) -> world.Writer:
    return world.Writer(lives=lambda: self.alive, die=lambda: self.kill("a fault, as it writes"))

  def _build(
    self,
    index: int,
    connection: transport.Transport,
    writer: world.Writer,
    send: Callable[[messages.FromWorker], None],
  ) -> worker.Worker:
    async def write_shard(
      path: pathlib.Path, records: Iterable[types.TrajectoryRecord]
    ) -> types.ShardEntry:
      if not (writer.lives() and self.point("shard.before")):
        await asyncio.Event().wait()  # the dead do not go on, and say nothing
      entry = await self._lab.disk.write_shard(path, records, writer)
      self.point("shard.after")
      return entry

    make = worker_role.worker(
      self.shared,
      index,
      max_new_tokens=40,
      max_tokens=160,
      max_concurrency=8,
      segment_tokens=12,
      retries=3,
      backoff_seconds=0.2,
      timeout_seconds=20.0,
      grace_seconds=3.0,
      wait_seconds=60.0,
      journal_seconds=self._lab.plan.world.journal_seconds,
      make_transport=lambda: connection,
      nonce=self._lab.nonce,
      beside_disk=self._lab.disk.beside(writer),
      write_shard=write_shard,
      show_samples=False,
    )
    return make(send)

  async def _keep(self, index: int) -> None:
    while self.alive:
      process = self._present[index] = Process(self._lab, self, index)
      await process.ended.wait()
      await process.closed()
      await asyncio.sleep(process.back_after)

  def make_process_worker(
    self, process: "Process", send: Callable[[messages.FromWorker], None]
  ) -> worker.Worker:
    """The worker of a process of its own."""
    writer = world.Writer(lives=lambda: process.alive, die=process.die)
    return self._build(process.index, process.connection, writer, send)

  def kill_worker(self, number: int, seconds: float, why: str = "worker_killed") -> bool:
    """Kills a worker's process, or with none but its own the orchestrator."""
    if not self.alive:
      return False
    if not self.shared.num_workers:
      self._lab.felt(why)
      self.kill("its worker is killed")
      return True
    process = self._present.get(number % self.shared.num_workers)
    if process is None or not process.alive:
      return False
    process.back_after = seconds
    if process.has:
      self._lab.felt(why)
    process.die()
    return True

  def kill_workers(self, seconds: float) -> bool:
    """Kills all of them at once; returns whether there were several."""
    there = [index for index, process in self._present.items() if process.alive]
    if len(there) < 2:
      return False
    for index in there:
      self.kill_worker(index, seconds, "workers_killed")
    return True

  def say_twice(self, number: int, count: int) -> bool:
    """The next messages to and from a worker are sent twice in a row."""
    process = self._present.get(number % max(1, self.shared.num_workers))
    if not self.alive or process is None or not process.alive:
      return False
    process.up.twice = process.down.twice = count
    return True

  def delay_worker(self, number: int, seconds: float) -> bool:
    """Holds a worker's messages up, both ways."""
    process = self._present.get(number % max(1, self.shared.num_workers))
    if not self.alive or process is None or not process.alive:
      return False
    until = asyncio.get_running_loop().time() + seconds
    process.up.stalled_until = process.down.stalled_until = until
    return True

  def spy(self, message: messages.FromWorker | messages.ToWorker) -> None:
    """Judges a message and tells the trace."""
    ledger = self._lab.ledger
    match message:
      case messages.RolloutSummary():
        ledger.summarized(message)
        self.note(
          "worker",
          f"rollout {message.rollout_id} {message.error or message.reward} "
          f"v{message.oldest_version}-{message.newest_version}",
        )
      case messages.Dispatch():
        ledger.dispatched(message)
      case messages.Forget(rollout_ids=ids) | messages.Cancel(rollout_ids=ids):
        ledger.let_go(ids)
      case messages.Servers():
        ledger.told(message)
        self.note("orchestrator", f"servers {dict(message.versions)}")
      case messages.WriteBatch():
        self.note("orchestrator", f"asks for step {message.step}, attempt {message.attempt}")
      case messages.BatchWritten():
        self.note(message.worker, f"wrote step {message.step}, attempt {message.attempt}")
      case _:
        pass
    if self.scheduler is not None:
      ledger.moment(self.scheduler.accounting)


class Process:
  """A worker's process and its connection; the orchestrator's `Link`."""

  def __init__(self, lab: Surroundings, life: Life, index: int) -> None:
    """Starts it: it says hello. Args: lab, life: see there. index: of the worker."""
    self._lab, self._life = lab, life
    self.index = index
    self.alive = True
    self.back_after = 1.0
    self.ended = asyncio.Event()
    self.connection = network.Connection(lab.network)
    rng = lab.network.rng
    self.has: set[int] = set()
    """Rollouts that it was sent and that nobody has let go of."""
    self.up = network.Stream(self._from_worker, rng, lab.felt)
    self.down = network.Stream(self._to_worker, rng, lab.felt)
    self._worker = life.make_process_worker(self, self._send)
    self.name = self._worker.name
    self._closing: asyncio.Task[None] | None = None
    self._send(self._worker.hello())
    lab.note(self.name, "is started")

  def post(self, message: messages.ToWorker) -> None:
    """See Link."""
    if self._life.alive:
      if isinstance(message, messages.Dispatch):
        self.has.add(message.rollout_id)
      elif isinstance(message, messages.Forget | messages.Cancel):
        self.has.difference_update(message.rollout_ids)
      self._life.spy(message)
      self.down.send(messages.encode(message))

  def _send(self, message: messages.FromWorker) -> None:
    if self.alive:
      self.up.send(messages.encode(message))

  def _to_worker(self, data: bytes) -> None:
    if self.alive:
      self._worker.handle(messages.decode_to_worker(data))

  def _from_worker(self, data: bytes) -> None:
    life = self._life
    orchestrator = life.orchestrator
    if not life.alive or orchestrator is None:
      return
    message = messages.decode_from_worker(data)
    if life.links.get(self.name) is self:
      life.spy(message)
      orchestrator.received(self.name, message)
    elif isinstance(message, messages.Hello) and self.name not in life.links:
      life.links[self.name] = self
      orchestrator.connected(self, message)
    else:  # its name is still taken
      self.die()

  def die(self) -> None:
    """Ends the process; what it had sent arrives, then the other side learns of it."""
    if not self.alive:
      return
    self.alive = self.connection.alive = self.down.open = False
    self._lab.note(self.name, "ends")
    self.ended.set()
    self._closing = asyncio.ensure_future(self._worker.close())
    loop = asyncio.get_running_loop()
    loop.call_at(max(self.up.last, loop.time() + 0.01), self._gone)

  def _gone(self) -> None:
    life = self._life
    self.up.open = False
    if life.links.get(self.name) is self:
      del life.links[self.name]
      if life.alive and life.orchestrator is not None:
        life.orchestrator.disconnected(self.name)

  async def closed(self) -> None:
    """Waits until its coroutines have ended."""
    if self._closing is not None:
      await self._closing
