"""Credit: from the rewards of a finished group to the advantages of its rollouts.

Place in the ring: the scheduler asks when a group is complete, and tells of all rewards when a
batch is committed. Two things are a run's choice:

- `reward_fn` reshapes the rewards first, by the lengths of the rollouts
  (`losses.advantages.length_penalty`). Pools and the metric `reward` keep the environment's own.
- `advantage_fn` is a function of rewards and group ids (`losses.advantages.group_mean`, and so on),
  which compares the rollouts of one group, or a `MovingBaseline`, which compares each with what its
  agent has earned so far and so has a state.

The state is a value: it changes only at a commit, is written into the batch's manifest, and a
restart goes on from there. So all rollouts of a batch, and in the synchronous loop of a step, are
compared with the same baselines, whoever finished first.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from intellect3.losses import advantages

AdvantageFn = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rewards float64[N], group_ids int64[N]) -> advantages float64[N]; called on one group."""

RewardFn = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rewards float64[N], lengths int64[N]) -> rewards float64[N]; called on one group."""

Baselines = Mapping[str, float]
"""The mean reward of each agent that has had one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingBaseline:
  """Advantages over a moving average of the agent's rewards: `losses.advantages.moving_baseline`.

  An agent is an environment, or a part that the policy plays in it (`types.Task.agent`). A group of
  one rollout has a baseline too.

  Attributes:
    decay: weight of the past after one more reward, 0 <= decay < 1.
  """

  decay: float = 0.95

  def __post_init__(self) -> None:
    if isinstance(self.decay, bool) or not 0 <= self.decay < 1:
      raise ValueError(f"MovingBaseline.decay: expected in [0, 1), got {self.decay}")

  def __call__(
    self, rewards_N: np.ndarray, agents: Sequence[str], baselines: Baselines
  ) -> tuple[np.ndarray, Baselines]:
    """Advantages float64[N], and the baselines after these rewards.

    Args:
      rewards_N: float64[N].
      agents: the agent of each rollout.
      baselines: before; an agent that is not there has none yet.
    """
    names = sorted({*agents, *baselines})
    slots = {name: slot for slot, name in enumerate(names)}
    ids_N = np.array([slots[agent] for agent in agents], np.int64)
    before_M = np.array([baselines.get(name, np.nan) for name in names], np.float64)
    advantages_N, after_M = advantages.moving_baseline(rewards_N, ids_N, before_M, decay=self.decay)
    return advantages_N, dict(zip(names, after_M.tolist(), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credit:
  """How a run gives credit.

  Attributes:
    advantage_fn: from rewards to advantages.
    reward_fn: reshapes rewards by lengths first; None leaves them as they are.
  """

  advantage_fn: AdvantageFn | MovingBaseline = advantages.group_mean
  reward_fn: RewardFn | None = None

  @property
  def smallest_group(self) -> int:
    """Rollouts that a group needs for a baseline."""
    return 1 if isinstance(self.advantage_fn, MovingBaseline) else 2

  def shaped(self, rewards_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """The rewards that advantages are computed from, float64[N]."""
    if self.reward_fn is None:
      return rewards_N
    return _fitting("reward_fn", self.reward_fn(rewards_N, lengths_N), rewards_N)

  def advantages(
    self, rewards_N: np.ndarray, agents: Sequence[str], baselines: Baselines
  ) -> np.ndarray:
    """Advantages of one group, float64[N]."""
    if isinstance(self.advantage_fn, MovingBaseline):
      given, _ = self.advantage_fn(rewards_N, agents, baselines)
    else:
      given = self.advantage_fn(rewards_N, np.zeros(len(rewards_N), np.int64))
    return _fitting("advantage_fn", given, rewards_N)

  def moved(self, baselines: Baselines, rewards_N: np.ndarray, agents: Sequence[str]) -> Baselines:
    """The baselines after all rewards that came in between two commits."""
    if not isinstance(self.advantage_fn, MovingBaseline) or not len(rewards_N):
      return baselines
    _, after = self.advantage_fn(rewards_N, agents, baselines)
    return after

  def check(self) -> None:
    """Tries the functions on a group of four.

    Raises:
      ValueError: one is no function of what it will be given, or gives what is no fit.
    """
    rewards_N = np.array([0.0, 1.0, 0.5, 1.0])
    for field, expected, attempt in (
      (
        "reward_fn",
        "a function of rewards [N] and lengths [N], or None",
        lambda: self.shaped(rewards_N, np.array([3, 1, 4, 2], np.int64)),
      ),
      (
        "advantage_fn",
        "a function of rewards [N] and group ids [N], or a credit.MovingBaseline",
        lambda: self.advantages(rewards_N, ["agent"] * 4, {}),
      ),
    ):
      try:
        attempt()
      except Exception as error:  # a run's own function: whatever it raises, it does not fit
        given = getattr(self, field)
        name = getattr(given, "__name__", repr(given))
        raise ValueError(f"{field}: expected {expected}, got {name}: {error}") from error


def agent_of(environment: str, agent: str) -> str:
  """The name that baselines are kept by: environments never share an agent."""
  return f"{environment}/{agent}" if agent else environment


def restored(state: Any) -> Baselines:
  """The baselines of a manifest; raises ValueError where they are none."""
  fits = isinstance(state, Mapping) and all(
    isinstance(name, str) and isinstance(value, int | float) and np.isfinite(value)
    for name, value in state.items()
  )
  if not fits:
    raise ValueError(f"baselines: expected finite numbers by agent, got {state!r}")
  return {name: float(value) for name, value in state.items()}


def _fitting(field: str, given: Any, rewards_N: np.ndarray) -> np.ndarray:
  array = np.asarray(given)
  if array.shape != rewards_N.shape or array.dtype.kind != "f" or not np.all(np.isfinite(array)):
    raise ValueError(
      f"{field}: expected finite floating numbers of shape {list(rewards_N.shape)}, got {given!r}"
    )
  return array
