"""PPO: no gradient beyond the bounds in the direction of the advantage."""

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance
from intellect3.losses.policy_gradient import terms


def clipped_loss(
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
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
  old_logprobs: jax.Array | None = None,
  behaviour_ratio_max: float | None = None,
) -> tuple[jax.Array, terms.Metrics]:
  """The clipped surrogate of PPO, with clip-higher, dual clip and decoupling.

    r_t  = exp(logprobs_t - inference_logprobs_t)
    f_t  = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    f_t  = max(f_t, dual_clip A_t) where A_t < 0, if dual_clip is given
    loss = aggregate(- f_t)

  and decoupled, with the logprobs of a proximal policy, `old_logprobs`: r_t = exp(logprobs_t -
  old_logprobs_t), and f_t is weighted by sg(exp(old_logprobs_t - inference_logprobs_t)), at most
  `behaviour_ratio_max`.

  PPO, arXiv 1707.06347, equation 7; clip-higher (0.28 above, 0.2 below), DAPO, arXiv 2503.14476;
  dual clip (3), arXiv 1912.09729, equation 5; decoupled PPO, arXiv 2110.00641, as AReaL,
  arXiv 2505.24298, uses it. Deviation: without `old_logprobs` the ratio is against the behaviour
  policy, so that one clip bounds staleness and update together.

  Args:
    clip_low: how far the ratio may fall below 1 where the advantage is negative, in [0, 1].
    clip_high: how far it may rise above 1 where the advantage is positive, >= 0.
    dual_clip: largest ratio of a token of negative advantage, above 1 + clip_high; None: unbounded
      (but by e^20).
    old_logprobs: floating [B, T], constant, of the policy that the update starts from.
    behaviour_ratio_max: bound of the decoupled weight, above 0; None: unbounded (but by e^20).
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`: `masked_share` counts the tokens that a clip
    leaves without gradient; and `masked_low_share`, `masked_high_share`, `masked_dual_share`.

  Raises:
    ValueError: a bound out of its range, `behaviour_ratio_max` without `old_logprobs`, or see
      `terms.prepare`.
  """
  checks.at_least("clip_low", clip_low, 0.0)
  checks.at_most("clip_low", clip_low, 1.0)
  checks.at_least("clip_high", clip_high, 0.0)
  if dual_clip is not None:
    checks.at_least("dual_clip", dual_clip, 1.0 + clip_high, above=True)
  if behaviour_ratio_max is not None:
    checks.at_least("behaviour_ratio_max", behaviour_ratio_max, 0.0, above=True)
    if old_logprobs is None:
      raise ValueError("behaviour_ratio_max: expected old_logprobs beside it, got None")
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  proximal = batch.constant("old_logprobs", old_logprobs)
  start = batch.inference_logprobs if proximal is None else proximal
  log_ratios = batch.logprobs - start
  ratios = importance.ratio(jax.lax.stop_gradient(log_ratios))
  positive, negative = batch.advantages > 0, batch.advantages < 0
  high, low = positive & (ratios > 1 + clip_high), negative & (ratios < 1 - clip_low)
  dual = jnp.zeros_like(high) if dual_clip is None else negative & (ratios > dual_clip)
  out = high | low | dual
  # min and max would split the gradient between equals; a clipped token has a value and none.
  bound = jnp.where(
    high, 1 + clip_high, jnp.where(low, 1 - clip_low, 0.0 if dual_clip is None else dual_clip)
  )
  weights = jnp.where(out, bound, importance.ratio(log_ratios))
  if proximal is not None:
    behaviour = importance.ratio(proximal - batch.inference_logprobs)
    weights = weights * (
      behaviour if behaviour_ratio_max is None else jnp.minimum(behaviour, behaviour_ratio_max)
    )
  return batch.total(-weights * batch.advantages), {
    **batch.metrics(out),
    "masked_low_share": batch.mean(low),
    "masked_high_share": batch.mean(high),
    "masked_dual_share": batch.mean(dual),
  }
