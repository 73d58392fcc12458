"""CISPO: the ratio is clipped and becomes a weight; every token keeps a gradient."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance
from intellect3.losses.policy_gradient import terms


def cispo_loss(
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
  ratio_low: float = 0.0,
  ratio_high: float = 5.0,
  old_logprobs: jax.Array | None = None,
) -> tuple[jax.Array, terms.Metrics]:
  """Clipped importance-sampling policy optimisation (CISPO).

    w_t  = sg(clip(r_t, ratio_low, ratio_high))
    loss = aggregate(- w_t A_t logprobs_t)

  MiniMax-M1, arXiv 2506.13585, equation 4, where r is against the policy before the update and the
  bounds are 1 - eps_low (never reached there) and 1 + eps_high; ScaleRL, arXiv 2510.13786, uses an
  upper bound of about 5 and found little sensitivity to it. Deviation: r is against the behaviour
  policy unless `old_logprobs` are given, and a KL term is left to `components`.

  Args:
    ratio_low: smallest weight, >= 0; 0 leaves small ratios as they are.
    ratio_high: largest weight.
    old_logprobs: floating [B, T], constant: r = exp(logprobs - old_logprobs) instead, as in the
      paper; whatever the behaviour policy was is then not corrected for.
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics` (no token is masked), and `truncated_share`,
    the share of tokens whose weight is one of the bounds.

  Raises:
    ValueError: ratio_low > ratio_high, a negative bound, or see `terms.prepare`.
  """
  checks.ordered("ratio_low", ratio_low, "ratio_high", ratio_high)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  proximal = batch.constant("old_logprobs", old_logprobs)
  start = batch.inference_logprobs if proximal is None else proximal
  ratios = importance.ratio(jax.lax.stop_gradient(batch.logprobs) - start)
  weights = jnp.clip(ratios, ratio_low, ratio_high)
  loss = batch.total(-weights * batch.advantages * batch.logprobs)
  clipped = (ratios < ratio_low) | (ratios > ratio_high)
  return loss, {**batch.metrics(), "truncated_share": batch.mean(clipped)}
