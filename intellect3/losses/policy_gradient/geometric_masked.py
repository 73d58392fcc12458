"""Trajectories are kept or dropped by the geometric mean of their ratios."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance
from intellect3.losses.policy_gradient import terms


def geometric_masked_loss(
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
  ratio_low: float = 0.1,
  ratio_high: float = 10.0,
  ratio_max: float | None = None,
) -> tuple[jax.Array, terms.Metrics]:
  """Sequence-level geometric-mean mask over token-level importance sampling.

    s_i  = exp(1/n_i sum_t log r_it)
    keep = ratio_low <= s_i <= ratio_high
    loss = aggregate(- keep_i r_it A_it),          ratio_max None
    loss = aggregate(- keep_i sg(min(r_it, ratio_max)) A_it logprobs_it) otherwise

  Liu, Li et al., "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
  Mismatch", 2025 (verl's geometric rejection sampling). A product of ratios over a long trajectory
  is far from 1 whatever the policies are; the geometric mean is comparable between lengths. The
  default bounds are those of prime-rl's former `geo_mask_low` and `geo_mask_high`: they drop what
  has collapsed; against numerical mismatch alone verl's users take 0.99 to 1.01 or tighter.

  Args:
    ratio_low: smallest geometric mean of a kept trajectory, >= 0.
    ratio_high: largest.
    ratio_max: bound of a token's weight, as in `truncated_importance_loss`, above 0; None: the
      ratio itself (at most e^20), with the gradient through it.
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`: `sequence_masked_share` counts the tokens of
    dropped trajectories, and `masked_share` is 0.

  Raises:
    ValueError: ratio_low > ratio_high, a bound out of its range, or see `terms.prepare`.
  """
  checks.ordered("ratio_low", ratio_low, "ratio_high", ratio_high)
  if ratio_max is not None:
    checks.at_least("ratio_max", ratio_max, 0.0, above=True)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  log_ratios = jax.lax.stop_gradient(batch.log_ratios)
  means = importance.sequence_ratio(log_ratios, batch.mask, segment_ids)
  out = batch.mask & ((means < ratio_low) | (means > ratio_high))
  if ratio_max is None:
    weighted = importance.ratio(batch.log_ratios)
  else:
    weighted = jnp.minimum(importance.ratio(log_ratios), ratio_max) * batch.logprobs
  loss = batch.total(jnp.where(out, 0, -weighted * batch.advantages))
  return loss, batch.metrics(sequence_masked=out)
