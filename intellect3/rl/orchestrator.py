"""The orchestrator role: scheduling, weight sync, batches. One asyncio process, no jax."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping
from typing import Any

from intellect3 import rollout_log, summary, telemetry, types
from intellect3.inference import control, launch, transport, weight_sync
from intellect3.losses import advantages
from intellect3.rl.roles import Main, NotStarted, Shared
from intellect3.rollouts import difficulty, filters, link, scheduler
from intellect3.rollouts import orchestrator as orchestrator_lib
from intellect3.weights import manifest as manifests

logger = logging.getLogger(__name__)


def orchestrator(
  shared: Shared,
  make_worker: link.MakeWorker,
  *,
  prompts_per_step: int,
  rollouts_per_prompt: int,
  max_rollouts_in_flight: int,
  staleness_rule: str = "drop",
  deterministic: bool = False,
  temperature: float = 1.0,
  pools: difficulty.Pools | None = None,
  group_filters: filters.Filters | None = None,
  advantage_fn: filters.AdvantageFn = advantages.group_mean,
  sync_mode: str = "in_place",
  canary_bound: float = 1e-4,
  evaluation_tasks: int = 0,
  server_start_seconds: float = 600.0,
) -> Main:
  """Builds the orchestrator.

  Args:
    shared: what the roles share.
    make_worker: a worker's factory, used where `shared.num_workers` is 0.
    prompts_per_step: groups in a batch.
    rollouts_per_prompt: G, rollouts of a group.
    max_rollouts_in_flight: rollouts running at once.
    staleness_rule: `drop` stale rollouts, or `mask` their stale tokens.
    deterministic: batches in dispatch order (contract 10).
    temperature: of the training rollouts.
    pools: difficulty pools; none by default.
    group_filters: which rollouts carry no gradient.
    advantage_fn: from rewards and group ids to advantages.
    sync_mode: `in_place` keeps running requests' cache over an update, `retract` recomputes it.
    canary_bound: largest difference of a canary logprob, server against trainer.
    evaluation_tasks: held-out tasks per environment, greedy, at the first and last version.
    server_start_seconds: how long servers may take to answer.

  Raises:
    NotStarted, ValueError: a parameter is not fit.
  """
  settings = scheduler.Settings(
    steps=shared.steps,
    prompts_per_step=prompts_per_step,
    rollouts_per_prompt=rollouts_per_prompt,
    max_off_policy_steps=shared.max_off_policy_steps,
    max_rollouts_in_flight=max_rollouts_in_flight,
    staleness_rule=staleness_rule,
    batch_order="dispatch" if deterministic else "completion",
    temperature=temperature,
    seed=shared.seed,
  )
  if sync_mode not in weight_sync.MODES:
    raise NotStarted(f"sync_mode: expected one of {list(weight_sync.MODES)}, got {sync_mode!r}")
  if canary_bound <= 0 or evaluation_tasks < 0:
    raise NotStarted(
      "canary_bound, evaluation_tasks: expected > 0 and >= 0, "
      f"got {canary_bound}, {evaluation_tasks}"
    )
  if set(shared.environment_weights) != set(shared.environments):
    raise NotStarted(
      f"environment_weights: expected {sorted(shared.environments)}, "
      f"got {sorted(shared.environment_weights)}"
    )

  def make_scheduler(sizes: Mapping[str, int]) -> scheduler.Scheduler:
    sampler = difficulty.TaskSampler(
      sizes, shared.environment_weights, pools or difficulty.Pools(), shared.seed
    )
    return scheduler.Scheduler(settings, sampler, group_filters or filters.Filters(), advantage_fn)

  async def sync(servers: control.ServerControl, version: int) -> weight_sync.SyncReport:
    manifest = manifests.read(shared.weights_dir, version)
    return await weight_sync.sync(
      servers,
      path=manifests.version_directory(shared.weights_dir, version).absolute(),
      version=version,
      mode=sync_mode,
      canary=weight_sync.Canary(manifest.canary_ids, manifest.canary_logprobs),
      bound=canary_bound,
    )

  async def run() -> None:
    http = transport.HttpTransport()
    servers = control.ServerControl(http, shared.server_urls, vocab_size=shared.renderer.vocab_size)
    published = asyncio.Event()
    with _Reporter(shared) as reporter:
      closing: list[Callable[[int], None]] = []
      orchestrator = orchestrator_lib.Orchestrator(
        make_scheduler=make_scheduler,
        ports=orchestrator_lib.Ports(
          next_version=lambda version: _next_version(shared, published, version),
          sync=lambda version: sync(servers, version),
          commit=_committer(shared),
          batch_committed=lambda step: closing[0](step),
          report=reporter.step,
          report_evaluation=reporter.evaluation,
          status=reporter.status,
        ),
        num_workers=max(1, shared.num_workers),
        steps=shared.steps,
        seed=shared.seed,
        evaluation_tasks=evaluation_tasks,
        scheduler_state=reporter.scheduler_state,
      )
      server = link.OrchestratorServer(
        orchestrator,
        version_published=lambda version: published.set(),
        batch_exists=lambda step: rollout_log.read_manifest(shared.log_dir, step) is not None,
        poll_seconds=2.0,
      )
      closing.append(server.batch_committed)
      host, _, port = shared.orchestrator_url.removeprefix("http://").rpartition(":")
      await server.start(host, int(port))
      local: link.InProcessLink | None = None
      try:
        reporter.status("starting servers", {})
        await _wait_for_servers(http, shared, server_start_seconds)
        if shared.num_workers == 0:
          local = link.InProcessLink(orchestrator, make_worker)
        await _until_terminated(orchestrator.run())
      finally:
        if local is not None:
          await local.close()
        await server.close()
        await http.close()

  return lambda: asyncio.run(run())


async def _wait_for_servers(
  http: transport.HttpTransport, shared: Shared, timeout_seconds: float
) -> None:
  await asyncio.gather(
    *(
      launch.wait_until_healthy(http, url, timeout_seconds, alive=lambda: True)
      for url in shared.server_urls
    )
  )


async def _until_terminated(work: Any) -> None:
  """Runs `work`; SIGTERM cancels it, so that its connections are closed in order."""
  task = asyncio.ensure_future(work)
  loop = asyncio.get_running_loop()
  loop.add_signal_handler(signal.SIGTERM, task.cancel)
  try:
    await task
  finally:
    loop.remove_signal_handler(signal.SIGTERM)


async def _next_version(shared: Shared, published: asyncio.Event, version: int) -> int:
  """Waits for weights newer than `version`: told by the trainer, or seen in the directory."""
  while True:
    newest = manifests.latest(shared.weights_dir)
    if newest is not None and newest > version:
      return newest
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(published.wait(), timeout=0.5)
    published.clear()


def _committer(shared: Shared) -> Any:
  async def commit(manifest: types.Manifest) -> None:
    rollout_log.commit_manifest(shared.log_dir, manifest)

  return commit


class _Reporter:
  """The orchestrator's metrics files and status, and what a resume finds of them."""

  def __init__(self, shared: Shared) -> None:
    self._run_dir = shared.run_dir
    self._steps = telemetry.MetricsWriter(shared.run_dir, "orchestrator")
    self._evaluations = telemetry.MetricsWriter(shared.run_dir, "evaluation")
    self.scheduler_state: Mapping[str, Any] | None = None
    if shared.resume:
      for name in rollout_log.remove_uncommitted(shared.log_dir):
        logger.warning("removed %s: it was never committed", name)
      committed = rollout_log.committed_steps(shared.log_dir)
      last = committed[-1] if committed else 0
      self._steps.truncate_after(last)
      if last:
        manifest = rollout_log.read_manifest(shared.log_dir, last)
        assert manifest is not None
        self.scheduler_state = manifest.scheduler_state

  def __enter__(self) -> "_Reporter":
    return self

  def __exit__(self, *_: object) -> None:
    self._steps.close()
    self._evaluations.close()

  def step(self, step: int, row: Mapping[str, float]) -> None:
    self._steps.write(step, row)

  def evaluation(self, version: int, row: Mapping[str, float]) -> None:
    self._evaluations.write(version, row)

  def status(self, phase: str, detail: Mapping[str, Any]) -> None:
    logger.info("%s %s", phase, dict(detail))
    summary.write_status(self._run_dir, phase, detail)
