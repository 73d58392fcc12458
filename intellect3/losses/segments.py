"""Sums over the trajectories that are packed into rows.

Place in the ring: what is one number per trajectory (the geometric mean of its ratios, its length,
its smallest ratio) is made here and stands at every token of it.

A segment is the set of tokens of a row that share a segment id; ids lie in [0, T], 0 is padding
(itself a segment here), and their order in the row does not matter. An id outside gives NaN at its
tokens. A trajectory is never split over rows, so nothing here crosses shards as long as rows are
whole; a row of T tokens that is itself split over devices by hand cannot be summed here.

A sum over segments is a scatter, which costs far more per token than all else in a loss. Rows hold
few trajectories beside their tokens, so blocks that lie in one segment are summed first; where a
row holds too many for that, every token is scattered.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from intellect3.losses import checks

BLOCK = 32
"""Tokens that are summed before they are scattered, where they lie in one segment."""


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
  return _at_tokens(_sums(values, mask, segment_ids), values, segment_ids)


def segment_min(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Minimum of the masked values over each token's own segment, at every token of it.

  Args, Raises: as in `segment_sum`.

  Returns:
    [B, T] in the dtype of the values; +inf in a segment without a masked value.
  """
  table = _tabulate(values, mask, segment_ids, jnp.min, jax.ops.segment_min, jnp.inf)
  return _at_tokens(table, values, segment_ids)


def segment_mean(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Mean of the masked values over each token's own segment, at every token of it.

  Args, Raises: as in `segment_sum`.

  Returns:
    floating [B, T], float32 or wider; 0 in a segment without a masked value.
  """
  means = _sums(values, mask, segment_ids) / jnp.maximum(_counts(mask, segment_ids), 1)
  return _at_tokens(means, values, segment_ids)


def segment_count(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Masked tokens of each token's own segment: float32 [B, T] (exact to 2^24 tokens)."""
  return _at_tokens(_counts(mask, segment_ids), mask, segment_ids)


def _sums(values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return _tabulate(wide, mask, segment_ids, jnp.sum, jax.ops.segment_sum, 0)


def _counts(mask: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  ones = jnp.ones(mask.shape, jnp.float32)
  return _tabulate(ones, mask, segment_ids, jnp.sum, jax.ops.segment_sum, 0)


def _numbers(segment_ids: jax.Array) -> jax.Array:
  """The ids, unsigned: one outside [0, T], a negative one too, lies behind every table."""
  wide = segment_ids.dtype.itemsize == 8
  return segment_ids.astype(jnp.uint64 if wide else jnp.uint32)


def _at_tokens(table: jax.Array, like: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  if segment_ids is None:
    return jnp.broadcast_to(table, like.shape)
  look_up = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=jnp.nan))
  return look_up(table, _numbers(segment_ids))


def _tabulate(
  values: jax.Array,
  mask: jax.Array,
  segment_ids: jax.Array | None,
  over: Callable[..., jax.Array],
  over_segments: Callable[..., jax.Array],
  identity: float,
) -> jax.Array:
  """[B, T + 1], the reduction of each segment at its id; [B, 1] without ids."""
  if segment_ids is None:
    return over(jnp.where(mask, values, identity), axis=1, keepdims=True)
  checks.segment_ids(segment_ids, values)
  rows, length = values.shape
  numbers = _numbers(segment_ids)
  scatter = jax.vmap(functools.partial(over_segments, num_segments=length + 1))
  capacity = length // BLOCK // 16
  if length % BLOCK or not capacity:
    return scatter(jnp.where(mask, values, identity), numbers)

  blocks = numbers.reshape(rows, -1, BLOCK)
  uniform = jnp.all(blocks == blocks[:, :, :1], axis=2)

  # Masked inside of the branches, where it fuses with what they do.
  def token_by_token(values: jax.Array, mask: jax.Array) -> jax.Array:
    return scatter(jnp.where(mask, values, identity), numbers)

  def block_by_block(values: jax.Array, mask: jax.Array) -> jax.Array:
    """What uniform blocks come to, then the tokens of the few others."""
    values = jnp.where(mask, values, identity)
    nowhere = uniform.shape[1]
    mixed = jax.vmap(lambda row: jnp.nonzero(~row, size=capacity, fill_value=nowhere)[0])(uniform)

    def of_mixed(array: jax.Array, fill: float) -> jax.Array:
      take = jax.vmap(lambda row_NK, at: row_NK.at[at].get(mode="fill", fill_value=fill))
      return take(array.reshape(rows, -1, BLOCK), mixed).reshape(rows, -1)

    whole = jnp.where(uniform, over(values.reshape(rows, -1, BLOCK), axis=2), identity)
    return scatter(
      jnp.concatenate([whole, of_mixed(values, identity)], axis=1),
      jnp.concatenate([blocks[:, :, 0], of_mixed(numbers, length + 1)], axis=1),
    )

  fits = jnp.all(jnp.sum(~uniform, axis=1) <= capacity)
  return jax.lax.cond(fits, block_by_block, token_by_token, values, mask)
