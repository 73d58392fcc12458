"""IcePop: tokens whose ratio is out of bounds carry no gradient."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance, segments
from intellect3.losses.policy_gradient import terms


def masked_importance_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate: aggregation.Aggregate = aggregation.token_mean,
  axis_name: aggregation.AxisName | None = None,
  ratio_low: float = 0.5,
  ratio_high: float = 5.0,
  sequence_ratio_min: float = 1e-5,
) -> tuple[jax.Array, terms.Metrics]:
  """Masked importance sampling (IcePop), the objective of INTELLECT-3.

    r_t  = exp(logprobs_t - inference_logprobs_t)
    keep = ratio_low <= r_t <= ratio_high, and r_u >= sequence_ratio_min for every masked token u
           of the same trajectory
    loss = aggregate(- keep_t r_t A_t)

  INTELLECT-3 technical report, arXiv 2512.16144; IcePop, "Small Leak Can Sink a Great Ship", Ling
  team 2025. There is no PPO clip and no KL term; the gradient flows through the ratio; tokens that
  are not kept stay in the denominator. Deviation from the published code: the denominator is that
  of the whole batch, not of a rank, so the gradient does not depend on the layout.

  Args:
    ratio_low: smallest ratio of a kept token, >= 0.
    ratio_high: largest ratio of a kept token.
    sequence_ratio_min: a token below it drops its whole trajectory; 0 drops none.
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`: `masked_share` counts tokens out of
    [ratio_low, ratio_high], `sequence_masked_share` those of dropped trajectories.

  Raises:
    ValueError: ratio_low > ratio_high, a negative bound, or see `terms.prepare`.
  """
  checks.ordered("ratio_low", ratio_low, "ratio_high", ratio_high)
  checks.at_least("sequence_ratio_min", sequence_ratio_min, 0.0)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  # The decisions are constants of the gradient, and negated so that a NaN is kept and seen.
  ratios = importance.ratio(jax.lax.stop_gradient(batch.log_ratios))
  out = batch.mask & ((ratios < ratio_low) | (ratios > ratio_high))
  smallest = segments.segment_min(ratios, batch.mask, segment_ids)
  sequence_out = batch.mask & (smallest < sequence_ratio_min)
  keep = ~(out | sequence_out)
  kept = jnp.where(keep, importance.ratio(batch.log_ratios), 0)
  return batch.total(-kept * batch.advantages), batch.metrics(out, sequence_out)
