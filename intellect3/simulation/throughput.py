"""The throughput simulator: the production orchestrator on a simulated cluster.

Orchestrator, Scheduler, pools, filters, credit, accounting, reports, the fleet's sync and the
clients' balancing are the production objects. Simulated are the servers (`server`), the workers'
conversations (`attempts`, `workers`), the trainer and its weights (`trainer`). Everything happens
on `clock`'s virtual time.
"""

import asyncio
import contextlib
import gc
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from intellect3 import rollout_log, types
from intellect3.inference import balance, fleet, weight_sync
from intellect3.rl import serving
from intellect3.rollouts import difficulty, messages, orchestrator, scheduler
from intellect3.simulation import (
  attempts,
  clock,
  cluster,
  report,
  scenario,
  traffic,
  trainer,
  watching,
  window,
  workers,
)
from intellect3.simulation import settings as settings_lib

HORIZON_SECONDS = 1e10
"""Beyond which the clock's floats can no longer tell a microsecond."""
MOST_SAMPLES = 100_000
"""Of a timeline: then every other one is dropped, and they are taken half as often."""


def simulate(
  run: settings_lib.RunSettings,
  given: scenario.Scenario,
  *,
  trace: Callable[[str], Any] | None = None,
  progress: Callable[[int, float], None] | None = None,
  warm_up_steps: int | None = None,
  sample_seconds: float | None = None,
) -> dict[str, Any]:
  """Simulates a run to its last step.

  Args:
    run: its settings.
    given: the cluster and what is attempted.
    trace: takes the lines of the event trace.
    progress: is told of each step and the virtual seconds so far.
    warm_up_steps: that the report's figures leave out; None for four times `max_off_policy_steps`,
      at least one and at most half of the run.
    sample_seconds: virtual seconds between two entries of the report's timeline, more where it
      would get longer than `MOST_SAMPLES`; None for no timeline.

  Returns:
    The report, JSON-able: `report.make` says what is in it.

  Raises:
    ValueError: run and scenario do not fit together.
    clock.Stuck: nothing would ever happen again, or not before `HORIZON_SECONDS`.
    ports.RunFailed: the run ends with a reason.
  """
  _check(run, given)
  warm_up = min(run.settling_steps, run.steps // 2)
  if warm_up_steps is not None:
    warm_up = warm_up_steps
  if sample_seconds is not None and not sample_seconds >= 1e-3:
    raise ValueError(f"sample_seconds: expected at least 0.001, got {sample_seconds:g}")
  if not 0 <= warm_up < run.steps:
    raise ValueError(f"warm_up_steps: expected fewer than steps ({run.steps}), got {warm_up}")
  with _rare_collections():
    simulation = _Simulation(run, given, trace, progress, warm_up, sample_seconds)
    return clock.run(simulation.run(), horizon=HORIZON_SECONDS)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
  """Hardly looks for garbage in cycles: there is none to speak of, and looking takes long."""
  before = gc.get_threshold()
  gc.set_threshold(2_000_000, 50, 50)
  try:
    yield
  finally:
    gc.set_threshold(*before)


def _check(run: settings_lib.RunSettings, given: scenario.Scenario) -> None:
  if 0 < given.servers.cache_tokens < run.max_tokens:
    raise ValueError(
      f"servers.cache_tokens: expected 0 (no bound) or at least the run's max_tokens "
      f"({run.max_tokens}), got {given.servers.cache_tokens}"
    )
  sync = given.sync
  shortest = sync.pause_seconds + sync.load_seconds + sync.resume_seconds + sync.canary_seconds
  patience = max(run.sync_patience_seconds, 3.0 * shortest)
  if shortest + sync.spread_seconds >= patience:
    raise ValueError(
      f"sync.spread_seconds: expected less than {patience - shortest:g}, the time after which the "
      f"run gives up a server, got {sync.spread_seconds:g}"
    )


class _Simulation:
  """The parts of one simulation, wired."""

  def __init__(
    self,
    run: settings_lib.RunSettings,
    given: scenario.Scenario,
    trace: Callable[[str], Any] | None,
    progress: Callable[[int, float], None] | None,
    warm_up: int,
    sample_seconds: float | None,
  ) -> None:
    self._run = run
    self._given = given
    self._trace = trace
    self._progress = progress
    self._warm_up = warm_up
    self._sample_seconds = sample_seconds
    self._begun: window.Mark | None = None
    self._done: window.Mark | None = None
    self._told_loads = 0.0
    self._samples: list[tuple[float, list[int], list[int], int]] = []

  async def run(self) -> dict[str, Any]:
    run, given = self._run, self._given
    self._loop = asyncio.get_running_loop()
    self._watch = watch = watching.Watch(
      group_size=run.scheduler.rollouts_per_prompt,
      trace=self._trace,
      timeout_seconds=run.timeout_seconds,
    )
    self._cluster = cluster.Cluster(given, run.segment_tokens, run.sync_mode == "retract", watch)
    self._servers = self._cluster.servers
    self._traffic = traffic.Traffic()
    learner = trainer.Trainer(
      given.trainer,
      lambda newest: serving.served_version(newest, lag=run.weights_lag, steps=run.steps),
      watch,
    )
    self._machine = orchestrator.Orchestrator(
      make_scheduler=self._make_scheduler,
      ports=orchestrator.Ports(
        next_version=learner.next_version,
        sync=self._sync,
        commit=lambda manifest: self._commit(learner, manifest),
        batch_committed=lambda step: self._committed(learner, step),
        dispatched=lambda total: None,
        distrusted=lambda url, version: None,
        report=self._report,
        report_evaluation=lambda version, row: watch.event("evaluated", version=version, **row),
        server_metrics=self._cluster.metrics,
        status=lambda phase, detail: watch.event("status", phase=phase),
      ),
      num_workers=max(1, run.num_workers),
      steps=run.steps,
      seed=run.scheduler.seed,
      server_patience_seconds=run.server_patience_seconds,
      worker_patience_seconds=run.worker_patience_seconds,
      evaluation_tasks=run.evaluation_tasks,
    )
    self._fleet = fleet.Fleet(
      self._cluster,  # type: ignore[arg-type]  # the two calls that a fleet makes
      bring=self._cluster.bring,
      wanted=lambda: list(self._servers),
      watcher=self._machine,
      settings=fleet.Settings(
        poll_seconds=run.server_poll_seconds, patience_seconds=run.sync_patience_seconds
      ),
    )
    self._journal: workers.Journal = {}
    self._balancers = self._make_balancers()
    self._drawn = attempts.Attempts(
      given,
      list(run.environment_weights),
      max_new_tokens=run.max_new_tokens,
      max_tokens=run.max_tokens,
    )
    self._links = [self._connected(index) for index in range(max(1, run.num_workers))]
    beside = [asyncio.ensure_future(task) for task in self._beside()]
    learning = asyncio.ensure_future(learner.run(run.steps))
    both = asyncio.ensure_future(asyncio.gather(self._machine.run(), learning))
    try:
      ends: list[asyncio.Future[Any]] = [both, *beside]
      await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
      for task in beside:
        if task.done():  # it only ends where it fails
          task.result()
      await both
    finally:
      both.cancel()
      await asyncio.gather(both, return_exceptions=True)
      for task in (*beside, learning):
        task.cancel()
      await asyncio.gather(*beside, learning, return_exceptions=True)
      for link in self._links:
        link.close()
      await self._fleet.close()
    return self._made()

  def _made(self) -> dict[str, Any]:
    assert self._begun is not None and self._done is not None
    return report.make(
      self._run,
      self._given,
      watch=self._watch,
      begun=self._begun,
      done=self._done,
      warm_up=self._warm_up,
      samples=self._samples,
      counts=self._scheduler.accounting.counts(),
      events={
        "traced": self._watch.events,
        "messages": self._traffic.messages.total(),
        "servers": sum(one.events for one in self._servers.values()),
      },
    )

  def _beside(self) -> Iterator[Coroutine[Any, Any, None]]:
    """What goes on as long as the run does."""
    failures = self._given.failures
    self._watched = len(self._balancers) > 1 or failures.server_mean_seconds > 0
    if self._watched:
      yield self._fleet.watch()
    if failures.server_mean_seconds:
      yield from (self._cluster.lose(url) for url in self._servers)
    if failures.worker_mean_seconds:
      yield from (self._lose_worker(index) for index in range(len(self._links)))
    if self._sample_seconds is not None:
      yield self._sample(self._sample_seconds)

  def _make_balancers(self) -> list[balance.Balancer]:
    run, count = self._run, max(1, self._run.num_workers)
    sharing = count if self._given.clients.shared_balance else 1
    return [
      balance.Balancer(
        (),
        run.max_concurrency * sharing,
        max_waiting=10_000 * sharing,
        max_wait_seconds=run.wait_seconds,
        spill=run.spill_requests,
      )
      for _ in range(count // sharing)
    ]

  def _connected(self, index: int) -> workers.Worker:
    """A worker that the orchestrator hears of now."""
    run, given = self._run, self._given
    sizes = dict(run.sizes)
    for name in run.environment_weights:
      if tasks := given.environment(name).tasks:
        sizes[f"{name}/train"] = tasks
    link = workers.Worker(
      f"worker_{index}",
      sizes=sizes,
      drawn=self._drawn,
      balancer=self._balancers[index % len(self._balancers)],
      # Where workers are lost, whoever is there must pass it on to the balancer that all share.
      hears=index < len(self._balancers) or given.failures.worker_mean_seconds > 0,
      servers=self._servers,
      send=self._received,
      traffic=self._traffic,
      watch=self._watch,
      journal=self._journal,
      message_seconds=given.clients.message_seconds,
      write_seconds_per_token=given.clients.write_seconds_per_token,
    )
    self._traffic.count(link.hello())
    self._machine.connected(link, link.hello())
    return link

  async def _lose_worker(self, index: int) -> None:
    """Loses a worker from time to time, for ever."""
    name, failures = f"worker_{index}", self._given.failures

    def lose() -> None:
      self._links[index].lose()
      self._watch.event("worker_lost", worker=name)
      self._machine.disconnected(name)

    def restore() -> None:
      self._watch.event("worker_back", worker=name)
      self._links[index] = self._connected(index)

    rng = random.Random(f"{self._given.seed}/failures/{name}")
    await cluster.losing(
      rng, failures.worker_mean_seconds, failures.worker_repair_seconds, lose, restore
    )

  def _make_scheduler(self, sizes: Mapping[str, int]) -> scheduler.Scheduler:
    run = self._run
    sampler = difficulty.TaskSampler(sizes, run.environment_weights, run.pools, run.scheduler.seed)
    self._scheduler = scheduler.Scheduler(run.scheduler, sampler, run.group_filters, run.credit)
    self._scheduler.accounting = watching.Ledger(self._watch)
    return self._scheduler

  def _received(self, name: str, message: messages.FromWorker) -> None:
    if isinstance(message, messages.RolloutSummary):
      self._watch.finished(message)
    self._machine.received(name, message)

  async def _commit(self, learner: trainer.Trainer, manifest: types.Manifest) -> None:
    rollout_log.check_manifest(manifest, manifest.step)
    self._watch.event("committed", step=manifest.step, loss_tokens=manifest.loss_tokens)
    await learner.commit(manifest)

  def _report(self, step: int, row: Mapping[str, float]) -> None:
    self._watch.rows[step] = dict(row)
    if self._progress is not None:
      self._progress(step, self._loop.time())

  def _committed(self, learner: trainer.Trainer, step: int) -> None:
    learner.batch_committed(step)
    self._watch.committed(step)
    if not self._watched:
      self._count_loads()
    if step == self._warm_up:
      self._begun = self._mark()
    if step == self._run.steps:
      self._done = self._mark()

  def _mark(self) -> window.Mark:
    return window.mark(
      self._loop.time(),
      servers=self._servers.values(),
      counts=self._scheduler.accounting.counts(),
      watch=self._watch,
      traffic=self._traffic,
    )

  def _count_loads(self) -> None:
    """Workers that share a balancer need not be told of loads: counts what they would be told."""
    since, self._told_loads = self._told_loads, self._loop.time()
    every = self._run.server_poll_seconds
    looks = int(self._told_loads / every) - int(since / every)
    if looks and len(self._servers) > 1:
      loads = {url: (one.running, one.waiting) for url, one in self._servers.items()}
      self._traffic.count(messages.Loads(loads=loads), looks * len(self._links))

  async def _sync(self, version: int) -> weight_sync.SyncReport:
    started = self._loop.time()
    await asyncio.sleep(self._given.sync.verify_seconds)
    servers = await self._fleet.sync(version)
    if self._watch.started is None:
      self._watch.started = self._loop.time()
      if not self._warm_up:
        self._begun = self._mark()
    seconds = self._loop.time() - started
    return weight_sync.report(version, self._run.sync_mode, 1.0, servers, seconds)

  async def _sample(self, seconds: float) -> None:
    while True:
      if len(self._samples) == MOST_SAMPLES:
        del self._samples[1::2]
        seconds *= 2.0
      servers = self._servers.values()
      self._samples.append(
        (
          self._loop.time(),
          [one.running for one in servers],
          [one.waiting for one in servers],
          sum(balancer.waiting for balancer in self._balancers),
        )
      )
      await asyncio.sleep(seconds)
