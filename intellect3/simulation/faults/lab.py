"""One schedule, run: the production stack in a simulated world, and somebody who starts it again.

What is production code: `rl.conducting` with the orchestrator, scheduler, `rl.serving`, fleet,
weight sync and control; `rl.worker` with worker, conversations and the client pool; the RolloutLog
and the manifests of weights. What is not: servers, network, disk's faults, trainer's arithmetic.
"""

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from intellect3.rendering import bytes as byte_format
from intellect3.rl import conducting, outside, roles
from intellect3.rl import orchestrator as orchestrator_role
from intellect3.rollouts import ports
from intellect3.rollouts import scheduler as scheduler_lib
from intellect3.simulation import clock
from intellect3.simulation.faults import (
  contracts,
  network,
  pools,
  processes,
  schedule,
  servers,
  strikes,
  trainer,
  truth,
  world,
)

HORIZON_SECONDS = 5000.0
"""More than any schedule takes; a run that is not over by then waits for what never comes."""
FELT_AT_ONCE = ("trainer_killed", "checkpoint_lost")
"""Faults that cannot strike without being felt; others tell of it themselves."""
MEMORY_DISK = pathlib.Path("/dev/shm")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a schedule.

  Attributes:
    seed: of the schedule.
    end: `trained`, `ended: ` and the run's reason, or what is wrong.
    ok: whether nothing is.
    seconds: virtual ones.
    happened: kinds of faults that struck.
    felt: of these, what somebody felt; and what else there was (`coverage`).
    trace: what happened, line by line.
  """

  seed: int
  end: str
  ok: bool
  seconds: float
  happened: Sequence[str]
  felt: Sequence[str]
  trace: Sequence[str]


class Lab:
  """The world of one schedule and the run in it."""

  def __init__(self, plan: schedule.Schedule, root: pathlib.Path) -> None:
    """Args: plan: see there. root: an empty directory."""
    self.plan, self.root = plan, root
    self.trace: list[str] = []
    self.ledger = contracts.Ledger(plan)
    self.loop = asyncio.get_running_loop()
    shape = plan.world
    self.disk = world.Disk(root, self.rng("disk"), self.note, self.felt)
    urls = [f"http://server_{n}:1" for n in range(shape.num_servers)]
    self.servers = {
      url: servers.Server(
        url,
        rng=self.rng(url),
        rate=20.0,
        room=shape.server_room,
        load_seconds=1.0,
        stages=shape.stages,
        tells_experts=shape.routed_experts,
        note=self.note,
        felt=self.felt,
      )
      for url in urls
    }
    self.network = network.Network(self.servers, self.rng("network"), self.note, self.felt)
    self.news = network.News(self.rng("news"), self.note, self.felt)
    self.unlisted: set[str] = set()
    self.life: processes.Life | None = None
    self.trainer = trainer.Trainer(
      shape, self.disk, self.ledger, tell=self._published, note=self.note
    )
    self._training: asyncio.Task[None] | None = None
    self.trainer_reason = ""
    self._nonces = 0

  def rng(self, name: str) -> random.Random:
    """Randomness of one part of the world."""
    return random.Random(truth.draw(self.plan.seed, name))

  def note(self, who: str, what: str) -> None:
    """A line of the trace."""
    text = f"{self.loop.time():10.4f} {who}: {what}"
    self.trace.append(text.replace(str(self.root), "RUN"))

  def felt(self, what: str) -> None:
    """Somebody felt a fault, or met something that a schedule may bring."""
    self.ledger.felt.add(what)

  # The run and who starts it.

  async def run(self) -> str:
    """Runs until all is trained or nobody starts it again; returns how it ended."""
    for fault in self.plan.faults:
      self.loop.call_at(fault.at, self._strike, fault)
    self.start_trainer()
    restarts, resume = self.plan.world.operator_restarts, False
    while True:
      reason = "" if self.trainer_reason else await self._live(resume)
      if self.ledger.breach is not None:
        raise self.ledger.breach
      resume = True
      if self.trainer_reason:
        reason = f"trainer: {self.trainer_reason}"
      if not reason:
        self.ledger.complete(self.trainer.steps_read)
        return "trained"
      self.note("lab", f"the orchestrator ended: {reason}")
      if reason != processes.KILLED:
        self.ledger.ended(reason)
        if restarts == 0 or self.trainer_reason:
          return f"ended: {reason}"
        restarts -= 1
        for server in self.servers.values():
          server.die()
          server.start("0", 0)
      await asyncio.sleep(3.0)

  async def _live(self, resume: bool) -> str:
    """One life of the orchestrator; returns why it ended, nothing where all is trained."""
    life = self.life = processes.Life(self, self._shared(resume))
    self.note("lab", "the orchestrator is started")
    parts = self._parts(life)
    beyond = outside.Outside(
      http=life.connection,
      weights=world.Weights(self.disk, life.point),
      log=world.Log(self.disk, self.ledger, life.point),
      servers=self._listed,
      reporter=world.Reporter(life.note),
      nonce=self.nonce,
    )
    life.task = asyncio.ensure_future(conducting.conduct(parts, beyond, life.open_door))
    try:
      await asyncio.wait([life.task])
    finally:
      await life.end()
    if not life.alive:
      return processes.KILLED
    error = life.task.exception()
    if error is None:
      return ""
    if not isinstance(error, ports.RunFailed | TimeoutError | OSError):
      raise error
    return f"{error}"

  def _parts(self, life: processes.Life) -> conducting.Parts:
    shape = self.plan.world
    built: list[conducting.Parts] = []
    orchestrator_role.orchestrator(
      life.shared,
      life.make_worker(0),
      prompts_per_step=shape.prompts_per_step,
      rollouts_per_prompt=shape.rollouts_per_prompt,
      max_rollouts_in_flight=shape.groups_in_flight * shape.rollouts_per_prompt,
      staleness_rule=shape.staleness_rule,
      deterministic=shape.deterministic,
      pools=pools.POOLS[shape.pools],
      sync_mode=shape.sync_mode,
      sync_transport=shape.sync_transport,
      sync_bucket_bytes=shape.bucket_bytes,
      weights_lag=shape.weights_lag,
      sync_timeout_seconds=15.0,
      sync_patience_seconds=20.0,
      evaluation_tasks=shape.evaluation_tasks,
      server_start_seconds=60.0,
      server_poll_seconds=2.0,
      server_patience_seconds=90.0,
      max_groups_in_vain=100,
      start=built.append,
    )()

    def make_scheduler(sizes: Mapping[str, int]) -> scheduler_lib.Scheduler:
      made = built[0].make_scheduler(sizes)
      life.scheduler = made
      return made

    return dataclasses.replace(built[0], make_scheduler=make_scheduler)

  def _shared(self, resume: bool) -> roles.Shared:
    shape = self.plan.world
    chat = world.Chat(
      shape.failing,
      shape.turns,
      contracts.tasks_of(shape),
      attempted=self.ledger.attempted,
      acted=self.ledger.acted,
      went_on=self.ledger.went_on,
      felt=self.felt,
    )
    return roles.Shared(
      run_dir=self.root,
      steps=shape.steps,
      seed=self.plan.seed,
      max_off_policy_steps=shape.max_off_policy_steps,
      model_path=self.root / "model",
      renderer=byte_format.ByteRenderer(),
      environments={chat.name: chat},
      environment_weights={chat.name: 1.0},
      resume=resume,
      num_workers=shape.num_workers,
      orchestrator_url="http://orchestrator:1",
      server_urls=tuple(self.servers),
      router=truth.ROUTER if shape.routed_experts else None,
    )

  def _listed(self) -> list[str]:
    if self.unlisted:
      self.felt("server_unlisted")
    return [url for url in self.servers if url not in self.unlisted]

  def nonce(self) -> str:
    """A word that nobody has said before."""
    self._nonces += 1
    return f"{self._nonces:08d}"

  # The trainer.

  def start_trainer(self) -> None:
    """Starts it, from its last checkpoint."""
    self.note("trainer", "is started")
    self._training = asyncio.ensure_future(self.trainer.run())
    self._training.add_done_callback(self._trainer_ended)

  def _trainer_ended(self, task: asyncio.Task[None]) -> None:
    if task.cancelled() or task.exception() is None:
      return
    error = task.exception()
    assert error is not None
    if not isinstance(error, ValueError | OSError):
      self.loop.call_exception_handler({"message": "trainer", "exception": error})
    self.trainer_reason = f"{error}".replace(str(self.root), "RUN") or type(error).__name__
    if self.life is not None:
      self.life.kill("the trainer has ended")

  def kill_trainer(self, seconds: float) -> bool:
    """Ends its process; another is started later. Returns whether there was one."""
    if self._training is None or self._training.done():
      return False
    self._training.cancel()
    self.loop.call_later(seconds, self.start_trainer)
    return True

  def _published(self, version: int) -> None:
    self.news.tell(self._hear_version, version, "version")

  def _hear_version(self, version: int) -> None:
    if self.life is not None and self.life.alive:
      self.life.version_published(version)

  def batch_committed(self, step: int) -> None:
    """The orchestrator tells the trainer of a batch."""
    self.news.tell(self.trainer.batch_committed, step, "batch")

  # Faults.

  def _strike(self, fault: schedule.Fault) -> None:
    if strikes.strike(self, fault):
      self.ledger.happened.add(fault.kind)
      if fault.kind in FELT_AT_ONCE:
        self.ledger.felt.add(fault.kind)
      self.note("fault", str(fault))


def run(seed: int) -> Outcome:
  """Runs the schedule of a seed."""
  return run_plan(schedule.draw(seed))


def run_plan(plan: schedule.Schedule) -> Outcome:
  """Runs a schedule. The same one gives the same outcome, trace and all, in every process."""
  labs: list[Lab] = []

  async def main(root: pathlib.Path) -> tuple[str, float]:
    labs.append(Lab(plan, root))
    with _logged(labs[0]):
      end = await labs[0].run()
    return end, labs[0].loop.time()

  memory = MEMORY_DISK if MEMORY_DISK.is_dir() else None
  with tempfile.TemporaryDirectory(prefix="fault_lab_", dir=memory) as name:
    root = pathlib.Path(name)
    seconds, ok = HORIZON_SECONDS, False
    try:
      end, seconds = clock.run(main(root), horizon=HORIZON_SECONDS)
      ok = True
    except contracts.Breach as breach:
      end = f"breach: {breach}"
    except clock.Stuck as stuck:
      end = f"stuck: {str(stuck).splitlines()[0]}"
    except Exception as error:
      end = f"error: {type(error).__name__}: {error}"
    end = end.replace(name, "RUN")
  lab = labs[0]
  if lab.ledger.breach is not None:
    ok, end = False, f"breach: {lab.ledger.breach}"
  return Outcome(
    plan.seed, end, ok, seconds, sorted(lab.ledger.happened), sorted(lab.ledger.felt), lab.trace
  )


@contextlib.contextmanager
def _logged(lab: Lab) -> Iterator[None]:
  """What production code logs goes into the trace, and nowhere else."""

  class ToTrace(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      lab.note("log", record.getMessage())

  logger, handler = logging.getLogger("intellect3"), ToTrace()
  before = logger.propagate, logger.level
  logger.addHandler(handler)
  logger.propagate = False
  logger.setLevel(logging.INFO)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.propagate, level = before
    logger.setLevel(level)
