"""Advantages of rollouts from their rewards, and rewards that mind the length.

Place in the ring: between rollouts and the RolloutLog; the orchestrator calls them on NumPy arrays.
Written against the array API (NumPy in, NumPy out; JAX in, JAX out, also under jit): importing this
module imports no array library.

Rollouts are told apart by explicit group ids, in any order, in groups of any sizes. Everything is
computed on the rollouts sorted by (group, value), so the result is a function of each group alone:
the same to the bit however rollouts are ordered (in one array library) and whatever other groups
are there. Time is O(N log N), memory O(N).
"""

import sys
from typing import Any, NamedTuple

Array = Any


def group_mean(rewards_N: Array, group_ids_N: Array) -> Array:
  """Reward minus the mean reward of its group; no division by the standard deviation.

    A_i = R_i - mean_{j in group(i)} R_j

  The baseline of INTELLECT-3 (arXiv 2512.16144) and of Dr. GRPO (arXiv 2503.20783). Its expected
  gradient is (G-1)/G of the policy gradient, because the baseline holds the rollout's own reward.

  Args:
    rewards_N: floating [N], the reward of each rollout.
    group_ids_N: integer [N], the group of each rollout.

  Returns:
    Advantages [N] in the dtype of the rewards; exactly zero in a group of equal rewards.

  Raises:
    ValueError: where the shapes differ, or rewards are not floating, or ids are not integers.
  """
  xp = _namespace("group_mean", rewards_N, group_ids_N=group_ids_N)
  if rewards_N.shape[0] == 0:
    return rewards_N
  groups = _by_group(xp, rewards_N, group_ids_N)
  return _in_given_order(xp, groups, _centred(xp, groups))


def group_standardised(
  rewards_N: Array, group_ids_N: Array, *, epsilon: float = 1e-6, ddof: int = 1
) -> Array:
  """Reward minus the mean of its group, over the standard deviation of its group.

    A_i = (R_i - mean(R)) / (std(R) + epsilon),   std(R)^2 = sum_j (R_j - mean(R))^2 / (G - ddof)

  GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2). The paper writes std(R) and says neither the
  divisor nor epsilon; the common implementations (TRL, verl) take G-1, the default here. Groups
  that are nearly always, or nearly never, solved get larger advantages than by `group_mean`, which
  is the bias that Dr. GRPO removes.

  Args:
    rewards_N: floating [N], the reward of each rollout.
    group_ids_N: integer [N], the group of each rollout.
    epsilon: added to the standard deviation, in units of the reward.
    ddof: 1 divides the sum of squares by G-1, 0 by G.

  Returns:
    Advantages [N] in the dtype of the rewards; exactly zero in a group of equal rewards, or of one.

  Raises:
    ValueError: where the arrays do not fit (see `group_mean`), epsilon <= 0, or ddof is another.
  """
  xp = _namespace("group_standardised", rewards_N, group_ids_N=group_ids_N)
  if not 0 < epsilon < float("inf"):
    raise ValueError(f"epsilon: expected finite and > 0, got {epsilon}")
  if ddof not in (0, 1):
    raise ValueError(f"ddof: expected 0 or 1, got {ddof}")
  if rewards_N.shape[0] == 0:
    return rewards_N
  groups = _by_group(xp, rewards_N, group_ids_N)
  centred_N = _centred(xp, groups)
  squares_N = _group_sums(xp, groups, centred_N * centred_N)
  std_N = xp.sqrt(squares_N / xp.maximum(groups.size_N - ddof, xp.ones_like(groups.size_N)))
  return _in_given_order(xp, groups, centred_N / (std_N + epsilon))


def leave_one_out(rewards_N: Array, group_ids_N: Array) -> Array:
  """Reward minus the mean reward of the others of its group.

    A_i = R_i - 1/(G-1) sum_{j != i} R_j = G/(G-1) (R_i - mean(R))

  RLOO (arXiv 2402.14740; first Kool, van Hoof and Welling 2019). The baseline does not depend on
  the rollout that it is subtracted from, so the policy gradient is unbiased. A group of one has no
  others and gets 0, which the paper leaves open.

  Args:
    rewards_N: floating [N], the reward of each rollout.
    group_ids_N: integer [N], the group of each rollout.

  Returns:
    Advantages [N] in the dtype of the rewards; exactly zero in a group of equal rewards, or of one.

  Raises:
    ValueError: where the arrays do not fit; see `group_mean`.
  """
  xp = _namespace("leave_one_out", rewards_N, group_ids_N=group_ids_N)
  if rewards_N.shape[0] == 0:
    return rewards_N
  groups = _by_group(xp, rewards_N, group_ids_N)
  others_N = xp.maximum(groups.size_N - 1, xp.ones_like(groups.size_N))
  return _in_given_order(xp, groups, _centred(xp, groups) * groups.size_N / others_N)


def mean_normalised(rewards_N: Array, group_ids_N: Array) -> Array:
  """Reward minus the mean of its group, over that mean: hard tasks weigh more.

    A_i = (R_i - mean(R)) / mean(R)   where mean(R) > 0, else 0

  MaxRL (arXiv 2602.02710), for rewards >= 0, as a rule 0 or 1: a task solved with probability p
  weighs about 1/p, as in maximum likelihood. With success p and G rollouts of rewards 0 or 1 the
  expected gradient of the mean of A_i log pi_i is that of

    sum_{k=1}^{G-1} (1/k) pass@k,   pass@k = 1 - (1-p)^k

  the expansion of log p cut off after G-1 terms. (The paper's estimator divides by the number of
  successes and reaches term G; subtracting the mean, its control variate, only where the mean is
  positive, as prime-rl's max_rl does too, costs the last term. Tests hold this by enumeration.)

  Args:
    rewards_N: floating [N], the reward of each rollout.
    group_ids_N: integer [N], the group of each rollout.

  Returns:
    Advantages [N] in the dtype of the rewards; exactly zero in a group of equal rewards, and where
    the mean is not positive.

  Raises:
    ValueError: where the arrays do not fit; see `group_mean`.
  """
  xp = _namespace("mean_normalised", rewards_N, group_ids_N=group_ids_N)
  if rewards_N.shape[0] == 0:
    return rewards_N
  groups = _by_group(xp, rewards_N, group_ids_N)
  lowest_N = xp.take(groups.values_N, groups.first_N)
  mean_N = lowest_N + _group_sums(xp, groups, groups.values_N - lowest_N) / groups.size_N
  silent_N = mean_N <= 0
  divisor_N = xp.where(silent_N, xp.ones_like(mean_N), mean_N)
  centred_N = _centred(xp, groups)
  advantages_N = xp.where(silent_N, xp.zeros_like(centred_N), centred_N / divisor_N)
  return _in_given_order(xp, groups, advantages_N)


def moving_baseline(
  rewards_N: Array, agent_ids_N: Array, baselines_M: Array, *, decay: float
) -> tuple[Array, Array]:
  """Reward minus an exponential moving average of its agent's earlier rewards.

    A_i = R_i - b_{agent(i)},   b_m' = decay^n b_m + (1 - decay^n) mean_{i of m} R_i

  with n the rewards of agent m in this call. Role-conditioned advantage estimation (RAE) of SPIRAL
  (arXiv 2506.24119), for self-play and whatever else has no meaningful group: one baseline for each
  game and role. Deviations from the paper:

  - The paper updates a baseline with one rollout after another, b <- decay b + (1 - decay) R, so
    the result depends on their order. Here the n rewards of a call share, equally, the weight
    1 - decay^n that they have together: the mean over all orders, and independent of the order.
  - The paper lists the update before the subtraction, by which a reward enters its own baseline.
    Here all are compared with the baseline from before the call (prime-rl does so too), so it is
    independent of the rollout and the gradient is unbiased.
  - The paper begins with 0, which takes 1/(1-decay) rewards to forget. Baselines of zero do the
    same here; NaN means that the agent has none yet. Then b' is the mean of its first rewards (no
    bias to correct), and these rewards are compared with the mean of the agent's others in the
    call, which does not depend on the rollout either (0, as in the paper, where there is none).

  Args:
    rewards_N: floating [N], the reward of each rollout.
    agent_ids_N: integer [N], 0 <= id < M, whose baseline each rollout is compared with.
    baselines_M: floating [M], of the rewards' dtype; NaN where an agent has none yet.
    decay: weight of the past after one more reward, 0 <= decay < 1; the paper takes 0.95.

  Returns:
    Advantages [N] and the baselines [M] after the call, in the dtype of the rewards. An agent
    without rewards here keeps its baseline, to the bit. Under jit, where ids cannot be looked at,
    one that is not in [0, M) has the advantage NaN and changes no baseline.

  Raises:
    ValueError: where the arrays do not fit (see `group_mean`), or decay or an id is out of range.
  """
  xp = _namespace("moving_baseline", rewards_N, agent_ids_N=agent_ids_N)
  if baselines_M.ndim != 1 or baselines_M.dtype != rewards_N.dtype:
    raise ValueError(
      f"baselines_M: expected {rewards_N.dtype}[M], "
      f"got {baselines_M.dtype}{list(baselines_M.shape)}"
    )
  if not 0 <= decay < 1:
    raise ValueError(f"decay: expected in [0, 1), got {decay}")
  if rewards_N.shape[0] == 0:
    return rewards_N, baselines_M
  agents = baselines_M.shape[0]
  known_N = (agent_ids_N >= 0) & (agent_ids_N < agents)
  if not _is_traced(known_N) and not xp.all(known_N):
    wrong = agent_ids_N[xp.argmin(xp.astype(known_N, agent_ids_N.dtype))]
    raise ValueError(f"agent_ids_N: expected ids from 0 to {agents - 1}, got {int(wrong)}")

  groups = _by_group(xp, rewards_N, agent_ids_N)
  centred_N = _centred(xp, groups)
  mean_N = groups.values_N - centred_N
  others_N = groups.size_N - 1
  alone_N = others_N == 0
  loo_N = centred_N * groups.size_N / xp.where(alone_N, xp.ones_like(others_N), others_N)
  first_time_N = xp.where(alone_N, groups.values_N, loo_N)
  slots_N = xp.clip(groups.ids_N, 0, max(agents - 1, 0))
  baseline_N = xp.take(baselines_M, slots_N) if agents else xp.zeros_like(groups.values_N)
  has_none_N = xp.isnan(baseline_N)
  later_N = groups.values_N - xp.where(has_none_N, groups.values_N, baseline_N)
  advantages_N = xp.where(has_none_N, first_time_N, later_N)
  if _is_traced(known_N):
    known_N = (groups.ids_N >= 0) & (groups.ids_N < agents)
    advantages_N = xp.where(known_N, advantages_N, xp.full_like(advantages_N, float("nan")))

  ids_M = xp.arange(agents)
  begin_M = xp.searchsorted(groups.ids_N, ids_M, side="left")
  seen_M = xp.searchsorted(groups.ids_N, ids_M, side="right") > begin_M
  at_M = xp.where(seen_M, begin_M, xp.zeros_like(begin_M))
  mean_M, count_M = xp.take(mean_N, at_M), xp.take(groups.size_N, at_M)
  before_M = xp.where(xp.isnan(baselines_M), mean_M, baselines_M)
  moved_M = mean_M + decay**count_M * (before_M - mean_M)
  return _in_given_order(xp, groups, advantages_N), xp.where(seen_M, moved_M, baselines_M)


def length_penalty(
  rewards_N: Array,
  lengths_N: Array,
  *,
  max_length: int,
  buffer_length: int,
  coefficient: float = 1.0,
) -> Array:
  """Reward minus a penalty that grows over the last `buffer_length` tokens before `max_length`.

    R_i - coefficient * clip((L_i - (max_length - buffer_length)) / buffer_length, 0, 1)

  DAPO's soft overlong punishment (arXiv 2503.14476, equation 13, which has coefficient 1), applied
  to rewards before the baseline. It does not depend on the other rollouts.

  Args:
    rewards_N: floating [N], the reward of each rollout.
    lengths_N: integer [N], its sampled tokens.
    max_length: length at and beyond which the penalty is full, in tokens.
    buffer_length: tokens over which it grows, from 1 to max_length.
    coefficient: the full penalty, in units of the reward.

  Returns:
    Rewards [N] in the dtype of the rewards.

  Raises:
    ValueError: where the arrays do not fit (see `group_mean`), or a parameter is out of range.
  """
  xp = _namespace("length_penalty", rewards_N, lengths_N=lengths_N)
  if not 1 <= buffer_length <= max_length:
    raise ValueError(
      f"buffer_length: expected from 1 to max_length {max_length}, got {buffer_length}"
    )
  if not 0 <= coefficient < float("inf"):
    raise ValueError(f"coefficient: expected finite and >= 0, got {coefficient}")
  free = max_length - buffer_length
  over_N = xp.where(lengths_N > free, lengths_N - free, xp.zeros_like(lengths_N))
  share_N = xp.astype(xp.clip(over_N, 0, buffer_length), rewards_N.dtype) / buffer_length
  return rewards_N - coefficient * share_N


def relative_length_penalty(
  rewards_N: Array,
  lengths_N: Array,
  group_ids_N: Array | None = None,
  *,
  coefficient: float,
  solved_reward: float = 1.0,
) -> Array:
  """Reward plus a bonus for the shorter, and a malus for the longer rollouts of a group.

    s_i = 1/2 - (L_i - min L) / (max L - min L)
    R_i + coefficient * (s_i where R_i >= solved_reward, else min(0, s_i))

  The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): a wrong answer gains nothing by
  being short. No change where all lengths of a group are equal. The paper raises the coefficient
  over the run ("warm-up"); here it is constant.

  Args:
    rewards_N: floating [N], the reward of each rollout.
    lengths_N: integer [N], its sampled tokens.
    group_ids_N: integer [N], the group of each rollout; None: all are one group.
    coefficient: weight of s_i, in units of the reward.
    solved_reward: reward from which on a rollout counts as correct.

  Returns:
    Rewards [N] in the dtype of the rewards.

  Raises:
    ValueError: where the arrays do not fit (see `group_mean`), or the coefficient is negative.
  """
  if group_ids_N is None:
    group_ids_N = lengths_N * 0
  xp = _namespace(
    "relative_length_penalty", rewards_N, lengths_N=lengths_N, group_ids_N=group_ids_N
  )
  if not 0 <= coefficient < float("inf"):
    raise ValueError(f"coefficient: expected finite and >= 0, got {coefficient}")
  if rewards_N.shape[0] == 0:
    return rewards_N
  groups = _by_group(xp, xp.astype(lengths_N, rewards_N.dtype), group_ids_N)
  shortest_N = xp.take(groups.values_N, groups.first_N)
  range_N = xp.take(groups.values_N, groups.last_N) - shortest_N
  divisor_N = xp.where(range_N > 0, range_N, xp.ones_like(range_N))
  score_N = 0.5 - (groups.values_N - shortest_N) / divisor_N
  score_N = xp.where(range_N > 0, score_N, xp.zeros_like(score_N))
  score_N = _in_given_order(xp, groups, score_N)
  score_N = xp.where(
    rewards_N >= solved_reward, score_N, xp.minimum(score_N, xp.zeros_like(score_N))
  )
  return rewards_N + coefficient * score_N


# What all of them share.


class _Groups(NamedTuple):
  """Values sorted by (group, value), with where each one's group begins and ends.

  Attributes:
    order_N: where the sorted values come from.
    ids_N: group of each sorted value.
    values_N: the sorted values.
    first_N: position of the first (smallest) value of its group.
    last_N: position of the last (largest).
    size_N: values in its group, in the values' dtype.
  """

  order_N: Array
  ids_N: Array
  values_N: Array
  first_N: Array
  last_N: Array
  size_N: Array


def _namespace(function: str, rewards_N: Array, **integers: Array) -> Any:
  """The rewards' array library, once all arrays are seen to fit."""
  xp = rewards_N.__array_namespace__()
  for name, array in integers.items():
    if rewards_N.ndim != 1 or rewards_N.shape != array.shape:
      raise ValueError(
        f"{function}: expected rewards_N and {name} of one shape [N], got "
        f"{list(rewards_N.shape)} and {list(array.shape)}"
      )
    if not xp.isdtype(array.dtype, "integral"):
      raise ValueError(f"{name}: expected an integer dtype, got {array.dtype}")
  if not xp.isdtype(rewards_N.dtype, "real floating"):
    raise ValueError(f"rewards_N: expected a floating dtype, got {rewards_N.dtype}")
  return xp


def _is_traced(array: Array) -> bool:
  """Whether the values are not known yet (under jit); asks without importing jax."""
  jax = sys.modules.get("jax")
  return jax is not None and isinstance(array, jax.core.Tracer)


def _by_group(xp: Any, values_N: Array, group_ids_N: Array) -> _Groups:
  order_N = xp.argsort(values_N, stable=True)
  order_N = xp.take(order_N, xp.argsort(xp.take(group_ids_N, order_N), stable=True))
  ids_N, sorted_N = xp.take(group_ids_N, order_N), xp.take(values_N, order_N)
  first_N = xp.searchsorted(ids_N, ids_N, side="left")
  last_N = xp.searchsorted(ids_N, ids_N, side="right") - 1
  size_N = xp.astype(last_N - first_N + 1, values_N.dtype)
  return _Groups(order_N, ids_N, sorted_N, first_N, last_N, size_N)


def _in_given_order(xp: Any, groups: _Groups, sorted_N: Array) -> Array:
  return xp.take(sorted_N, xp.argsort(groups.order_N))


def _centred(xp: Any, groups: _Groups) -> Array:
  """Sorted values minus the mean of their group; taken from differences, equal ones give 0."""
  above_N = groups.values_N - xp.take(groups.values_N, groups.first_N)
  return above_N - _group_sums(xp, groups, above_N) / groups.size_N


def _group_sums(xp: Any, groups: _Groups, sorted_N: Array) -> Array:
  """The sum over its group at each sorted value, by doubling: after k rounds over 2^k values.

  Nothing of one group is ever added to another, as differences of one running sum would.
  """
  count = sorted_N.shape[0]
  at_N = xp.arange(count, dtype=groups.first_N.dtype)
  reach = 1
  while reach < count:
    behind_N = xp.roll(sorted_N, reach)
    sorted_N = sorted_N + xp.where(
      at_N - reach >= groups.first_N, behind_N, xp.zeros_like(sorted_N)
    )
    reach *= 2
  return xp.take(sorted_N, groups.last_N)
