"""A group, the rollouts of one task that share a baseline, as the scheduler keeps it.

Rollout ids are numbers: those of group g are g * size to (g + 1) * size - 1. So what was
dispatched follows from a group's number and its task, in this process or in a later one.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from intellect3.rollouts import credit, filters, messages
from intellect3.rollouts.scheduler_settings import Settings


@dataclasses.dataclass
class Group:
  """One group.

  Attributes:
    group_id: its number, in dispatch order.
    environment: of its task.
    index: of its task among the environment's training tasks.
    running: rollouts that have not finished.
    summaries: of those that have, and did not fail.
    result: its scores, once none runs.
    baselines: what it is compared with, also if it is scored again.
    credited: whether its rewards have entered the baselines.
  """

  group_id: int
  environment: str
  index: int
  running: set[int]
  summaries: dict[int, messages.RolloutSummary] = dataclasses.field(default_factory=dict)
  result: filters.GroupResult | None = None
  baselines: credit.Baselines | None = None
  credited: bool = False

  def state(self, in_flight: Iterable[int]) -> dict[str, Any]:
    """JSON-able: what another process needs to go on with it.

    Args:
      in_flight: its rollouts that have not ended; they are started again. Of those that have, the
        rewards stay in the baseline.
    """
    open_ids = list(in_flight)
    ended = [summary for key, summary in self.summaries.items() if key not in open_ids]
    return {
      "group_id": self.group_id,
      "environment": self.environment,
      "index": self.index,
      "in_flight": open_ids,
      "ended": [msgspec.to_builtins(summary) for summary in ended],
      "baselines": None if self.baselines is None else dict(self.baselines),
      "credited": self.credited,
    }

  @classmethod
  def restore(cls, state: Mapping[str, Any]) -> "Group":
    """The group of `state`, its rollouts in flight not yet started again."""
    ended = [msgspec.convert(each, messages.RolloutSummary) for each in state["ended"]]
    baselines = state["baselines"]
    return cls(
      state["group_id"],
      state["environment"],
      state["index"],
      set(state["in_flight"]),
      {summary.rollout_id: summary for summary in ended},
      baselines=None if baselines is None else credit.restored(baselines),
      credited=state["credited"],
    )


def members(group_id: int, size: int) -> range:
  """The rollout ids of a group."""
  return range(group_id * size, (group_id + 1) * size)


def dispatch(
  group: Group, rollout_id: int, settings: Settings, *, continued: bool
) -> messages.Dispatch:
  """What starts a rollout of a group; the same in every process, but for its attempt."""
  sample = rollout_id % settings.rollouts_per_prompt
  return messages.Dispatch(
    rollout_id=rollout_id,
    group_id=group.group_id,
    sample=sample,
    environment=group.environment,
    split="train",
    index=group.index,
    seed=rollout_seed(settings.seed, group.environment, group.index, group.group_id, sample),
    temperature=settings.temperature,
    attempt=int(continued),
  )


def rollout_seed(run_seed: int, environment: str, index: int, group_id: int, sample: int) -> int:
  """A 63-bit seed from (run seed, task, group, sample); stable over processes and versions."""
  text = f"{run_seed}/{environment}/{index}/{group_id}/{sample}"
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
