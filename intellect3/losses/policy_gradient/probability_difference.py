"""DPPO: a trust region in probabilities, not in ratios."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance
from intellect3.losses.policy_gradient import terms


def probability_difference_loss(
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
  difference_low: float = 0.2,
  difference_high: float = 0.2,
  kl_tau: float = 1e-3,
  by_sign: bool = True,
) -> tuple[jax.Array, terms.Metrics]:
  """DPPO with the binary total-variation mask and a squared-log-ratio penalty.

    p_t, q_t = exp(logprobs_t), exp(inference_logprobs_t)
    keep     = p_t - q_t <= difference_high where A_t > 0, p_t - q_t >= -difference_low elsewhere
    loss     = aggregate(- keep_t r_t A_t + kl_tau log(r_t)^2)

  DPPO, arXiv 2602.04879: a ratio says little of how far a policy moved; a rare token's ratio is
  large after a move of no consequence, a frequent one's small after a large one. The mask is
  one-sided, as PPO's clip is: only steps that lead farther away are masked. The penalty, of Kimi
  K2.5 (arXiv 2602.02276), is on all loss-masked tokens, also those masked here. prime-rl had it as
  its default (`dppo_mask_low`, `dppo_mask_high`, `kl_tau`) until it returned to IPO, whose mask is
  blind to the sign (docs/algorithms.md). Deviation: r is at most e^20, and has no gradient there.

  Args:
    difference_low: how far the probability may fall where A <= 0, >= 0.
    difference_high: how far it may rise where A > 0, >= 0.
    kl_tau: weight of the penalty, >= 0.
    by_sign: False masks both directions whatever the advantage is: prime-rl's IPO (there with 0.3).
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`, and `masked_low_share`, `masked_high_share`,
    `squared_log_ratio` (nats^2, without `kl_tau`).

  Raises:
    ValueError: a negative hyperparameter, or see `terms.prepare`.
  """
  checks.at_least("difference_low", difference_low, 0.0)
  checks.at_least("difference_high", difference_high, 0.0)
  checks.at_least("kl_tau", kl_tau, 0.0)
  checks.finite("kl_tau", kl_tau)
  checks.flag("by_sign", by_sign)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  probabilities = jnp.exp(jax.lax.stop_gradient(batch.logprobs))
  difference = jnp.where(batch.mask, probabilities - jnp.exp(batch.inference_logprobs), 0)
  high, low = difference > difference_high, difference < -difference_low
  if by_sign:
    high, low = high & (batch.advantages > 0), low & (batch.advantages <= 0)
  out = high | low
  kept = jnp.where(out, 0, importance.ratio(batch.log_ratios))
  penalty = jnp.square(batch.log_ratios)
  return batch.total(-kept * batch.advantages + kl_tau * penalty), {
    **batch.metrics(out),
    "masked_low_share": batch.mean(low),
    "masked_high_share": batch.mean(high),
    "squared_log_ratio": batch.mean(penalty),
  }
