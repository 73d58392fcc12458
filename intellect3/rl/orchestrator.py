"""The orchestrator role: scheduling, weight sync, batches. One asyncio process, no jax."""

import asyncio
import signal
from collections.abc import Callable, Mapping
from typing import Any

from intellect3.inference import fleet
from intellect3.losses import advantages
from intellect3.rl import checks, conducting, outside, serving
from intellect3.rl.roles import Main, NotStarted, Shared
from intellect3.rollouts import credit, difficulty, filters, link, scheduler


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
  advantage_fn: credit.AdvantageFn | credit.MovingBaseline = advantages.group_mean,
  reward_fn: credit.RewardFn | None = None,
  sync_mode: str = "in_place",
  sync_transport: str = "disk",
  sync_bucket_bytes: int = 64 * 2**20,
  sync_timeout_seconds: float = 600.0,
  sync_patience_seconds: float = 30.0,
  canary_bound: float | None = 1e-4,
  verify_fingerprints: bool = True,
  weights_lag: int = 0,
  evaluation_tasks: int = 0,
  server_start_seconds: float = 600.0,
  server_poll_seconds: float = 2.0,
  server_patience_seconds: float = 600.0,
  worker_patience_seconds: float = 600.0,
  max_groups_in_vain: int = 10_000,
  start: Callable[[conducting.Parts], None] | None = None,
) -> Main:
  """Builds the orchestrator.

  Args:
    shared: what the roles share.
    make_worker: a worker's factory, used where `shared.num_workers` is 0.
    prompts_per_step: groups in a batch.
    rollouts_per_prompt: G, rollouts of a group; 1 only with a moving baseline.
    max_rollouts_in_flight: rollouts running at once.
    staleness_rule: `drop` stale rollouts, or `mask` their stale tokens.
    deterministic: batches in dispatch order (contract 10).
    temperature: of the training rollouts.
    pools: difficulty pools; none by default.
    group_filters: which rollouts carry no gradient.
    advantage_fn: from rewards and group ids to advantages, or a `credit.MovingBaseline`.
    reward_fn: from rewards and lengths to the rewards that advantages are computed from; None
      leaves them as they are.
    sync_mode: `in_place` keeps running requests' cache over an update, `retract` recomputes it.
    sync_transport: `disk` (servers read the run directory) or `tensor` (weights are sent by HTTP).
    sync_bucket_bytes: how much `tensor` sends at a time.
    sync_timeout_seconds: for one call to a server while its weights are synced.
    sync_patience_seconds: how long, at least, servers may take for a sync longer than the first of
      them; one that takes longer is left out until it is done.
    canary_bound: largest difference of a canary logprob, server against trainer; None calibrates it
      at the first sync (three times the difference seen then, at least 1e-4), for bfloat16 servers.
    verify_fingerprints: compare every published tensor's bytes with its manifest before a server
      gets them; reads the weights once.
    weights_lag: for ablations of staleness: the servers are kept this many versions behind the
      newest one, but for the last. With `max_off_policy_steps` equal to it the loop is synchronous,
      and every token of step n has staleness min(n - 1, `weights_lag`).
    evaluation_tasks: held-out tasks per environment, greedy, at the first and last version.
    server_start_seconds: how long servers may take to answer at the start.
    server_poll_seconds: how often to look at the servers, and at the list of them (`servers.txt`).
    server_patience_seconds: how long the run waits for one to come back when there is none.
    worker_patience_seconds: how long it waits for a worker when there is none, once all were there.
    max_groups_in_vain: so many groups that left nothing to train since the last batch (each attempt
      failed, or the filters kept none), for each group that waits for the next one and one more,
      end the run.
    start: conducts what is built here; None: in the run's directory, over HTTP.

  Raises:
    NotStarted, ValueError: a parameter is not fit, or not for the run that is resumed.
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
    max_groups_in_vain=max_groups_in_vain,
    seed=shared.seed,
  )
  for field, value in (
    ("server_poll_seconds", server_poll_seconds),
    ("sync_patience_seconds", sync_patience_seconds),
    ("server_patience_seconds", server_patience_seconds),
    ("worker_patience_seconds", worker_patience_seconds),
  ):
    checks.number(field, value, 0, above=True)
  serving_settings = serving.Settings(
    sync_mode=sync_mode,
    transport=sync_transport,
    bucket_bytes=sync_bucket_bytes,
    canary_bound=canary_bound,
    verify_fingerprints=verify_fingerprints,
    start_seconds=server_start_seconds,
    timeout_seconds=sync_timeout_seconds,
    fleet=fleet.Settings(poll_seconds=server_poll_seconds, patience_seconds=sync_patience_seconds),
  )
  checks.integer("evaluation_tasks", evaluation_tasks, 0)
  checks.integer("weights_lag", weights_lag, 0)
  if weights_lag > shared.max_off_policy_steps:
    raise NotStarted(
      f"weights_lag: expected at most max_off_policy_steps ({shared.max_off_policy_steps}), "
      f"got {weights_lag}: nothing would ever be fresh enough to train on"
    )
  if set(shared.environment_weights) != set(shared.environments):
    raise NotStarted(
      f"environment_weights: expected {sorted(shared.environments)}, "
      f"got {sorted(shared.environment_weights)}"
    )

  group_credit = credit.Credit(advantage_fn=advantage_fn, reward_fn=reward_fn)
  group_credit.check()

  def make_sampler(sizes: Mapping[str, int]) -> difficulty.TaskSampler:
    weights = shared.environment_weights
    return difficulty.TaskSampler(sizes, weights, pools or difficulty.Pools(), shared.seed)

  def make_scheduler(sizes: Mapping[str, int]) -> scheduler.Scheduler:
    sampler = make_sampler(sizes)
    return scheduler.Scheduler(settings, sampler, group_filters or filters.Filters(), group_credit)

  trial = make_scheduler({name: e.size("train") for name, e in shared.environments.items()})
  last = outside.last_batch(shared.log_dir) if shared.resume else None
  if last is not None:
    trial.restore(last.scheduler_state, 0)  # its checks

  parts = conducting.Parts(
    shared=shared,
    settings=conducting.Settings(
      serving=serving_settings,
      weights_lag=weights_lag,
      evaluation_tasks=evaluation_tasks,
      server_patience_seconds=server_patience_seconds,
      worker_patience_seconds=worker_patience_seconds,
    ),
    make_scheduler=make_scheduler,
    make_worker=make_worker,
  )
  return lambda: (start or over_http)(parts)


def over_http(parts: conducting.Parts) -> None:
  """Conducts a run in its directory, with its servers, until SIGTERM or its end."""

  async def run() -> None:
    beyond = outside.of_run(parts.shared)
    door = conducting.socket_door(parts.shared, beyond.log.is_committed)
    await _until_terminated(conducting.conduct(parts, beyond, door))

  asyncio.run(run())


async def _until_terminated(work: Any) -> None:
  """Runs `work`; SIGTERM cancels it, so that its connections are closed in order."""
  task = asyncio.ensure_future(work)
  loop = asyncio.get_running_loop()
  loop.add_signal_handler(signal.SIGTERM, task.cancel)
  try:
    await task
  finally:
    loop.remove_signal_handler(signal.SIGTERM)
