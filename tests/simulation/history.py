"""A world in which nothing happens by itself: each event is told, by Hypothesis or by a test.

The orchestrator and its scheduler are the production ones, on a virtual clock. Workers, servers,
trainer and disk are doubles that wait to be told what comes next. A ledger keeps a second book of
all that passes by, and every event is a line of a trace.
"""

import asyncio
import json

import msgspec

from intellect3.rollouts import credit, difficulty, filters, messages, orchestrator, scheduler
from intellect3.simulation import clock
from tests.rollouts.world import Sync
from tests.simulation.history_ledger import Broken, Config, Ledger, expect

PATIENCE = 100.0
SIZES = {"coin/train": 40, "word/train": 7}


def is_written(message):
  return isinstance(message, messages.BatchWritten)


class WorkerDouble:
  """A connected worker: what it runs, holds, has yet to write and has said but was not heard."""

  def __init__(self, name, world):
    self.name = name
    self._world = world
    self.running, self.held = set(), set()
    self.writes, self.unheard = [], []

  @property
  def runs(self):
    """What the orchestrator must believe that it runs."""
    said = {message.rollout_id for message in self.unheard if not is_written(message)}
    attempts = self._world.ledger.attempts
    return self.running | {key for key in said if attempts[key].fate == "running"}

  def post(self, message):
    match message:
      case messages.Dispatch(rollout_id=key):
        load = {name: len(link.runs) for name, link in self._world.links.items()}
        self.running.add(key)
        self._world.tell(f"  {self.name}: run {key} of group {message.group_id}")
        self._world.ledger.started(message, self.name, load)
      case messages.Cancel(rollout_ids=keys):
        self.running -= set(keys)
        self.held -= set(keys)
        self._world.tell(f"  {self.name}: cancel {list(keys)}")
      case messages.Forget(rollout_ids=keys):
        self._world.tell(f"  {self.name}: forget {list(keys)}")
        expect(self.held >= set(keys), f"{self.name} holds {self.held}, is to forget {keys}")
        self.held -= set(keys)
        self._world.ledger.forgotten(keys)
      case messages.WriteBatch():
        keys = [item.rollout_id for item in message.items]
        self._world.tell(f"  {self.name}: write {keys} of batch {message.step}")
        expect(self.held >= set(keys), f"{self.name} holds {self.held}, is to write {keys}")
        expect(self._world.syncing is None, "a batch is planned while weights are synced")
        self.writes.append(message)
        self._world.asked(self.name, message)
      case messages.Servers(versions=versions):
        due = self._world.told
        expect(dict(versions) == due, f"{self.name} is told of {versions}, due {due}")


class World:
  """See the module's docstring; the methods without a leading underscore are its events."""

  def __init__(self, config=None, *, workers=1, servers=1, make=scheduler.Scheduler):
    self.config = config or Config()
    self.ledger = Ledger(self.config)
    self.names = [f"worker_{index}" for index in range(workers)]
    self.urls = [f"http://{index}" for index in range(servers)]
    self._make = make
    self.lines = []
    self.loop = clock.VirtualLoop()
    self.disk, self.total = [], 0  # manifests as JSON; rollouts dispatched
    self.published, self.untrained = 0, []
    self._start()

  # The run, and what it sees.

  def _start(self):
    self.links, self.ghosts = {}, []
    self.phase, self.excuse = "", None
    self.syncing = self.landing = self._asked = None  # under way: sync, manifest, batch
    self.served = dict.fromkeys(self.urls, -1)  # -1 joins, None is lost or fenced
    self.target, self.told = None, None
    self._alone_since, self._woken = {}, asyncio.Event()
    self.ledger.begin()
    self._before = json.loads(self.disk[-1])["scheduler_state"] if self.disk else None
    self.machine = orchestrator.Orchestrator(
      make_scheduler=self._scheduler,
      ports=orchestrator.Ports(
        next_version=self._next_version,
        sync=self._sync,
        commit=self._commit,
        batch_committed=lambda step: self.untrained.append(step),
        dispatched=self._dispatched,
        distrusted=lambda url, version: None,
        report=lambda step, row: None,
        report_evaluation=lambda version, row: None,
        server_metrics=dict,
        status=self._status,
      ),
      num_workers=len(self.names),
      steps=self.config.steps,
      seed=0,
      server_patience_seconds=PATIENCE,
      worker_patience_seconds=PATIENCE,
      scheduler_state=self._before,
      dispatched=self.total,
    )
    self.task = self.loop.create_task(self.machine.run())
    self.act("the orchestrator starts")

  def _scheduler(self, sizes):
    config = self.config
    settings = scheduler.Settings(
      steps=config.steps,
      prompts_per_step=config.prompts,
      rollouts_per_prompt=config.group,
      max_off_policy_steps=config.off_policy,
      max_rollouts_in_flight=config.in_flight,
      staleness_rule=config.rule,
      batch_order=config.order,
    )
    pools = {"easy_threshold": 1.0, "hard_threshold": 0.0, "hard_fraction": 0.5}
    sampler = difficulty.TaskSampler(
      sizes,
      dict.fromkeys(sizes, 1.0),
      difficulty.Pools(**pools, easy_fraction=0.2) if config.pools else difficulty.Pools(),
      0,
    )
    kept = filters.Filters(zero_advantage=config.drop_zero, truncated=config.drop_truncated)
    if config.decay is None:
      return self._make(settings, sampler, kept, credit.Credit())
    moving = credit.MovingBaseline(decay=config.decay)
    return self._make(settings, sampler, kept, credit.Credit(advantage_fn=moving))

  async def _sleep(self, seconds):
    await asyncio.sleep(seconds)

  def _stop(self):
    """The process is gone, with all it knew."""
    self.excuse = None
    self.task.cancel()
    self.loop.run_until_complete(asyncio.gather(self.task, return_exceptions=True))
    self.loop.fault = None

  def close(self):
    """Ends the loop."""
    self._stop()
    self.loop.close()

  def _status(self, phase, detail):
    self.phase = phase

  def _dispatched(self, total):
    self.total = total

  async def _next_version(self, version):
    while self.published <= version:
      self._woken.clear()
      await self._woken.wait()
    return self.published

  async def _sync(self, version):
    self.target = version
    trying = [url for url, has in self.served.items() if has is not None]
    self.syncing = {url: None for url in trying}
    self.tell(f"  sync of v{version} to {trying}")
    while None in self.syncing.values():
      self._woken.clear()
      await self._woken.wait()
    ends, self.syncing = self.syncing, None
    of = lambda end: tuple(url for url, how in ends.items() if how == end)  # noqa: E731
    if of("fenced") and not of("ok") and not of("lost"):
      self.excuse = "no server is left after the sync"
    return Sync(healthy=of("ok"), lost=of("lost"), fenced=dict.fromkeys(of("fenced"), "canary"))

  async def _commit(self, manifest):
    attempt, asked = self._asked
    shards = {shard.file for shard in manifest.shards}
    due = {f"{name}_{attempt}" for name in asked}
    expect(shards == due, f"batch {manifest.step} is committed with {shards}, asked were {due}")
    items = [item for message in asked.values() for item in message.items]
    oldest = {message.oldest_version for message in asked.values()}
    self.tell(f"  manifest of batch {manifest.step}: {[item.rollout_id for item in items]}")
    self.ledger.committed(manifest, items, oldest.pop())
    self.landing, self._manifest = self.loop.create_future(), manifest
    await self.landing
    self._land()

  def _land(self):
    self.disk.append(msgspec.json.encode(self._manifest))
    self.ledger.has_landed()
    self.landing = None

  def asked(self, name, message):
    """A worker was asked for its shard."""
    if self._asked is None or self._asked[0] != message.attempt:
      self._asked = message.attempt, {}
    self._asked[1][name] = message

  # Every event is an `act`.

  def tell(self, line):
    self.lines.append(line)

  def act(self, line, function=None, *arguments):
    """One event: what is done, all that follows from it, and then the rules."""
    self.tell(line)
    place = len(self.lines) - 1

    async def settle():
      if function is not None:
        function(*arguments)
      self._woken.set()
      while True:
        await asyncio.sleep(0)
        if not self.loop._ready:
          return

    try:
      self.loop.run_until_complete(settle())
      self.loop.check()
      self._check()
    except Exception as error:
      self._stamp(place)
      reason = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
      raise Broken(f"{reason}\n\n{self.trace()}\nBROKEN: {reason}") from error
    self._stamp(place)

  def _stamp(self, place):
    row = " ".join(f"{key[:2]}={count}" for key, count in self.counts().items() if count)
    state = f"{self.loop.time():5.0f} s  v{self.ledger.version}  {row}"
    self.lines[place] = f"{state:<48}  {self.lines[place]}"

  def trace(self):
    """The history so far: second, newest version, accounting, event; what followed is indented."""
    return "\n".join([f"{self.config}", *self.lines])

  def counts(self):
    machine = self.machine._scheduler
    return machine.accounting.counts() if machine is not None else {}

  @property
  def over(self):
    return self.task.done()

  @property
  def done(self):
    """Whether the run has come to its end, and not to a failure."""
    return self.over and self.task.exception() is None

  def _check(self):
    if self.over:
      error = self.task.exception()
      if error is None:
        expect(self.ledger.now.next_step > self.config.steps, "the run ends before its last step")
        return expect(self.counts()["in_flight"] == 0, f"the run ends with {self.counts()}")
      known = self.excuse is not None and self.excuse in str(error)
      return expect(known, f"the run ends: {type(error).__name__}: {error}; due {self.excuse}")
    expect(self.excuse is None, f"the run goes on, due was its end: {self.excuse}")
    counts, ledger = self.counts(), self.ledger
    if counts:
      version = self.machine._scheduler.version
      expect(version == ledger.version, f"the version is {version}, due {ledger.version}")
    if not counts or self.phase not in ("training", "done"):
      return None
    if ledger.now.next_step <= self.config.steps:
      ledger.check_accounting(counts)
      expect(counts["dispatched"] == self.total, f"{self.total} were noted, {counts} dispatched")
    self._check_workers()
    if self.links and self.told:
      expect(not ledger.may_dispatch(), "a group may be dispatched, and is not")
    if self.links and self.syncing is None and not self._writing():
      ready = ledger.batchable() if ledger.now.next_step <= self.config.steps else []
      expect(len(ready) < self.config.prompts, f"groups {ready} could be batched, and are not")
    return None

  def _writing(self):
    if self.landing is not None:
      return True
    attempt = self._asked[0] if self._asked else None
    for link in self.links.values():
      unheard = [message for message in link.unheard if is_written(message)]
      if any(message.attempt == attempt for message in [*link.writes, *unheard]):
        return True
    return False

  def _check_workers(self):
    if self.ledger.now.next_step > self.config.steps:
      return
    fates = {key: attempt.fate for key, attempt in self.ledger.attempts.items()}
    for name, link in self.links.items():
      held = {key for key in link.held - link.runs if fates[key] != "trained" or not self.landing}
      due = {key for key in held if fates[key] == "finished"}
      expect(held == due, f"{name} holds {held - due}, which nobody needs any more")
      told = self.machine._holdings.load[name]
      runs = len(link.runs)
      expect(told == runs, f"{name} runs {runs}, the orchestrator thinks {told}")
