"""The orchestrator: the asyncio shell round the scheduler. It carries metadata only.

It hears of finished rollouts from workers and of new weights from the trainer, asks the scheduler
what follows, and does that: dispatches, forgets, writes batches, syncs weights. Time comes from the
event loop, everything outside through `Ports`, so the same code runs under a virtual clock.
"""

import asyncio
import collections
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from intellect3 import types
from intellect3.rollouts import evaluation, holdings, messages, reports
from intellect3.rollouts.ports import Link, Ports, RunFailed
from intellect3.rollouts.scheduler import BatchPlan, Scheduler

logger = logging.getLogger(__name__)

MOST_WORKERS = 4
"""A rollout that so many workers were lost with is taken to be what ends them."""


class Orchestrator:
  """See the module's docstring.

  Args:
    make_scheduler: builds the scheduler from the environments' training sizes.
    ports: the outside.
    num_workers: how many workers must have said hello before anything starts.
    steps, seed: the run's last training step, and its seed.
    server_patience_seconds, worker_patience_seconds: how long the run goes on without any.
    evaluation_tasks: held-out tasks per environment, greedy, at the first and last version.
    scheduler_state: of the last manifest, on a resume.
    dispatched: rollouts dispatched before a resume, those after the last manifest included.
    distrusted: what was said of servers before a resume: (url, oldest version).
    lives: processes that orchestrated the run before; attempts are numbered on from theirs.
  """

  def __init__(
    self,
    *,
    make_scheduler: Callable[[Mapping[str, int]], Scheduler],
    ports: Ports,
    num_workers: int,
    steps: int,
    seed: int,
    server_patience_seconds: float = 600.0,
    worker_patience_seconds: float = 600.0,
    evaluation_tasks: int = 0,
    scheduler_state: Mapping[str, Any] | None = None,
    dispatched: int = 0,
    distrusted: Sequence[tuple[str, int]] = (),
    lives: int = 0,
  ) -> None:
    self._make_scheduler = make_scheduler
    self._ports = ports
    self._num_workers = num_workers
    self._steps = steps
    self._scheduler_state = scheduler_state
    self._dispatched = dispatched
    self._scheduler: Scheduler | None = None
    self._sizes: Mapping[str, int] = {}
    self._links: dict[str, Link] = {}
    self._holdings = holdings.Holdings(distrusted)
    self._patience = {"server": server_patience_seconds, "worker": worker_patience_seconds}
    self._missing: dict[str, asyncio.TimerHandle] = {}  # what there is none of
    self._versions: Mapping[str, int] = {}  # of the servers that may be used
    self._fenced: dict[str, int] = {}
    self._news = asyncio.Event()  # of servers
    self._adrift: list[messages.Dispatch] = []  # to be assigned, once there is a worker
    self._lost_with: collections.Counter[int] = collections.Counter()  # workers, by rollout
    self._attempts = itertools.count((lives << 32) + 1)
    self._held_out = evaluation.HeldOut(evaluation_tasks, seed)
    self._plan: BatchPlan | None = None  # that is being committed
    self._commit_task: asyncio.Task[None] | None = None
    self._attempt = 0
    self._written: dict[str, asyncio.Future[types.ShardEntry]] = {}
    self._newest = -1  # version that servers may have
    self._ending = False
    self._syncing = False
    self._collecting = False
    self._window = reports.Window()
    self._done: asyncio.Future[None] | None = None
    self._failure: str | None = None
    self._workers_ready = asyncio.Event()

  # Messages in. Each returns at once; whatever follows is done by `_pump`.

  def connected(self, link: Link, hello: messages.Hello) -> None:
    """A worker has said hello."""
    if self._sizes and dict(hello.sizes) != dict(self._sizes):
      self._fail(f"worker {hello.worker}: its environments {hello.sizes} differ from {self._sizes}")
      return
    self._sizes = hello.sizes
    self._links[link.name] = link
    self._holdings.add_worker(link.name)
    self._note_missing("worker", False)
    if self._versions:
      link.post(messages.Servers(versions=self._versions))
    if len(self._links) >= self._num_workers:
      self._workers_ready.set()
    self._pump()

  def disconnected(self, name: str) -> None:
    """A worker is gone: another one goes on with what it ran or held (contract 7)."""
    if self._links.pop(name, None) is None:
      return
    lost = self._holdings.remove_worker(name)
    if not self._ending:
      logger.warning("worker %s is gone with %d rollouts", name, len(lost))
    self._note_missing("worker", self._workers_ready.is_set() and not self._links)
    self._lost_with.update(lost)
    self._adrift += self._held_out.of(lost)
    if name in self._written and not self._written[name].done():
      self._written[name].set_exception(RunFailed(f"worker {name} is gone"))
    if self._plan is not None and not self._plan.advantages.keys().isdisjoint(lost):
      self._plan = None
    if self._scheduler is not None:
      ended = [key for key in lost if self._lost_with[key] >= MOST_WORKERS]
      self._guarded(self._scheduler.lost, ended, "worker lost")
      self._guarded(self._scheduler.again, [key for key in lost if key not in ended])
    self._pump()

  def received(self, name: str, message: messages.FromWorker) -> None:
    """A message from a worker; one of a worker that is not connected says nothing any more."""
    if name not in self._links:
      return
    match message:
      case messages.RolloutSummary():
        self._finished(name, message)
      case messages.BatchWritten(attempt=attempt, shard=shard):
        pending = attempt == self._attempt and name in self._written
        if pending and not self._written[name].done():
          self._written[name].set_result(shard)
      case messages.WorkerFailed(reason=reason):
        self._fail(f"worker {name}: {reason}")
      case _:
        self._fail(f"worker {name}: unexpected message {type(message).__name__}")
    self._pump()

  # What happens to the servers, from `Ports.sync` and whoever watches over them.

  def servers(self, versions: Mapping[str, int]) -> None:
    """These servers may be used from now on, and have these versions of the weights."""
    self._versions = dict(versions)
    self._note_missing("server", not versions)
    for url in versions:
      self._fenced.pop(url, None)
    self._tell_all(messages.Servers(versions=self._versions))
    if self._scheduler is not None and versions:
      self._scheduler.weights(max(self._scheduler.version, *versions.values()))
    self._news.set()
    self._pump()

  def loads(self, loads: Mapping[str, tuple[int, int]]) -> None:
    """How busy servers are, (running, waiting), for the workers' balance."""
    self._tell_all(messages.Loads(loads=loads))

  def failed(self, url: str, version: int, reason: str, *, for_good: bool) -> None:
    """What a server made with this version or newer is not to be trusted."""
    self._fenced[url] = min(version, self._fenced.get(url, version))  # until it is good again
    if for_good:
      self._tell_all(messages.Fence(url=url, version=version, reason=reason))
    self._guarded(self._ports.distrusted, url, version)
    poisoned = self._holdings.made_by(url, version)
    self._forget(poisoned)
    if self._scheduler is not None:
      self._guarded(self._scheduler.lost, poisoned, "server fenced")
    self._pump()
    # Also what was sent now: its worker may not have heard yet.
    self._holdings.distrust(url, version)

  def _finished(self, name: str, summary: messages.RolloutSummary) -> None:
    if not self._holdings.runs(name, summary.rollout_id):
      return  # cancelled meanwhile, another worker's by now, or told before
    if summary.purpose == "eval":
      self._holdings.release(summary.rollout_id)
      self._held_out.finished(summary)
      return
    poisoned = self._holdings.distrusted(summary) + [
      url for url in summary.servers if summary.newest_version >= self._fenced.get(url, 1 << 60)
    ]
    if poisoned:
      self._forget([summary.rollout_id])
      summary = msgspec.structs.replace(summary, error=f"server fenced: {poisoned[0]}", reward=None)
    elif summary.newest_version > self._newest:  # a server that tells of what nobody published
      logger.error("rollout %d has tokens of v%d", summary.rollout_id, summary.newest_version)
      self._forget([summary.rollout_id])
      summary = msgspec.structs.replace(summary, error="version_unpublished", reward=None)
    assert self._scheduler is not None
    self._window.add_finished(summary)
    if summary.error is None:
      self._holdings.hold(summary)
    else:
      self._holdings.release(summary.rollout_id)
    self._guarded(self._scheduler.finished, summary)

  # The run.

  async def run(self) -> None:
    """Runs until the last step is trained and evaluated; raises RunFailed with the reason."""
    self._done = asyncio.get_running_loop().create_future()
    if self._failure is not None:  # while the servers were waited for
      self._done.set_exception(RunFailed(self._failure))
    self._ports.status("waiting for workers", {})
    main = asyncio.ensure_future(self._main())
    try:
      await asyncio.wait([main, self._done], return_when=asyncio.FIRST_COMPLETED)
      if self._done.done():
        self._done.result()
      await main
    finally:
      self._ending, self._collecting = True, False
      for task in (main, self._commit_task):
        if task is not None:
          task.cancel()
          await asyncio.gather(task, return_exceptions=True)
      for timer in self._missing.values():
        timer.cancel()
      self._tell_all(messages.Shutdown())

  async def _main(self) -> None:
    await self._workers_ready.wait()
    train_sizes = {
      key.removesuffix("/train"): size
      for key, size in self._sizes.items()
      if key.endswith("/train")
    }
    self._scheduler = scheduler = self._make_scheduler(train_sizes)
    scheduler.restore(self._scheduler_state, self._dispatched)
    if scheduler.next_step > self._steps:
      scheduler.cancel_all("run complete")
    self._ports.status("loading weights into the servers", {})
    version = await self._sync(-1)
    if self._held_out.tasks and scheduler.version == 0:
      await self._evaluate()
    self._collecting = True
    self._window.start(asyncio.get_running_loop().time())
    self._ports.status("training", {})
    self._pump()
    while version < self._steps:
      version = await self._sync(version)
    if self._held_out.tasks:
      await self._evaluate()
    self._ports.status("done", scheduler.accounting.counts())

  async def _sync(self, version: int) -> int:
    """Waits for a newer version and brings it to the servers; returns it."""
    assert self._scheduler is not None
    version = self._newest = await self._ports.next_version(version)
    self._syncing = True  # no batch is planned on tokens whose weights are not yet checked
    try:
      report = await self._ports.sync(version)
    finally:
      self._syncing = False
    self._window.add_sync(report.seconds, report.metrics)
    if report.fenced and not report.healthy and not report.lost:
      reasons = "; ".join(report.fenced.values())
      raise RunFailed(f"no server is left after the sync of version {version}: {reasons}")
    self._pump()  # groups that were complete need no server to be batched
    while self._scheduler.version < version:  # all are lost; the first to come back brings it
      self._news.clear()
      await self._news.wait()
    return version

  def _pump(self) -> None:
    """Does what the scheduler allows now: plan a batch, forget, dispatch."""
    scheduler = self._scheduler
    if scheduler is None or not self._links:
      return
    adrift, self._adrift = self._adrift, []
    for dispatch in adrift:
      self._assign(dispatch)
    if not self._collecting:
      return
    try:
      if self._commit_task is None and not self._syncing:
        plan = scheduler.plan_batch()
        if plan is not None:
          self._ask_for_shards(plan)  # at once: between plan and request no worker may leave
          self._commit_task = asyncio.ensure_future(self._commit(plan))
          self._commit_task.add_done_callback(self._committed)
      self._forget(scheduler.take_forgotten())
      if (alarm := scheduler.alarm()) is not None:
        logger.warning("%s", alarm)
        self._ports.status("training", {"in_vain": alarm})
      # After the plan, which may have dropped stale groups: what they leave room for starts now.
      started = scheduler.dispatch() if self._versions else []
      if started:  # kept before it is sent: what a crash loses must have been counted
        self._ports.dispatched(scheduler.accounting.counts()["dispatched"])
      for dispatch in started:
        self._assign(dispatch)
    except Exception as error:
      self._fail(f"{type(error).__name__}: {error}")

  def _assign(self, dispatch: messages.Dispatch) -> None:
    if dispatch.continued:
      dispatch = msgspec.structs.replace(dispatch, attempt=next(self._attempts))
    name = self._holdings.assign(dispatch.rollout_id, continued=dispatch.continued)
    self._links[name].post(dispatch)

  def _tell_all(self, message: messages.ToWorker) -> None:
    for link in self._links.values():
      link.post(message)

  def _forget(
    self,
    rollout_ids: Sequence[int],
    tell: type[messages.Forget] | type[messages.Cancel] = messages.Forget,
  ) -> None:
    for name, ids in self._holdings.release_all(rollout_ids).items():
      self._links[name].post(tell(rollout_ids=ids))

  def _note_missing(self, what: str, none_left: bool) -> None:
    """There is no server, or no worker, or there is one again: the run waits only so long."""
    if not none_left and what in self._missing:
      self._missing.pop(what).cancel()
    elif none_left and what not in self._missing and not self._ending:
      seconds = self._patience[what]
      reason = f"no {what} is left, for {seconds:g} s"
      self._missing[what] = asyncio.get_running_loop().call_later(seconds, self._fail, reason)

  # Batches.

  def _ask_for_shards(self, plan: BatchPlan) -> None:
    by_worker: dict[str, list[messages.BatchItem]] = {}
    for rollout_id, advantage in plan.advantages.items():
      item = messages.BatchItem(rollout_id, advantage)
      by_worker.setdefault(self._holdings.owner(rollout_id), []).append(item)
    loop = asyncio.get_running_loop()
    self._attempt += 1
    self._plan = plan
    self._written = {name: loop.create_future() for name in sorted(by_worker)}
    for name, items in by_worker.items():
      self._links[name].post(
        messages.WriteBatch(
          step=plan.step,
          attempt=self._attempt,
          items=items,
          oldest_version=plan.oldest_version,
        )
      )

  async def _commit(self, plan: BatchPlan) -> None:
    written = await asyncio.gather(*self._written.values(), return_exceptions=True)
    shards = [shard for shard in written if isinstance(shard, types.ShardEntry)]
    whole, self._plan = self._plan is plan and len(shards) == len(written), None
    scheduler = self._scheduler
    assert scheduler is not None
    if not whole or not all(scheduler.accounting.is_open(key) for key in plan.advantages):
      logger.warning("the batch of step %d is planned again: it lost rollouts", plan.step)
      return
    scheduler.commit(plan)
    now = asyncio.get_running_loop().time()
    metrics = self._window.close(plan, scheduler, now, self._ports.server_metrics())
    await self._ports.commit(reports.manifest(plan, shards, metrics, scheduler.state()))
    self._forget(list(plan.advantages))
    self._ports.report(plan.step, metrics)
    self._ports.batch_committed(plan.step)

  def _committed(self, task: asyncio.Task[None]) -> None:
    self._commit_task = None
    if not task.cancelled() and task.exception() is not None:
      self._fail(f"committing a batch failed: {task.exception()}")
      return
    self._pump()
    if self._scheduler is not None and self._scheduler.next_step > self._steps:
      self._collecting = False
      self._forget(self._scheduler.cancel_all("run complete"), messages.Cancel)

  # Evaluation.

  async def _evaluate(self) -> None:
    """Runs held-out tasks greedily on the servers' present version."""
    assert self._scheduler is not None
    version = self._scheduler.version
    self._ports.status("evaluating", {"version": version})
    self._adrift += self._held_out.begin(self._sizes)
    self._pump()
    scores = await self._held_out.scores()
    self._ports.report_evaluation(version, scores)

  def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
    """Lets a function of the run's, or the disk, fail there: the run ends."""
    try:
      act(*arguments)
    except Exception as error:
      self._fail(f"{type(error).__name__}: {error}")

  def _fail(self, reason: str) -> None:
    if not self._failure:  # the first ends the run; those that follow from it say nothing new
      logger.error("%s", reason)
      self._failure = reason
    if self._done is not None and not self._done.done():
      self._done.set_exception(RunFailed(reason))
