"""Which task comes next: the environment mix, epochs without repetition, and difficulty pools.

INTELLECT-3 (arXiv 2512.16144, section on online data filtering) sorts tasks into easy, normal and
hard pools by the mean reward of their last group, and does not sample again what is solved every
time. Here the pools hold only the tasks that left `normal`, so an environment may have any number
of tasks.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any


class NoTasksLeft(RuntimeError):
  """A whole epoch passed without one task that the pools allow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pools:
  """Difficulty pools of one run.

  Attributes:
    easy_threshold: a group whose mean reward is at least this moves its task to `easy`.
    hard_threshold: at most this, to `hard`; in between, back to `normal`. None switches a pool off.
    easy_fraction: share of dispatches drawn from `easy` (0: solved tasks are not sampled again).
    hard_fraction: share drawn from `hard`; the rest comes from `normal`.
  """

  easy_threshold: float | None = None
  hard_threshold: float | None = None
  easy_fraction: float = 0.0
  hard_fraction: float = 0.0

  def __post_init__(self) -> None:
    for field in ("easy_fraction", "hard_fraction"):
      value = getattr(self, field)
      if not 0.0 <= value <= 1.0:
        raise ValueError(f"Pools.{field}: expected a share in [0, 1], got {value}")
    if self.easy_fraction + self.hard_fraction > 1.0:
      raise ValueError(
        "Pools.easy_fraction + hard_fraction: expected at most 1, "
        f"got {self.easy_fraction + self.hard_fraction}"
      )
    easy, hard = self.easy_threshold, self.hard_threshold
    if easy is not None and hard is not None and hard >= easy:
      raise ValueError(f"Pools.hard_threshold: expected below easy_threshold {easy}, got {hard}")

  def pool_of(self, mean_reward: float) -> str:
    """The pool of a task whose group had this mean reward."""
    if self.easy_threshold is not None and mean_reward >= self.easy_threshold:
      return "easy"
    if self.hard_threshold is not None and mean_reward <= self.hard_threshold:
      return "hard"
    return "normal"


class TaskSampler:
  """Draws (environment, task index) pairs; deterministic in seed, state and draw.

  Args:
    sizes: environment name -> number of training tasks.
    weights: environment name -> share of the dispatches (need not sum to 1).
    pools: the difficulty pools.
    seed: run seed.
  """

  def __init__(
    self, sizes: Mapping[str, int], weights: Mapping[str, float], pools: Pools, seed: int
  ) -> None:
    if set(sizes) != set(weights):
      raise ValueError(f"weights: expected the environments {sorted(sizes)}, got {sorted(weights)}")
    for name, size in sizes.items():
      if size < 1 or weights[name] < 0:
        raise ValueError(
          f"{name}: expected at least one task and a weight >= 0, got {size}, {weights[name]}"
        )
    self._names = sorted(sizes)
    self._sizes = dict(sizes)
    self._weights = [weights[name] for name in self._names]
    self._pools = pools
    self._seed = seed
    self._cursor = dict.fromkeys(self._names, 0)
    self._epochs: dict[str, tuple[int, int, int]] = {}  # the last one used, its stride and offset
    self._members: dict[str, dict[int, str]] = {name: {} for name in self._names}

  def draw(self, group_id: int) -> tuple[str, int]:
    """The task of a new group; raises NoTasksLeft where every task is in a pool of share 0."""
    rng = random.Random(f"{self._seed}/task/{group_id}")
    name = rng.choices(self._names, self._weights)[0]
    share = rng.random()
    fractions = {"easy": self._pools.easy_fraction, "hard": self._pools.hard_fraction}
    for pool, fraction in fractions.items():
      if 0 <= share < fraction and (members := self._in_pool(name, pool)):
        return name, rng.choice(members)
      share -= fraction  # below 0: it was this pool's, and there is nothing in it
    index = self._next_normal(name)
    if index is not None:
      return name, index
    for pool, fraction in fractions.items():  # no normal task is left: what else may be sampled
      if fraction > 0 and (members := self._in_pool(name, pool)):
        return name, rng.choice(members)
    raise NoTasksLeft(
      f"environment {name}: none of its {self._sizes[name]} tasks is normal any more, the pools "
      f"hold {self.counts()} and their shares are 0; change Pools, or end the run here"
    )

  def _in_pool(self, name: str, pool: str) -> list[int]:
    return sorted(index for index, member in self._members[name].items() if member == pool)

  def _next_normal(self, name: str) -> int | None:
    """The next task of the epoch that is in no pool; None after a whole epoch without one."""
    members = self._members[name]
    # What is left of this epoch, then a whole one: so many tasks in a row need not be all of them,
    # as each epoch has its own order.
    for _ in range(2 * self._sizes[name]):
      index = self._permuted(name, self._cursor[name])
      self._cursor[name] += 1
      if index not in members:
        return index
    return None

  def _permuted(self, name: str, cursor: int) -> int:
    """An affine permutation of the tasks, another one each epoch: no repetition inside an epoch."""
    size = self._sizes[name]
    epoch, position = divmod(cursor, size)
    if self._epochs.get(name, (-1, 0, 0))[0] != epoch:
      rng = random.Random(f"{self._seed}/epoch/{name}/{epoch}")
      # A stride near the golden section spreads neighbours; it must share no factor with the size.
      stride = max(1, int(size * rng.uniform(0.55, 0.68)))
      while math.gcd(stride, size) != 1:
        stride += 1
      self._epochs[name] = epoch, stride, rng.randrange(size)
    _, stride, offset = self._epochs[name]
    return (position * stride + offset) % size

  def update(self, name: str, index: int, mean_reward: float) -> None:
    """Moves a task to the pool that its group's mean reward asks for."""
    pool = self._pools.pool_of(mean_reward)
    if pool == "normal":
      self._members[name].pop(index, None)
    else:
      self._members[name][index] = pool

  def counts(self) -> dict[str, int]:
    """Tasks in the `easy` and in the `hard` pool."""
    pools = [pool for members in self._members.values() for pool in members.values()]
    return {"easy": pools.count("easy"), "hard": pools.count("hard")}

  def state(self) -> dict[str, Any]:
    """JSON-able state."""
    members = {
      name: sorted([index, pool] for index, pool in tasks.items())
      for name, tasks in self._members.items()
    }
    return {"cursor": dict(self._cursor), "members": members}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from `state`; raises where the environments differ."""
    if set(state["cursor"]) != set(self._names):
      raise ValueError(
        f"environments: the run had {sorted(state['cursor'])}, the config has {self._names}"
      )
    self._cursor = dict(state["cursor"])
    self._members = {
      name: {int(index): pool for index, pool in tasks} for name, tasks in state["members"].items()
    }
