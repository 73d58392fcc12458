"""Advantages of rollouts from the rewards of their group.

Place in the ring: between rollouts and the RolloutLog; the orchestrator calls it on NumPy arrays.
Written against the array API (NumPy in, NumPy out; JAX in, JAX out): importing it imports no array
library.
"""

from typing import Any

Array = Any


def group_mean(rewards_N: Array, group_ids_N: Array) -> Array:
  """Reward minus the mean reward of its group; no division by the standard deviation.

    A_i = R_i - mean_{j in group(i)} R_j

  The baseline of INTELLECT-3 (arXiv 2512.16144) and of Dr. GRPO (arXiv 2503.20783). Groups may be
  ragged and their members may stand in any order. Rewards are centred on one member of their group
  before the mean is taken, so a group of equal rewards gives exactly zero.

  Args:
    rewards_N: floating [N], the reward of each rollout.
    group_ids_N: integer [N], the group of each rollout.

  Returns:
    Advantages [N] in the dtype of the rewards. Time and memory are O(N^2): N is the number of
    rollouts of a batch, a few thousand.

  Raises:
    ValueError: where the shapes differ, or rewards are not floating, or ids are not integers.
  """
  xp = rewards_N.__array_namespace__()
  if rewards_N.ndim != 1 or rewards_N.shape != group_ids_N.shape:
    raise ValueError(
      "group_mean: expected rewards and group ids of one shape [N], got "
      f"{list(rewards_N.shape)} and {list(group_ids_N.shape)}"
    )
  if not xp.isdtype(rewards_N.dtype, "real floating"):
    raise ValueError(f"rewards_N: expected a floating dtype, got {rewards_N.dtype}")
  if not xp.isdtype(group_ids_N.dtype, "integral"):
    raise ValueError(f"group_ids_N: expected an integer dtype, got {group_ids_N.dtype}")
  if rewards_N.shape[0] == 0:
    return rewards_N
  same_NN = xp.astype(group_ids_N[:, None] == group_ids_N[None, :], rewards_N.dtype)
  centred_N = rewards_N - xp.take(rewards_N, xp.argmax(same_NN, axis=1))
  return centred_N - xp.matmul(same_NN, centred_N) / xp.sum(same_NN, axis=1)
