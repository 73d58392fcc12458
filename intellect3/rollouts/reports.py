"""What the orchestrator tells of its work: metrics rows, manifests and evaluation scores."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intellect3 import types
from intellect3.rollouts import messages
from intellect3.rollouts.scheduler import BatchPlan, Scheduler


class Window:
  """Gathers what happened between two commits, for the metrics row of the later one."""

  def __init__(self) -> None:
    self._started = 0.0
    self._finished: list[messages.RolloutSummary] = []
    self._scored: list[messages.RolloutSummary] = []  # of groups that no row has told of yet
    self._syncs: list[tuple[float, Mapping[str, float]]] = []

  def start(self, now: float) -> None:
    """Begins a window at `now`, in seconds of the event loop."""
    self._started = now
    self._finished, self._syncs = [], []

  def add_finished(self, summary: messages.RolloutSummary) -> None:
    """A training rollout finished (or failed)."""
    self._finished.append(summary)
    if summary.reward is not None:
      self._scored.append(summary)

  def add_sync(self, seconds: float, metrics: Mapping[str, float]) -> None:
    """A weight sync ended, with what it says of its parts."""
    self._syncs.append((seconds, metrics))

  def close(
    self, plan: BatchPlan, scheduler: Scheduler, now: float, servers: Mapping[str, float]
  ) -> dict[str, float]:
    """The metrics row of the step just committed; begins the next window.

    Args:
      plan: the batch.
      scheduler: after the commit.
      now: seconds of the event loop.
      servers: what the servers counted in this window.
    """
    seconds = now - self._started
    sampled = sum(summary.sampled_tokens for summary in self._finished)
    # A group's rewards belong to the row of its batch; one that the filters kept out of every
    # batch to the next row. So `reward` is over all that was sampled, filtered or not.
    scored: list[messages.RolloutSummary] = []
    still_open: list[messages.RolloutSummary] = []
    for summary in self._scored:
      (still_open if scheduler.is_open_group(summary.group_id) else scored).append(summary)
    self._scored = still_open
    row: dict[str, float] = {
      "collect_seconds": seconds,
      "sampled_tokens": sampled,
      "sampled_tokens_per_second": sampled / max(seconds, 1e-9),
      **_batch_metrics(plan),
      **{key: float(count) for key, count in scheduler.accounting.counts().items()},
      **{f"ended/{key}": float(n) for key, n in scheduler.accounting.reasons().items()},
      **{f"pool/{key}": float(n) for key, n in scheduler.pool_counts().items()},
      **scheduler.credit_metrics([summary.rollout_id for summary in scored]),
      **_stale_by_length(scheduler.take_ended_lengths()),
      "reprefilled_tokens/continued": float(sum(s.reprefilled_tokens for s in self._finished)),
      **servers,
    }
    if self._finished:
      # By Little's law, over windows: what took so long was so many at once.
      spent = sum(summary.seconds for summary in self._finished)
      row["rollout_seconds_mean"] = spent / len(self._finished)
      row["rollouts_running"] = spent / max(seconds, 1e-9)
    if scored:
      row["rollout_seconds"] = statistics.median(summary.seconds for summary in scored)
      row |= _rewards(scored)
    if self._syncs:
      row["weight_sync_seconds"] = statistics.median(seconds for seconds, _ in self._syncs)
      for key in dict.fromkeys(key for _, metrics in self._syncs for key in metrics):
        row[key] = statistics.median(m[key] for _, m in self._syncs if key in m)
    self.start(now)
    return row


def _batch_metrics(plan: BatchPlan) -> dict[str, float]:
  staleness = [plan.step - 1 - summary.oldest_version for summary in plan.summaries]
  spanning = sum(s.newest_version > s.oldest_version for s in plan.summaries)
  return {
    "batch_reward": _rewards(plan.summaries)["reward"],
    "batch_rollouts": float(len(plan.summaries)),
    "batch_tokens": float(sum(sum(summary.lengths) for summary in plan.summaries)),
    "staleness_mean": float(np.mean(staleness)),
    "staleness_max": float(max(staleness)),
    "rollouts_spanning_versions": float(spanning),
    "truncated_share": float(np.mean([summary.truncated for summary in plan.summaries])),
    "sampled_length_mean": float(np.mean([s.sampled_tokens for s in plan.summaries])),
  }


def _stale_by_length(ended: Sequence[tuple[int, str]]) -> dict[str, float]:
  """Share dropped as stale per decile of sampled length; only where something was dropped."""
  if not any(outcome == "stale" for _, outcome in ended):
    return {}
  lengths = np.array([length for length, _ in ended])
  stale = np.array([outcome == "stale" for _, outcome in ended])
  edges = np.quantile(lengths, np.linspace(0.1, 0.9, 9))
  decile = np.searchsorted(edges, lengths, side="left")
  return {
    f"stale_share/length_decile_{index}": float(stale[decile == index].mean())
    for index in range(10)
    if np.any(decile == index)
  }


def manifest(
  plan: BatchPlan,
  shards: Sequence[types.ShardEntry],
  metrics: Mapping[str, float],
  scheduler_state: Mapping[str, Any],
) -> types.Manifest:
  """The commit record of a batch whose shards are all written."""
  return types.Manifest(
    step=plan.step,
    shards=shards,
    num_rollouts=len(plan.advantages),
    num_groups=len(plan.group_ids),
    loss_tokens=sum(sum(shard.loss_tokens) for shard in shards),
    oldest_version=min(max(s.oldest_version, plan.oldest_version) for s in plan.summaries),
    newest_version=max(summary.newest_version for summary in plan.summaries),
    metrics=metrics,
    scheduler_state=scheduler_state,
  )


def evaluation(summaries: Sequence[messages.RolloutSummary]) -> dict[str, float]:
  """Mean reward, overall and per environment; failed attempts are counted, never scored 0."""
  scored = [summary for summary in summaries if summary.reward is not None]
  row = {"tasks": float(len(summaries)), "errored": float(len(summaries) - len(scored))}
  return row | (_rewards(scored) if scored else {})


def _rewards(scored: Sequence[messages.RolloutSummary]) -> dict[str, float]:
  """Mean reward, overall and by environment."""
  by_name: dict[str, list[float]] = {}
  for summary in scored:
    by_name.setdefault(summary.environment, []).append(summary.reward or 0.0)
  row = {f"reward/{name}": float(np.mean(rewards)) for name, rewards in sorted(by_name.items())}
  return {"reward": float(np.mean([r for rewards in by_name.values() for r in rewards])), **row}
