"""Sums over the trajectories that are packed into rows.

Place in the ring: what is one number per trajectory (the geometric mean of its ratios, its length,
its smallest ratio) is made here and stands at every token of it.

A segment is the set of tokens of a row that share a segment id; ids lie in [0, T], 0 is padding
(itself a segment here), and their order in the row does not matter. An id outside gives NaN at its
tokens. A trajectory is never split over rows, so nothing here crosses shards as long as rows are
whole; a row of T tokens that is itself split over devices by hand cannot be summed here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from intellect3.losses import checks


def segment_sum(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Sum of the masked values over each token's own segment, at every token of it.

  Args:
    values: floating [B, T]; what stands where the mask is False never matters.
    mask: bool [B, T], the values that take part.
    segment_ids: integer [B, T], each in [0, T]; None means one segment a row.

  Returns:
    floating [B, T], float32 or wider; 0 in a segment without a masked value.

  Raises:
    ValueError: where shapes differ or the ids are not integers.
  """
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return _reduce(jnp.where(mask, wide, 0), segment_ids, jnp.sum, jax.ops.segment_sum)


def segment_min(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Minimum of the masked values over each token's own segment, at every token of it.

  Args, Raises: as in `segment_sum`.

  Returns:
    [B, T] in the dtype of the values; +inf in a segment without a masked value.
  """
  return _reduce(jnp.where(mask, values, jnp.inf), segment_ids, jnp.min, jax.ops.segment_min)


def segment_mean(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Mean of the masked values over each token's own segment, at every token of it.

  Args, Raises: as in `segment_sum`.

  Returns:
    floating [B, T], float32 or wider; 0 in a segment without a masked value.
  """
  return segment_sum(values, mask, segment_ids) / jnp.maximum(segment_count(mask, segment_ids), 1)


def segment_count(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Masked tokens of each token's own segment: float32 [B, T] (exact to 2^24 tokens)."""
  return segment_sum(mask.astype(jnp.float32), mask, segment_ids)


def _reduce(
  values: jax.Array,
  segment_ids: jax.Array | None,
  over_row: Callable[..., jax.Array],
  over_segments: Callable[..., jax.Array],
) -> jax.Array:
  if segment_ids is None:
    return jnp.broadcast_to(over_row(values, axis=1, keepdims=True), values.shape)
  checks.segment_ids(segment_ids, values)
  length = values.shape[1]
  outside = (segment_ids < 0) | (segment_ids > length)
  numbers = jnp.where(outside, length + 1, segment_ids)

  def row(values_T: jax.Array, numbers_T: jax.Array) -> jax.Array:
    sums = over_segments(values_T, numbers_T, num_segments=length + 1)
    return sums.at[numbers_T].get(mode="fill", fill_value=jnp.nan)

  return jax.vmap(row)(values, numbers)
