"""Importance ratios between the trainer's policy and the behaviour policy.

Place in the ring: used by the policy-gradient losses. The behaviour policy is the server's, through
`inference_logprobs`; it differs from the trainer's by staleness and by numerics, and the quantities
here measure and correct that.
"""

import chex
import jax
import jax.numpy as jnp

from intellect3.losses import aggregation


def log_ratio(logprobs: jax.Array, inference_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """`logprobs - inference_logprobs` where the mask is True, else 0.

  Args:
    logprobs: floating [B, T], of the trainer, differentiable.
    inference_logprobs: floating [B, T], of the behaviour policy; gets no gradient.
    mask: bool [B, T]. What stands where it is False never matters, be it NaN.

  Returns:
    float32 [B, T] (float64 if an input is).
  """
  aggregation.check_tokens(mask, logprobs=logprobs, inference_logprobs=inference_logprobs)
  behaviour = jax.lax.stop_gradient(inference_logprobs)
  return aggregation.masked(logprobs, mask) - aggregation.masked(behaviour, mask)


def importance_ratio(
  logprobs: jax.Array, inference_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
  """`pi_train / pi_infer` per token, [B, T]; 1 where the mask is False."""
  return jnp.exp(log_ratio(logprobs, inference_logprobs, mask))


def mismatch_kl(log_ratios: jax.Array) -> jax.Array:
  """Per-token estimate of KL(pi_infer || pi_train): `expm1(d) - d` with `d` the log ratio.

  The k3 estimator of http://joschu.net/blog/kl-approx.html, non-negative and zero exactly where
  the policies agree. `expm1` keeps it accurate for small `d`, where `exp(d) - 1 - d` cancels.

  Args:
    log_ratios: [B, T], from `log_ratio`.

  Returns:
    [B, T], in nats.
  """
  return jnp.expm1(log_ratios) - log_ratios


def segment_min(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Minimum of the masked values over each token's own segment, at every token of it.

  Args:
    values: floating [B, T].
    mask: bool [B, T], the values that take part.
    segment_ids: integer [B, T], the segment of each token within its row, in any order; None means
      one segment a row.

  Returns:
    [B, T]; +inf in a segment without a masked value.
  """
  chex.assert_rank(values, 2)
  chex.assert_equal_shape([values, mask])
  candidates = jnp.where(mask, values, jnp.inf)
  if segment_ids is None:
    return jnp.broadcast_to(jnp.min(candidates, axis=1, keepdims=True), values.shape)
  chex.assert_equal_shape([values, segment_ids])
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(f"segment_ids: expected an integer dtype, got {segment_ids.dtype}")

  def row(candidates_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
    # The rank of an id among the sorted ones is a segment number below T, whatever the ids are.
    rank_T = jnp.searchsorted(jnp.sort(segment_ids_T), segment_ids_T)
    length = candidates_T.shape[0]
    return jax.ops.segment_min(candidates_T, rank_T, num_segments=length)[rank_T]

  return jax.vmap(row)(candidates, segment_ids)
