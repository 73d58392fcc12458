"""GSPO: one ratio for a whole trajectory, clipped as a whole."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance, segments
from intellect3.losses.policy_gradient import terms


def sequence_ratio_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate: aggregation.Aggregate = aggregation.sequence_mean,
  axis_name: aggregation.AxisName | None = None,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
  token_level: bool = False,
  old_logprobs: jax.Array | None = None,
) -> tuple[jax.Array, terms.Metrics]:
  """Group sequence policy optimisation (GSPO) and its token variant.

    s_i  = exp(1/n_i sum_t (logprobs_it - inference_logprobs_it))
    loss = aggregate(- min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i))

  GSPO, arXiv 2507.18071, equations 5 to 7; GSPO-token, equations 13 and 14, where s_it = sg(s_i)
  exp(logprobs_it - sg(logprobs_it)) takes each token's own advantage; where a trajectory's
  advantages are equal, both have the same value and gradient. The default aggregation is the
  paper's mean over trajectories, and the bounds are the paper's: s is a mean over tokens, so they
  are far narrower than PPO's. Deviation: the ratio is against the behaviour policy unless
  `old_logprobs` are given; s is at most e^20.

  Args:
    clip_low: how far s may fall below 1 where the advantage is negative, in [0, 1].
    clip_high: how far s may rise above 1 where the advantage is positive, >= 0.
    token_level: GSPO-token; False takes the mean of a trajectory's advantages for all its tokens.
    old_logprobs: floating [B, T], constant, of the policy that the update starts from.
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`: `masked_share` and `sequence_masked_share`
    both count the tokens that the clip leaves without gradient.

  Raises:
    ValueError: a bound out of its range, or see `terms.prepare`.
  """
  checks.at_least("clip_low", clip_low, 0.0)
  checks.at_most("clip_low", clip_low, 1.0)
  checks.at_least("clip_high", clip_high, 0.0)
  checks.flag("token_level", token_level)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  proximal = batch.constant("old_logprobs", old_logprobs)
  start = batch.inference_logprobs if proximal is None else proximal
  constant = jax.lax.stop_gradient(batch.logprobs)
  ratios = importance.sequence_ratio(constant - start, batch.mask, segment_ids)
  advantages = batch.advantages
  if not token_level:
    advantages = segments.segment_mean(advantages, batch.mask, segment_ids)
  high = batch.mask & (advantages > 0) & (ratios > 1 + clip_high)
  low = batch.mask & (advantages < 0) & (ratios < 1 - clip_low)
  out = high | low
  # The token's own factor is 1 and carries the gradient of s: 1/n_i of it to each of n_i tokens.
  own = 1 + jnp.where(out, 0, batch.logprobs - constant)
  weights = jnp.where(high, 1 + clip_high, jnp.where(low, 1 - clip_low, ratios))
  return batch.total(-weights * own * advantages), batch.metrics(out, out)
