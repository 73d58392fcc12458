"""The worker role: environments against the servers. No jax.

`worker` checks its parameters and returns a factory; the orchestrator calls it in its own process
(`num_workers` 0), the worker role in one of its own.
"""

import asyncio
import logging
import pathlib
from collections.abc import Callable, Iterable

from intellect3 import types
from intellect3.inference import client, transport
from intellect3.rl import checks, outside
from intellect3.rl.roles import Shared
from intellect3.rollouts import conversation, journal, messages
from intellect3.rollouts import token_weights as token_weights_lib
from intellect3.rollouts import worker as worker_lib

logger = logging.getLogger(__name__)


def worker(
  shared: Shared,
  index: int,
  *,
  max_new_tokens: int,
  max_tokens: int,
  max_concurrency: int = 256,
  segment_tokens: int = 4096,
  spill_requests: int = 16,
  retries: int = 5,
  backoff_seconds: float = 0.2,
  timeout_seconds: float = 600.0,
  grace_seconds: float = 10.0,
  wait_seconds: float = 600.0,
  token_weights: token_weights_lib.TokenWeights | None = None,
  journal_seconds: float | None = 5.0,
  make_transport: Callable[[], transport.Transport] = transport.HttpTransport,
  nonce: Callable[[], str] = outside.nonce,
  beside_disk: journal.Act = asyncio.to_thread,
  write_shard: worker_lib.ShardWriter = worker_lib.write_shard_in_thread,
  show_samples: bool = True,
) -> Callable[[Callable[[messages.FromWorker], None]], worker_lib.Worker]:
  """Builds the factory of one worker.

  Args:
    shared: what the roles share.
    index: of this worker among its kind.
    max_new_tokens: bound on one generation.
    max_tokens: bound on a trajectory, prompt included.
    max_concurrency: requests of this worker on one server at a time, fewer where it says that it is
      full; further ones wait.
    segment_tokens: most tokens that one request asks for; a longer generation is made of several,
      so that what ends one costs no more than a segment.
    spill_requests: how many requests more than the least busy server the one of a group or
      conversation may have before others are preferred.
    retries: failures in a row that a generation survives.
    backoff_seconds: before the first retry; doubles.
    timeout_seconds: for one segment; then it is aborted, and goes on with what it has.
    grace_seconds: how long an aborted segment may take to hand over its tokens.
    wait_seconds: how long a generation may wait for a server with room.
    token_weights: from a record to its tokens' weights by loss component, as
      `token_weights.echo`; None: every loss-masked token has weight 1.
    journal_seconds: how long what a training rollout has had may wait until it is in its journal,
      from where it goes on after a crash (contract 7); None keeps no journal.
    make_transport: how requests travel to the servers.
    nonce: a word that no process of this run has said before.
    beside_disk: runs a function that waits for the disk, beside the event loop.
    write_shard: how a shard of a batch gets on disk.
    show_samples: whether one rollout of each batch is written to the run's `logs`, for people.

  Raises:
    NotStarted: a parameter is not fit.
  """
  for field, value, least in (
    ("max_new_tokens", max_new_tokens, 1),
    ("max_tokens", max_tokens, 1),
    ("max_concurrency", max_concurrency, 1),
    ("segment_tokens", segment_tokens, 1),
    ("spill_requests", spill_requests, 0),
    ("retries", retries, 0),
  ):
    checks.integer(f"worker.{field}", value, least)
  checks.number("worker.backoff_seconds", backoff_seconds, 0)
  checks.number("worker.grace_seconds", grace_seconds, 0)
  checks.number("worker.timeout_seconds", timeout_seconds, 0, above=True)
  checks.number("worker.wait_seconds", wait_seconds, 0, above=True)
  if journal_seconds is not None:
    checks.number("worker.journal_seconds", journal_seconds, 0)
  if token_weights is not None:
    token_weights_lib.check(token_weights, min(shared.environments))

  environments = ", ".join(sorted(shared.environments))

  def make(send: Callable[[messages.FromWorker], None]) -> worker_lib.Worker:
    http, owner = make_transport(), nonce()
    pool = client.ServerPool(
      http,
      vocab_size=shared.renderer.vocab_size,
      router=shared.router,
      max_concurrency=max_concurrency,
      max_wait_seconds=wait_seconds,
      spill=spill_requests,
      segment_tokens=segment_tokens,
      retries=retries,
      backoff_seconds=backoff_seconds,
      timeout_seconds=timeout_seconds,
      grace_seconds=grace_seconds,
      seed=shared.seed + index,
    )

    def make_conversation(
      dispatch: messages.Dispatch, kept: journal.Journal
    ) -> conversation.RecordedConversation:
      # A server may still hold a request of the process that had the rollout before.
      again = f"-{owner}" if dispatch.continued else ""
      return conversation.RecordedConversation(
        shared.renderer,
        pool,
        seed=dispatch.seed,
        rid=f"{dispatch.purpose}-{dispatch.rollout_id}{again}",
        temperature=dispatch.temperature,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        affinity=f"{dispatch.purpose}-{dispatch.group_id}",
        journal=kept,
      )

    def make_journals(failed: Callable[[str], None]) -> journal.Store:
      assert journal_seconds is not None
      return journal.Store(
        shared.journal_dir, seconds=journal_seconds, failed=failed, act=beside_disk
      )

    async def release() -> None:
      await http.close()
      logger.info("%s ends", name)

    name = f"worker_{index}"
    samples = _sample_writer(shared, shared.run_dir / "logs" / f"samples_{name}.txt")
    logger.info("%s starts: %s, orchestrator %s", name, environments, shared.orchestrator_url)
    return worker_lib.Worker(
      name,
      environments=shared.environments,
      make_conversation=make_conversation,
      pool=pool,
      send=send,
      log_dir=shared.log_dir,
      release=release,
      write_shard=write_shard,
      write_sample=samples if show_samples else None,
      token_weights=token_weights,
      make_journals=make_journals if journal_seconds is not None else None,
    )

  return make


def _sample_writer(shared: Shared, path: pathlib.Path) -> worker_lib.SampleWriter:
  """Writes one rollout of each batch as people read it."""

  def write(step: int, rollout: types.Rollout, advantage: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
      file.write(
        f"=== step {step}  {rollout.task_id}  sample {rollout.sample}  "
        f"reward {rollout.reward:.3f}  advantage {advantage:+.3f}\n"
      )
      for trajectory in rollout.trajectories:
        file.write(f"{_readable(shared, trajectory)}\n")

  return write


def _readable(shared: Shared, trajectory: types.Trajectory) -> str:
  """The text of a trajectory; what was sampled stands between ⟦ and ⟧."""
  pieces: list[str] = []
  for sampled, ids in _runs(trajectory):
    text = shared.renderer.decode(ids)
    pieces.append(f"⟦{text}⟧" if sampled else text)
  return "".join(pieces)


def _runs(trajectory: types.Trajectory) -> Iterable[tuple[bool, list[int]]]:
  start = 0
  mask = trajectory.policy_versions != types.NOT_SAMPLED
  for end in range(1, len(mask) + 1):
    if end == len(mask) or mask[end] != mask[start]:
      yield bool(mask[start]), trajectory.tokens[start:end].tolist()
      start = end
