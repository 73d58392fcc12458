"""Importance ratios between the trainer's policy and the behaviour policy, and what they say.

Place in the ring: used by the policy-gradient losses, by their metrics and by the off-policy lab.
The behaviour policy is the server's, through `inference_logprobs`; it differs from the trainer's by
staleness and by numerics, and the quantities here measure that.

Metrics are sums over tokens divided by a global count, so that they add up over micro-batches. What
does not add up (`quantiles`, `effective_sample_size`) is for whoever holds a whole batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, segments

LOG_RATIO_MAX = 20.0
"""Largest log ratio that is ever exponentiated without another bound: e^20 is 4.9e8. Beyond it lie
broken logprobs, and their ratio would overflow float32 from 88 on."""


def log_ratio(logprobs: jax.Array, inference_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """`logprobs - inference_logprobs` where the mask is True, else 0.

  Args:
    logprobs: floating [B, T], of the trainer, differentiable.
    inference_logprobs: floating [B, T], of the behaviour policy; gets no gradient.
    mask: bool [B, T]. What stands where it is False never matters, be it NaN.

  Returns:
    float32 [B, T] (float64 if an input is).

  Raises:
    ValueError: where shapes differ, or a dtype is wrong.
  """
  checks.tokens(mask, logprobs=logprobs, inference_logprobs=inference_logprobs)
  behaviour = jax.lax.stop_gradient(inference_logprobs)
  return aggregation.masked(logprobs, mask) - aggregation.masked(behaviour, mask)


def ratio(log_ratios: jax.Array) -> jax.Array:
  """`exp(log_ratios)`, of at most `LOG_RATIO_MAX`: finite, and without gradient beyond it."""
  return jnp.exp(jnp.minimum(log_ratios, LOG_RATIO_MAX))


def importance_ratio(
  logprobs: jax.Array, inference_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
  """`pi_train / pi_infer` per token, [B, T], at most e^20; 1 where the mask is False."""
  return ratio(log_ratio(logprobs, inference_logprobs, mask))


def sequence_ratio(
  log_ratios: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Geometric mean of the ratios of each trajectory, at every token of it.

    s_i = (prod_t r_it)^(1 / n_i) = exp(1/n_i sum_t d_it)

  The length-normalised sequence ratio of GSPO, arXiv 2507.18071, equation 7.

  Args:
    log_ratios: floating [B, T], d, from `log_ratio`.
    mask: bool [B, T], the tokens that take part; n_i counts them.
    segment_ids: integer [B, T], each in [0, T]; None means one trajectory a row.

  Returns:
    float32 [B, T], at most e^20; 1 in a trajectory without a masked token.
  """
  checks.tokens(mask, log_ratios=log_ratios)
  return ratio(segments.segment_mean(log_ratios, mask, segment_ids))


def mismatch_kl(log_ratios: jax.Array) -> jax.Array:
  """Per-token estimate of KL(pi_infer || pi_train): `expm1(d) - d` with `d` the log ratio.

  The k3 estimator of http://joschu.net/blog/kl-approx.html, non-negative and zero exactly where
  the policies agree. `expm1` keeps it accurate for small `d`, where `exp(d) - 1 - d` cancels.

  Args:
    log_ratios: [B, T], from `log_ratio`; in `expm1` at most `LOG_RATIO_MAX`.

  Returns:
    [B, T], in nats.
  """
  return jnp.expm1(jnp.minimum(log_ratios, LOG_RATIO_MAX)) - log_ratios


def effective_sample_size(
  ratios: jax.Array, mask: jax.Array, *, axis_name: aggregation.AxisName | None = None
) -> jax.Array:
  """How many on-policy tokens the weighted ones are worth: `(sum r)^2 / sum r^2`.

  Kish, Survey Sampling, 1965. Between 1 (one token has all the weight) and the number of tokens
  (all weigh alike).

  Args:
    ratios: floating [B, T], the importance ratios or any other weights, >= 0.
    mask: bool [B, T], the tokens that take part.
    axis_name: mesh axes over which rows are split inside `shard_map`.

  Returns:
    float32 scalar, in tokens; 0 where no token takes part or all weigh nothing.
  """
  checks.tokens(mask, ratios=ratios)
  aggregation.require_axis(mask, axis_name)
  weights = aggregation.masked(ratios, mask)
  first = aggregation.total(weights, axis_name)
  second = aggregation.total(jnp.square(weights), axis_name)
  return jnp.square(first) / jnp.where(second > 0, second, 1)


def effective_sample_share(
  ratios: jax.Array, mask: jax.Array, *, axis_name: aggregation.AxisName | None = None
) -> jax.Array:
  """`effective_sample_size` over the masked tokens: in (0, 1], 0 where there are none.

  From additive metrics it is `importance_ratio^2 / importance_ratio_squared`.
  """
  size = effective_sample_size(ratios, mask, axis_name=axis_name)
  return size / aggregation.token_count(mask, axis_name=axis_name)


def masked_share(
  removed: jax.Array,
  mask: jax.Array,
  *,
  denominator: jax.typing.ArrayLike | None = None,
  axis_name: aggregation.AxisName | None = None,
) -> jax.Array:
  """Share of the masked-in tokens that a rule removes.

  Args:
    removed: bool [B, T], what the rule takes out.
    mask: bool [B, T], the loss mask.
    denominator: scalar, the loss-masked tokens of the whole batch; None counts those of this call.
    axis_name: mesh axes over which rows are split inside `shard_map`.

  Returns:
    float32 scalar.
  """
  checks.same_shape("removed", removed, mask)
  return aggregation.token_mean(
    removed.astype(jnp.float32), mask, denominator=denominator, axis_name=axis_name
  )


def quantiles(values: jax.Array, mask: jax.Array, probabilities: Sequence[float]) -> jax.Array:
  """Quantiles of the masked values, linearly interpolated as NumPy's default does for finite ones.

  Sorts the batch: for diagnosis, not for every step of a large run.

  Args:
    values: floating [B, T], e.g. log ratios.
    mask: bool [B, T], the values that take part.
    probabilities: Q numbers in [0, 1].

  Returns:
    float32 [Q]; NaN where no value takes part, or one that does is NaN.

  Raises:
    ValueError: a probability outside [0, 1], or shapes differ.
  """
  checks.tokens(mask, values=values)
  for probability in probabilities:
    if not 0 <= probability <= 1:
      raise ValueError(f"probabilities: expected numbers in [0, 1], got {probability}")
  wide = aggregation.masked(values, mask)
  if not wide.size:
    return jnp.full(len(probabilities), jnp.nan, wide.dtype)
  ordered_N = jnp.sort(jnp.where(mask, wide, jnp.inf).reshape(-1))
  count = jnp.sum(mask)
  place_Q = jnp.asarray(probabilities, ordered_N.dtype) * (count - 1)
  low_Q = jnp.clip(jnp.floor(place_Q).astype(jnp.int32), 0)
  high_Q = jnp.minimum(low_Q + 1, jnp.maximum(count - 1, 0))
  low, high = ordered_N[low_Q], ordered_N[high_Q]
  between = low + jnp.where(high > low, (high - low) * (place_Q - low_Q), 0)
  return jnp.where((count > 0) & ~jnp.any(jnp.isnan(wide)), between, jnp.nan)
