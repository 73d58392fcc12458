"""Difficulty pools, judged from outside: what is in them was earned, and what is out stays out."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from intellect3 import types
from intellect3.rollouts import difficulty, messages

POOLS: Mapping[str, difficulty.Pools | None] = {
  "": None,
  "easy": difficulty.Pools(easy_threshold=0.7),
  "both": difficulty.Pools(
    easy_threshold=0.8, hard_threshold=0.4, easy_fraction=0.2, hard_fraction=0.3
  ),
}
"""Of a schedule, by name."""


@dataclasses.dataclass
class _Group:
  index: int
  rewards: dict[int, float] = dataclasses.field(default_factory=dict)


class Judge:
  """What workers told of groups, held against the pools that manifests tell of."""

  def __init__(self, pools: difficulty.Pools | None, tasks: int, rollouts_per_prompt: int) -> None:
    """Args: pools: of the run. tasks: of its environment. rollouts_per_prompt: size of a group."""
    self._pools = pools
    self._tasks = tasks
    self._size = rollouts_per_prompt
    self._groups: dict[int, _Group] = {}  # the newest of each number: a resume begins some again
    self._earned: dict[int, set[str]] = {}
    self._members: Mapping[int, str] = {}
    self._told: tuple[set[int], set[int]] = (set(), set())  # since the last commit; before it

  @property
  def used(self) -> bool:
    """Whether a committed batch found any task in a pool."""
    return bool(self._members)

  def dispatched(self, dispatch: messages.Dispatch) -> str | None:
    """A rollout is sent; returns what is wrong with that."""
    group = self._groups.get(dispatch.group_id)
    # A restart begins a number again: with its task, or with another where other pools are there.
    fresh = dispatch.sample == 0 and not dispatch.continued
    if group is None or fresh or group.index != dispatch.index:
      self._groups[dispatch.group_id] = _Group(dispatch.index)
    may_have_moved = dispatch.index in self._told[0] | self._told[1]
    if self._pools is None or dispatch.continued or may_have_moved:
      return None
    if len(self._members) >= self._tasks:
      return None
    fraction = {"easy": self._pools.easy_fraction, "hard": self._pools.hard_fraction}
    pool = self._members.get(dispatch.index)
    if pool is not None and fraction[pool] == 0.0:
      return f"pools: task {dispatch.index} is {pool} and is sampled again"
    return None

  def summarized(self, summary: messages.RolloutSummary) -> None:
    """A worker told of a rollout."""
    group = self._groups.get(summary.rollout_id // self._size)
    if group is None or self._pools is None or summary.reward is None:
      return
    group.rewards[summary.rollout_id] = summary.reward
    self._told[0].add(group.index)
    # Some of the group may be lost before it is scored, or after.
    earned = {_pool(self._pools, sum(some) / len(some)) for some in _some(group.rewards)}
    self._earned.setdefault(group.index, set()).update(earned)

  def commits(self, manifest: types.Manifest) -> str | None:
    """A batch is made visible; returns what is wrong with its pools."""
    self._told = set(), self._told[0]
    sampler: Mapping[str, Any] = manifest.scheduler_state["sampler"]
    self._members = {index: pool for _, rows in sampler["members"].items() for index, pool in rows}
    for index, pool in self._members.items():
      if pool not in self._earned.get(index, set()):
        earned = sorted(self._earned.get(index, set()))
        return f"pools: task {index} is {pool}, its groups were {earned}"
    return None


def _pool(pools: difficulty.Pools, mean: float) -> str:
  if pools.easy_threshold is not None and mean >= pools.easy_threshold:
    return "easy"
  return "hard" if pools.hard_threshold is not None and mean <= pools.hard_threshold else "normal"


def _some(rewards: Mapping[int, float]) -> Iterator[Sequence[float]]:
  """Every choice of at least one of them."""
  values = list(rewards.values())
  for count in range(1, len(values) + 1):
    yield from itertools.combinations(values, count)
