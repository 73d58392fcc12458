"""TIS: importance sampling with ratios cut off from above."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance
from intellect3.losses.policy_gradient import terms


def truncated_importance_loss(
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
  ratio_max: float = 2.0,
  old_logprobs: jax.Array | None = None,
) -> tuple[jax.Array, terms.Metrics]:
  """Truncated importance sampling (TIS).

    w_t  = sg(min(exp(logprobs_t - inference_logprobs_t), ratio_max))
    loss = aggregate(- w_t A_t logprobs_t)

  and with the logprobs of a proximal policy, `old_logprobs`, between behaviour and trainer

    w_t  = sg(min(exp(old_logprobs_t - inference_logprobs_t), ratio_max))
    loss = aggregate(- w_t exp(logprobs_t - old_logprobs_t) A_t)

  Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025
  (Flash-RL), which adopts the truncation of IMPALA (arXiv 1802.01561). A truncated token keeps a
  gradient, that of `ratio_max`; IcePop drops it. Deviation: no PPO clip on top; `clipped_loss` with
  `old_logprobs` and `behaviour_ratio_max` is that.

  Args:
    ratio_max: largest weight of a token, above 0.
    old_logprobs: floating [B, T], constant; None: the correction spans the whole way.
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics` (no token is masked), and `truncated_share`,
    the share of tokens with the weight `ratio_max`.

  Raises:
    ValueError: `ratio_max` is not above 0, or see `terms.prepare`.
  """
  checks.at_least("ratio_max", ratio_max, 0.0, above=True)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  proximal = batch.constant("old_logprobs", old_logprobs)
  if proximal is None:
    behaviour, term = jax.lax.stop_gradient(batch.log_ratios), batch.logprobs
  else:
    behaviour = proximal - batch.inference_logprobs
    term = importance.ratio(batch.logprobs - proximal)
  ratios = importance.ratio(behaviour)
  loss = batch.total(-jnp.minimum(ratios, ratio_max) * batch.advantages * term)
  return loss, {**batch.metrics(), "truncated_share": batch.mean(ratios > ratio_max)}
