"""What a finished group contributes: advantages, and which rollouts carry no gradient and why.

A filtered rollout is counted with its reason; its reward stays in its group's baseline (only a
failed rollout has no reward, contract 4).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from intellect3.rollouts import credit as credit_lib
from intellect3.rollouts import messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
  """Which rollouts are kept from the batch.

  Attributes:
    zero_advantage: groups in which every advantage is zero (all solved, or none).
    truncated: rollouts that ended for length.
    minimum_advantage: advantages at most this large count as zero.
  """

  zero_advantage: bool = True
  truncated: bool = False
  minimum_advantage: float = 1e-8

  def __post_init__(self) -> None:
    if self.minimum_advantage < 0:
      raise ValueError(f"Filters.minimum_advantage: expected >= 0, got {self.minimum_advantage}")


@dataclasses.dataclass(frozen=True)
class GroupResult:
  """A group after scoring.

  Attributes:
    mean_reward: over the rollouts that did not fail, as the environment gave it; None where all
      failed.
    rewards: rollout id -> reward that the advantages are computed from, of all that did not fail.
    advantages: rollout id -> advantage of each rollout to be trained.
    filtered: rollout id -> reason of each that is not.
  """

  mean_reward: float | None
  rewards: Mapping[int, float]
  advantages: Mapping[int, float]
  filtered: Mapping[int, str]


def evaluate_group(
  summaries: Sequence[messages.RolloutSummary],
  filters: Filters,
  credit: credit_lib.Credit,
  baselines: credit_lib.Baselines,
) -> GroupResult:
  """Scores a complete group. `summaries` holds only rollouts with a reward."""
  if not summaries:
    return GroupResult(None, {}, {}, {})
  ids = [summary.rollout_id for summary in summaries]
  rewards = np.array([summary.reward for summary in summaries], np.float64)
  mean_reward = float(rewards.mean())
  lengths = np.array([summary.sampled_tokens for summary in summaries], np.int64)
  rewards = credit.shaped(rewards, lengths)
  by_id = dict(zip(ids, rewards.tolist(), strict=True))
  if len(summaries) < credit.smallest_group:
    return GroupResult(mean_reward, by_id, {}, dict.fromkeys(ids, "no_baseline"))
  agents = [credit_lib.agent_of(summary.environment, summary.agent) for summary in summaries]
  advantages = credit.advantages(rewards, agents, baselines)
  if filters.zero_advantage and np.all(np.abs(advantages) <= filters.minimum_advantage):
    return GroupResult(mean_reward, by_id, {}, dict.fromkeys(ids, "zero_advantage"))
  kept: dict[int, float] = {}
  filtered: dict[int, str] = {}
  for summary, advantage in zip(summaries, advantages, strict=True):
    if filters.truncated and summary.truncated:
      filtered[summary.rollout_id] = "truncated"
    elif summary.sampled_tokens == 0:
      filtered[summary.rollout_id] = "no_tokens"
    else:
      kept[summary.rollout_id] = float(advantage)
  return GroupResult(mean_reward, by_id, kept, filtered)
