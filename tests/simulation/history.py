"""A world in which nothing happens by itself: each event is told, by Hypothesis or by a test.

The orchestrator, its scheduler, and what brings weights to servers (`rl.serving`, fleet, weight
sync) are the production ones, on a virtual clock. Workers, servers, trainer and disk are doubles
that wait to be told what comes next. A ledger keeps a second book of all that passes by, and every
event is a line of a trace.
"""

import asyncio
import dataclasses
import itertools
import json
import types as python_types

import msgspec

from intellect3.inference import fleet
from intellect3.rl import serving
from intellect3.rollouts import credit, difficulty, filters, orchestrator, scheduler
from intellect3.simulation import clock
from tests.simulation import history_rules, history_servers
from tests.simulation.history_ledger import Ledger
from tests.simulation.history_records import Config
from tests.simulation.history_tasks import POOLS, SEED, Broken, expect

POLL = 20.0  # between two looks at the servers and at their list
CALL = 90.0  # how long a call to a server may take

SERVING = serving.Settings(
  sync_mode="in_place",
  transport="disk",
  bucket_bytes=1,
  canary_bound=0.5,
  verify_fingerprints=True,
  start_seconds=history_rules.START,
  timeout_seconds=CALL,
  fleet=fleet.Settings(poll_seconds=POLL, lost_after=1),
)


class World:
  """See the module's docstring; the methods without a leading underscore are its events."""

  def __init__(self, config=None, *, workers=1, servers=1, make=scheduler.Scheduler):
    self.config = config or Config()
    self.ledger = Ledger(self.config)
    self.names = [f"worker_{index}" for index in range(workers)]
    self.doubles = {
      url: history_servers.ServerDouble(url)
      for url in (f"http://{index}" for index in range(servers))
    }
    self.weights = history_servers.Published()
    self._nonces = itertools.count()
    self._lives = itertools.count()
    self._make = make
    self.lines, self._row = [], ""
    self.loop = clock.VirtualLoop()
    self.disk, self.total, self.distrusted = [], 0, []  # manifests as JSON; rollouts dispatched
    self.published, self.untrained = 0, []
    self._start()

  # The run, and what it sees.

  def _start(self):
    self.links, self.ghosts, self.echoes = {}, [], []
    self.phase, self.excuse, self._found = "", None, None
    self.landing = self.planned = None  # under way: manifest, batch
    self.syncing, self.told = False, None
    self.none_since, self._woken = {}, asyncio.Event()
    self.since = self.loop.time()
    self.made = {}  # rollout -> (server, load of its weights)
    self.ledger.begin()
    for double in self.doubles.values():
      double.used, double.good, double.ended, double.barred = False, None, (), ""
    self._before = json.loads(self.disk[-1])["scheduler_state"] if self.disk else None
    self.machine = orchestrator.Orchestrator(
      make_scheduler=self._scheduler,
      ports=orchestrator.Ports(
        next_version=self._next_version,
        sync=self._sync,
        commit=self._commit,
        batch_committed=lambda step: self.untrained.append(step),
        dispatched=self._dispatched,
        distrusted=lambda url, version: self.distrusted.append((url, version)),
        report=lambda step, row: None,
        report_evaluation=self._evaluated,
        server_metrics=lambda: self.serving.metrics(),
        status=self._status,
      ),
      num_workers=len(self.names),
      steps=self.config.steps,
      seed=SEED,
      server_patience_seconds=history_rules.PATIENCE,
      worker_patience_seconds=history_rules.PATIENCE,
      evaluation_tasks=self.config.evaluation,
      scheduler_state=self._before,
      dispatched=self.total,
      distrusted=tuple(self.distrusted),
      lives=next(self._lives),
    )
    self.wires = history_servers.Wires(self.doubles)
    self.serving = serving.Serving(
      python_types.SimpleNamespace(
        server_urls=tuple(self.doubles),
        renderer=python_types.SimpleNamespace(vocab_size=8),
        router=None,
      ),
      self.wires,
      dataclasses.replace(SERVING, sync_mode=self.config.mode),
      self,
      weights=self.weights,
      wanted=lambda: [url for url, double in self.doubles.items() if double.listed],
      nonce=lambda: f"nonce-{next(self._nonces)}",
    )
    self.task = self.loop.create_task(self._run())
    self.act("the orchestrator starts")

  async def _run(self):
    await self.serving.start()
    await self.machine.run()

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
    pools = difficulty.Pools()
    if POOLS[config.pools] is not None:
      easy, hard = POOLS[config.pools]
      pools = difficulty.Pools(
        easy_threshold=1.0, hard_threshold=0.0, easy_fraction=easy, hard_fraction=hard
      )
    sampler = difficulty.TaskSampler(sizes, dict.fromkeys(sizes, 1.0), pools, SEED)
    kept = filters.Filters(zero_advantage=config.drop_zero, truncated=config.drop_truncated)
    if config.decay is None:
      return self._make(settings, sampler, kept, credit.Credit())
    moving = credit.MovingBaseline(decay=config.decay)
    return self._make(settings, sampler, kept, credit.Credit(advantage_fn=moving))

  def _stop(self):
    """The process is gone, with all it knew."""
    self.wires.cut = True
    self.task.cancel()
    ends = asyncio.gather(self.task, self.serving.close(), return_exceptions=True)
    self.loop.run_until_complete(ends)
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
    while True:
      newest, lag, steps = self.published, self.config.lag, self.config.steps
      served = serving.served_version(newest, lag=lag, steps=steps)
      due = newest if newest == steps else max(newest - lag, 0)
      expect(served == due, f"v{newest} is published and v{served} is to be served, due {due}")
      if served > version:
        return served
      self._woken.clear()
      await self._woken.wait()

  async def _sync(self, version):
    if self.ledger.begun < 0:  # what a life before left paused goes on before anything else
      held = [d.url for d in self.doubles.values() if d.up and d.paused and not d.ended]
      expect(not held, f"{held} are still paused from a life before")
    self.syncing, self.ledger.begun = True, version
    self.tell(f" sync of v{version}")
    try:
      report = await self.serving.sync(version)
    finally:
      self.syncing = False
    self.tell(f" sync of v{version} is over: {list(report.healthy)} have it")
    if report.fenced and not report.healthy and not report.lost:
      self.excuse = self.excuse or "no server is left after the sync"
    return report

  def _evaluated(self, version, row):
    self.tell(f" evaluation of v{version}: {row}")
    self.ledger.exams.reported(version, row, self.ledger.served)

  # What the fleet tells (`inference.fleet.Watcher`): noted, judged and passed on.

  def servers(self, versions):
    """See Watcher."""
    self._passing(self._servers, dict(versions))

  def _servers(self, told):
    self.tell(f" servers that may be used: {told}")
    before, self.told = self.told or {}, told
    expect(len(set(told.values())) <= 1, f"servers of several versions may be used: {told}")
    for url, version in told.items():
      double = self.doubles[url]
      known = before.get(url) == version  # it may be gone since, unseen
      sound = double.good == version and not double.paused
      expect(known or sound, f"{url} may be used with v{version} and has {double}")
      double.used, double.barred = double.used or double.up, ""
      if not known:
        double.load_of[version] = double.loads
      self.ledger.fenced.pop(url, None)
    if told:
      self.none_since.pop("server", None)
    else:
      self.none_since.setdefault("server", self.loop.time())
    self.ledger.serve(max(told.values(), default=-1))
    self.machine.servers(told)

  def loads(self, loads):
    """See Watcher."""
    self._passing(self.machine.loads, loads)

  def failed(self, url, version, reason, *, for_good):
    """See Watcher."""
    self._passing(self._failed, url, version, reason, for_good)

  def _failed(self, url, version, reason, for_good):
    double, fenced = self.doubles[url], self.ledger.fenced
    double.used, double.good = False, None
    double.barred = "fenced" if for_good else "lost"
    self.tell(f" {url} is {double.barred}, as of v{version}")
    fenced[url] = min(version, fenced.get(url, version))
    self.ledger.lost(self.ledger.made_by(url, version))
    self.machine.failed(url, version, reason, for_good=for_good)
    self.ledger.distrust(url, version)

  def _passing(self, act, *arguments):
    try:
      act(*arguments)
    except Exception as error:  # kept: who calls may have nobody to tell of it
      self._found = self._found or error
      raise

  async def _commit(self, manifest):
    attempt, asked = self.planned
    shards = {shard.file for shard in manifest.shards}
    due = {f"{name}_{attempt}" for name in asked}
    expect(shards == due, f"batch {manifest.step} is committed with {shards}, asked were {due}")
    items = [item for message in asked.values() for item in message.items]
    oldest = {message.oldest_version for message in asked.values()}
    self.tell(f" manifest of batch {manifest.step}: {[item.rollout_id for item in items]}")
    for url, load in [made for item in items for made in self.made[item.rollout_id]]:
      sound = load in self.doubles[url].sound
      expect(sound, f"batch {manifest.step} is made of weights that {url} was not checked with")
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
    if self.planned is None or self.planned[0] != message.attempt:
      self.planned = message.attempt, {}
    self.planned[1][name] = message

  # Every event is an `act`.

  def tell(self, line):
    """A line of the trace; one that begins with a blank is of what follows from an event."""
    self.lines.append(f"{'':14}-> {line[1:]}" if line.startswith(" ") else line)

  def tell_of(self, what, line):
    """The same, in one line with what was just told of the same thing."""
    if self.lines and f"-> {what[1:]}" in self.lines[-1]:
      self.lines[-1] += f", {line}"
    else:
      self.tell(f"{what}{line}")

  def act(self, line, function=None, *arguments, seconds=0):
    """One event: what is done, how long it takes, all that follows from it, and then the rules."""
    self.tell(line)
    place = len(self.lines) - 1

    async def settle():
      if function is not None:
        function(*arguments)
      self._woken.set()
      if seconds:
        await asyncio.sleep(seconds)
      while True:
        await asyncio.sleep(0)
        if not self.loop._ready:
          return

    try:
      self.loop.run_until_complete(settle())
      self.loop.check()
      if self._found is not None:
        raise self._found
      history_rules.check(self)
    except Exception as error:
      self._stamp(place)
      reason = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
      raise Broken(self.story(reason)) from error
    self._stamp(place)

  def _stamp(self, place):
    version = f"v{self.ledger.version}" if self.ledger.version >= 0 else ""
    line = f"{self.loop.time():6.0f} s  {version:<3}   {self.lines[place]}"
    counts = {key: count for key, count in self.counts().items() if count}
    total = counts.pop("dispatched", 0)
    row = " + ".join(f"{count} {key.replace('_', ' ')}" for key, count in counts.items())
    if row != self._row:
      line = f"{line:<72}  {total} = {row}"
    self._row = row
    self.lines[place] = line

  def trace(self):
    """The history so far: second, newest weights, event and what followed from it.

    Where it changed: how many rollouts were dispatched, and what became of them.
    """
    run = f"{len(self.names)} workers, {len(self.doubles)} servers; {self.config}"
    head = f"{'time':>8}  {'has':<4}  what happens, and what the orchestrator does -> then"
    return "\n".join([run, head, *self.lines])

  def story(self, reason, *more):
    """The whole of it, for people."""
    return "\n".join([f"{reason}\n\n{self.trace()}\n{'':14}BROKEN: {reason}", *more])

  def counts(self):
    machine = self.machine._scheduler
    return machine.accounting.counts() if machine is not None else {}

  @property
  def over(self):
    return self.task.done()

  @property
  def done(self):
    """Whether the run has come to its end, or has no tasks left to come there."""
    return self.over and (self.task.exception() is None or history_rules.exhausted(self))
