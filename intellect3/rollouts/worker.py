"""A rollout worker: runs environments' coroutines, holds finished rollouts, writes log shards.

One worker serves about 256 rollouts at once. It lives in the orchestrator's process or in its own
(`link` makes the difference invisible) and is driven by `messages` alone. Token arrays never leave
it except into a shard of the RolloutLog.
"""

import asyncio
import logging
import pathlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from intellect3 import rollout_log, types
from intellect3.environments import base
from intellect3.rollouts import journal as journal_lib
from intellect3.rollouts import messages
from intellect3.rollouts import token_weights as token_weights_lib
from intellect3.rollouts.conversation import RecordedConversation

logger = logging.getLogger(__name__)

ConversationFactory = Callable[[messages.Dispatch, journal_lib.Journal], RecordedConversation]
MakeStore = Callable[[Callable[[str], None]], journal_lib.Store]
"""Builds the store of journals from what is told why it fails."""
ShardWriter = Callable[
  [pathlib.Path, Iterable[types.TrajectoryRecord]], Awaitable[types.ShardEntry]
]
SampleWriter = Callable[[int, types.Rollout, float], None]


class Pool(Protocol):
  """The part of `inference.client.ServerPool` that a worker steers."""

  def set_servers(self, urls: Iterable[str], versions: Mapping[str, int] | None = None) -> None: ...

  def set_loads(self, loads: Mapping[str, tuple[int, int]]) -> None: ...

  def fence(self, url: str, reason: str) -> None: ...


async def write_shard_in_thread(
  path: pathlib.Path, records: Iterable[types.TrajectoryRecord]
) -> types.ShardEntry:
  """The production shard writer: disk work never blocks the event loop."""
  return await asyncio.to_thread(rollout_log.write_shard, path, records)


class Worker:
  """See the module's docstring.

  Args:
    name: unique in the run; names its shards.
    environments: by name.
    make_conversation: what an environment of a dispatch talks to, and where it is journaled.
    pool: the servers, to be told of joins and fences.
    send: posts a message to the orchestrator; never blocks.
    log_dir: the RolloutLog.
    write_shard: how a shard is written.
    write_sample: shows one rollout of each batch to people; None for not at all.
    token_weights: weights tokens by loss component; None leaves them all alike.
    make_journals: where training rollouts are journaled (contract 7); None keeps no journal.
    release: frees what the worker was given (connections), at its end.
  """

  def __init__(
    self,
    name: str,
    *,
    environments: Mapping[str, base.Environment],
    make_conversation: ConversationFactory,
    pool: Pool,
    send: Callable[[messages.FromWorker], None],
    log_dir: pathlib.Path,
    release: Callable[[], Awaitable[None]],
    write_shard: ShardWriter = write_shard_in_thread,
    write_sample: SampleWriter | None = None,
    token_weights: token_weights_lib.TokenWeights | None = None,
    make_journals: MakeStore | None = None,
  ) -> None:
    self.name = name
    self._environments = environments
    self._make_conversation = make_conversation
    self._pool = pool
    self._send = send
    self._log_dir = log_dir
    self._release = release
    self._write_shard = write_shard
    self._write_sample = write_sample
    self._token_weights = token_weights
    self._journals = make_journals(self._fail) if make_journals is not None else None
    self._components: set[frozenset[str]] = set()  # that records were weighted in; one for a run
    self._running: dict[int, asyncio.Task[None]] = {}
    self._finished: dict[int, types.Rollout] = {}
    self._tasks: dict[asyncio.Task[None], None] = {}
    self.stopped = asyncio.Event()

  def hello(self) -> messages.Hello:
    """The first message of a connection."""
    sizes = {
      f"{name}/{split}": environment.size(split)
      for name, environment in self._environments.items()
      for split in ("train", "eval")
    }
    return messages.Hello(worker=self.name, sizes=sizes)

  def handle(self, message: messages.ToWorker) -> None:
    """Acts on one message; returns at once."""
    match message:
      case messages.Dispatch(rollout_id=key) if key in self._running or key in self._finished:
        logger.warning("rollout %d is here already", key)
      case messages.Dispatch():
        task = asyncio.get_running_loop().create_task(self._run(message))
        self._running[message.rollout_id] = task
        task.add_done_callback(lambda _: self._running.pop(message.rollout_id, None))
      case messages.Cancel(rollout_ids=ids):
        for rollout_id in ids:
          self._let_go(rollout_id)
          if rollout_id in self._running:
            self._running[rollout_id].cancel()
      case messages.Forget(rollout_ids=ids):
        for rollout_id in ids:
          self._let_go(rollout_id)
      case messages.WriteBatch():
        # Looked up now: what is said next may let go of one, and the batch is planned again then.
        ids = [item.rollout_id for item in message.items if item.rollout_id in self._finished]
        self._spawn(self._write(message, {key: self._finished[key] for key in ids}))
      case messages.Servers(versions=versions):
        self._pool.set_servers(versions, versions)
      case messages.Loads(loads=loads):
        self._pool.set_loads(loads)
      case messages.Fence(url=url, reason=reason):
        self._pool.fence(url, reason)
      case messages.Shutdown():
        self.stopped.set()

  async def close(self) -> None:
    """Ends every coroutine of this worker."""
    tasks = [*self._running.values(), *self._tasks]
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if self._journals is not None:
      await self._journals.close()
    await self._release()

  def _let_go(self, rollout_id: int) -> None:
    self._finished.pop(rollout_id, None)
    if self._journals is not None:
      self._journals.drop(rollout_id)

  def _fail(self, reason: str) -> None:
    self._send(messages.WorkerFailed(worker=self.name, reason=reason))

  def _spawn(self, coroutine: Awaitable[None]) -> None:
    task = asyncio.ensure_future(coroutine)
    self._tasks[task] = None
    task.add_done_callback(self._tasks.pop)

  async def _run(self, dispatch: messages.Dispatch) -> None:
    clock = asyncio.get_running_loop().time
    started = clock()
    journal = journal_lib.Journal()
    if self._journals is not None and dispatch.purpose == "train":
      journal = await self._journals.open(dispatch)
    conversation = self._make_conversation(dispatch, journal)
    reward: float | None = None
    metrics: Mapping[str, float] = {}
    error: str | None = None
    agent = ""
    try:
      environment = self._environments[dispatch.environment]
      task = environment.task(dispatch.split, dispatch.index)
      agent = task.agent
      score = await environment.run(task, conversation)
      reward, metrics = float(score.reward), score.metrics
      if not np.isfinite(reward):
        reward, error = None, "reward_not_finite"
    except asyncio.CancelledError:
      raise
    except Exception as failure:  # contract 4: an isolation boundary; a failure is never a reward
      # The reason is a metric's name: the kind alone. What it said is for the log.
      error = type(failure).__name__
      logger.warning("rollout %d failed: %s: %s", dispatch.rollout_id, error, failure)
    rollout = types.Rollout(
      rollout_id=dispatch.rollout_id,
      group_id=dispatch.group_id,
      sample=dispatch.sample,
      task_id=f"{dispatch.environment}/{dispatch.split}/{dispatch.index}",
      environment=dispatch.environment,
      trajectories=tuple(conversation.trajectories()) if error is None else (),
      reward=reward,
      metrics=metrics,
      error=error,
      truncated=conversation.truncated,
      agent=agent,
    )
    if dispatch.purpose == "train" and error is None:
      self._finished[dispatch.rollout_id] = rollout
    else:
      self._let_go(dispatch.rollout_id)
    self._send(_summarize(rollout, dispatch.purpose, conversation, clock() - started))

  async def _write(self, batch: messages.WriteBatch, rollouts: Mapping[int, types.Rollout]) -> None:
    path = (
      rollout_log.step_directory(self._log_dir, batch.step)
      / f"{self.name}_{batch.attempt}.arrayrecord"
    )
    try:
      records = [
        token_weights_lib.weighted(record, self._token_weights)
        for item in batch.items
        for record in _records(batch, rollouts[item.rollout_id], item.advantage)
      ]
      self._components |= {frozenset(record.token_weights) for record in records}
      if len(self._components) > 1:
        given = sorted(sorted(keys) for keys in self._components)
        raise ValueError(f"token_weights: expected the same components all run, got {given}")
      shard = await self._write_shard(path, records)
    except Exception as failure:
      logger.exception("writing step %d failed", batch.step)
      self._fail(f"{path.name}: {failure}")
      return
    if self._write_sample is not None and batch.items:
      shown = batch.items[batch.step * 7919 % len(batch.items)]  # any one, not the best
      self._write_sample(batch.step, rollouts[shown.rollout_id], shown.advantage)
    self._send(
      messages.BatchWritten(step=batch.step, attempt=batch.attempt, worker=self.name, shard=shard)
    )


def _summarize(
  rollout: types.Rollout, purpose: str, conversation: RecordedConversation, seconds: float
) -> messages.RolloutSummary:
  versions = [
    trajectory.policy_versions[trajectory.policy_versions != types.NOT_SAMPLED]
    for trajectory in rollout.trajectories
  ]
  sampled = np.concatenate([*versions, np.zeros(0, np.int32)])
  return messages.RolloutSummary(
    rollout_id=rollout.rollout_id,
    group_id=rollout.group_id,
    purpose=purpose,
    environment=rollout.environment,
    reward=rollout.reward,
    error=rollout.error,
    truncated=rollout.truncated,
    lengths=[len(trajectory.tokens) for trajectory in rollout.trajectories],
    sampled_tokens=sampled.size,
    oldest_version=int(sampled.min()) if sampled.size else types.NOT_SAMPLED,
    newest_version=int(sampled.max()) if sampled.size else types.NOT_SAMPLED,
    servers=sorted(conversation.servers()),
    metrics=dict(rollout.metrics),
    seconds=seconds,
    reprefilled_tokens=conversation.reprefilled_tokens,
    agent=rollout.agent,
  )


def _records(
  batch: messages.WriteBatch, rollout: types.Rollout, advantage: float
) -> Iterable[types.TrajectoryRecord]:
  assert rollout.reward is not None
  for branch, trajectory in enumerate(rollout.trajectories):
    fresh = trajectory.policy_versions >= batch.oldest_version
    yield types.TrajectoryRecord(
      step=batch.step,
      rollout_id=rollout.rollout_id,
      group_id=rollout.group_id,
      branch=branch,
      task_id=rollout.task_id,
      environment=rollout.environment,
      reward=rollout.reward,
      advantage=advantage,
      trajectory=types.Trajectory(
        tokens=trajectory.tokens,
        loss_mask=trajectory.loss_mask & fresh,
        inference_logprobs=trajectory.inference_logprobs,
        policy_versions=trajectory.policy_versions,
        temperature=trajectory.temperature,
        routed_experts=trajectory.routed_experts,
      ),
    )
