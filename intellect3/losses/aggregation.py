"""Sums over masked tokens divided by one global denominator.

Place in the ring: inside the train step. Every loss and metric goes through `masked_mean`, so that
micro-batches, shards and packing orders of one batch add up to the same number (contract 5).
"""

import chex
import jax
import jax.numpy as jnp


def check_tokens(loss_mask: jax.Array, **floating: jax.Array) -> None:
  """Asserts that all are [B, T] of one shape, the mask bool and the others floating.

  Raises:
    AssertionError: (chex) where ranks or shapes differ.
    ValueError: where the mask is not bool or another array is not floating.
  """
  chex.assert_rank(loss_mask, 2)
  chex.assert_equal_shape([loss_mask, *floating.values()])
  if loss_mask.dtype != jnp.bool_:
    raise ValueError(f"loss_mask: expected bool, got {loss_mask.dtype}")
  for name, array in floating.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name}: expected a floating dtype, got {array.dtype}")


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
  """`values` in float32 or wider, with 0 where the mask is False, whatever stood there.

  Applied to the inputs of a loss it keeps NaN and inf of unmasked tokens out of values and
  gradients alike; applied to results alone it would only keep them out of the values.
  """
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return jnp.where(mask, wide, 0)


def token_count(loss_mask: jax.Array, denominator: jax.typing.ArrayLike | None) -> jax.Array:
  """The given denominator, or the number of masked tokens of these arrays (at least 1)."""
  if denominator is None:
    return jnp.maximum(jnp.sum(loss_mask, dtype=jnp.float32), 1.0)
  chex.assert_rank(denominator, 0)
  return jnp.asarray(denominator)


def masked_mean(values: jax.Array, mask: jax.Array, denominator: jax.Array) -> jax.Array:
  """`sum(values where mask) / denominator`, accumulated in float32 or wider."""
  return jnp.sum(masked(values, mask)) / denominator
