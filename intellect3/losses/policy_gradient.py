"""Policy-gradient losses over packed trajectories.

Place in the ring: the train step calls one of these on the trainer's logprobs of a micro-batch.
All arrays are [B, T]; rows hold packed trajectories. Each loss returns `(loss, metrics)`, each a
sum over masked tokens divided by the global `denominator`, so micro-batches simply add up.
"""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, importance

Metrics = dict[str, jax.Array]


def masked_importance_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  ratio_low: float = 0.5,
  ratio_high: float = 5.0,
  sequence_ratio_min: float = 1e-5,
) -> tuple[jax.Array, Metrics]:
  """Masked importance sampling (IcePop), the objective of INTELLECT-3.

    r_t  = exp(logprobs_t - inference_logprobs_t)
    keep = ratio_low <= r_t <= ratio_high, and r_u >= sequence_ratio_min for every masked token u
           of the same trajectory
    loss = - sum_t keep_t r_t A_t / denominator

  INTELLECT-3 technical report, arXiv 2512.16144; IcePop, "Small Leak Can Sink a Great Ship", Ling
  team 2025. There is no PPO clip and no KL term; the gradient flows through the ratio; tokens that
  are not kept stay in the denominator. Deviation from the published code: the denominator is that
  of the whole batch, not of a rank, so the gradient does not depend on the layout.

  Args:
    logprobs: floating [B, T], the trainer's, in nats, at the sampling temperature.
    inference_logprobs: floating [B, T], the behaviour policy's.
    advantages: floating [B, T], the advantage of each token's rollout.
    loss_mask: bool [B, T]. What the arrays hold where it is False never matters, be it NaN.
    segment_ids: integer [B, T], the trajectory of each token within its row, 0 for padding; None
      means one trajectory a row.
    denominator: scalar, the masked tokens of the whole batch; None takes this call's own.
    ratio_low: smallest ratio of a kept token.
    ratio_high: largest ratio of a kept token.
    sequence_ratio_min: a token below it drops its whole trajectory.

  Returns:
    The loss, scalar, and metrics, scalars: `importance_ratio`, `mismatch_kl` (nats),
    `masked_share` (tokens out of [ratio_low, ratio_high]), `sequence_masked_share` (tokens of
    dropped trajectories). A NaN at a masked token is not dropped: it makes the loss NaN.

  Raises:
    ValueError: where an array has the wrong dtype or ratio_low > ratio_high.
  """
  if ratio_low > ratio_high:
    raise ValueError(f"ratio_low: expected at most ratio_high ({ratio_high}), got {ratio_low}")
  aggregation.check_tokens(
    loss_mask, logprobs=logprobs, inference_logprobs=inference_logprobs, advantages=advantages
  )
  mask = loss_mask if segment_ids is None else loss_mask & (segment_ids != 0)
  count = aggregation.token_count(mask, denominator)
  log_ratios = importance.log_ratio(logprobs, inference_logprobs, mask)

  # The decisions are constants of the gradient, and negated so that a NaN is kept and seen.
  ratios = jnp.exp(jax.lax.stop_gradient(log_ratios))
  token_out = mask & ((ratios < ratio_low) | (ratios > ratio_high))
  sequence_out = mask & (importance.segment_min(ratios, mask, segment_ids) < sequence_ratio_min)
  keep = mask & ~token_out & ~sequence_out

  # exp of a log ratio that is not kept may be inf, and 0 * inf is NaN in the gradient.
  kept_ratios = jnp.exp(jnp.where(keep, log_ratios, 0))
  objective = kept_ratios * aggregation.masked(jax.lax.stop_gradient(advantages), mask)
  loss = -aggregation.masked_mean(objective, keep, count)
  return loss, {
    **_mismatch(jax.lax.stop_gradient(log_ratios), mask, count),
    "masked_share": aggregation.masked_mean(token_out.astype(jnp.float32), mask, count),
    "sequence_masked_share": aggregation.masked_mean(sequence_out.astype(jnp.float32), mask, count),
  }


def reinforce_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Metrics]:
  """REINFORCE without any correction for the behaviour policy: the comparison for the above.

    loss = - sum_t A_t logprobs_t / denominator

  Williams, 1992. Right on-policy; with stale or numerically different rollouts it is biased, and
  the metrics say by how much.

  Args, Returns, Raises: as in `masked_importance_loss`; nothing is ever dropped, so both shares
  are 0.
  """
  aggregation.check_tokens(
    loss_mask, logprobs=logprobs, inference_logprobs=inference_logprobs, advantages=advantages
  )
  mask = loss_mask if segment_ids is None else loss_mask & (segment_ids != 0)
  count = aggregation.token_count(mask, denominator)
  objective = aggregation.masked(logprobs, mask) * aggregation.masked(
    jax.lax.stop_gradient(advantages), mask
  )
  loss = -aggregation.masked_mean(objective, mask, count)
  log_ratios = importance.log_ratio(jax.lax.stop_gradient(logprobs), inference_logprobs, mask)
  nothing = jnp.zeros((), jnp.float32)
  return loss, {
    **_mismatch(log_ratios, mask, count),
    "masked_share": nothing,
    "sequence_masked_share": nothing,
  }


def _mismatch(log_ratios: jax.Array, mask: jax.Array, count: jax.Array) -> Metrics:
  return {
    "importance_ratio": aggregation.masked_mean(jnp.exp(log_ratios), mask, count),
    "mismatch_kl": aggregation.masked_mean(importance.mismatch_kl(log_ratios), mask, count),
  }
