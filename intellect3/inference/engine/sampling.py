"""Sampling on the device: from a row of logits to one id and its logprob.

Every operation is per row and has one fixed order, and a row's random numbers depend on its
request's seed and on how many tokens it has sampled: neither its neighbours nor its slot change its
bits (contract 10). What only few requests ask for stands behind `lax.cond`, so that the others do
not pay for it.
"""

import jax
import jax.numpy as jnp

from intellect3.inference.engine.steps import Sampling, Top

BLOCK = 64
"""Ids of a block of the two-level draw."""


def sample(
  logits_RV: jax.Array, counts_RV: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Samples one id per row from `softmax(logits / temperature)`; temperature 0 is greedy.

  As in SGLang, penalties and the ban of stop ids change the logits that the logprobs are of;
  top_k, top_p and min_p only exclude ids from being drawn.

  Args:
    logits_RV: float32 [R, V].
    counts_RV: int32 [R, V], how often each id was sampled; read only where `sampling.penalizes`.
    sampling: of the rows.

  Returns:
    ids int32 [R]; their logprobs float32 [R] under the temperature-scaled full softmax (greedy
    rows: temperature 1); and all logprobs [R, V].
  """
  logits_RV = jax.lax.cond(
    sampling.penalizes, _penalize, lambda logits, *_: logits, logits_RV, counts_RV, sampling
  )
  logits_RV = jax.lax.cond(
    jnp.any(sampling.positions_R < sampling.min_new_R),
    _ban_stops,
    lambda logits, *_: logits,
    logits_RV,
    sampling,
  )
  greedy_R = sampling.temperatures_R == 0
  scaled_RV = logits_RV / jnp.where(greedy_R, 1, sampling.temperatures_R)[:, None]
  highest_R1 = jnp.max(scaled_RV, axis=1, keepdims=True)
  weights_RV = jnp.exp(scaled_RV - highest_R1)
  # In the order of `losses.logprobs`, so that both round alike.
  normaliser_R1 = jnp.log(jnp.sum(weights_RV, axis=1, keepdims=True)) + highest_R1
  logprobs_RV = scaled_RV - normaliser_R1
  weights_RV = jax.lax.cond(
    sampling.filters, _filter, lambda weights, *_: weights, weights_RV, sampling
  )
  # Not argmax: on CPU its reduction over pairs is many times slower than two plain ones.
  vocabulary = scaled_RV.shape[1]
  best_RV = jnp.where(scaled_RV == highest_R1, jnp.arange(vocabulary), vocabulary - 1)
  ids_R = jnp.where(greedy_R, jnp.min(best_RV, axis=1), draw(weights_RV, sampling))
  chosen_R = jnp.take_along_axis(logprobs_RV, ids_R[:, None], axis=1)[:, 0]
  return ids_R.astype(jnp.int32), chosen_R, logprobs_RV


def draw(weights_RV: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws an id per row with probability proportional to its weight.

  First a block of `BLOCK` ids by its sum, then an id within it, each by its own uniform number:
  two random numbers a row instead of one per id, and no sum over the vocabulary in which small
  weights would be lost.
  """
  keys_R = jax.vmap(jax.random.fold_in)(
    jax.random.wrap_key_data(sampling.seeds_R2, impl="threefry2x32"), sampling.positions_R
  )
  uniform_R2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_R)
  rows, vocabulary = weights_RV.shape
  padded_RV = jnp.pad(weights_RV, ((0, 0), (0, -vocabulary % BLOCK)))
  blocks_RXB = padded_RV.reshape(rows, -1, BLOCK)
  block_R = _invert(jnp.sum(blocks_RXB, axis=-1), uniform_R2[:, 0])
  block_RB = jnp.take_along_axis(blocks_RXB, block_R[:, None, None], axis=1)[:, 0]
  return block_R * BLOCK + _invert(block_RB, uniform_R2[:, 1])


def _invert(weights_RN: jax.Array, uniform_R: jax.Array) -> jax.Array:
  """The first index whose running sum exceeds `uniform` of the total; never one of weight 0."""
  sums_RN = jnp.cumsum(weights_RN, axis=1)
  target_R1 = (uniform_R * sums_RN[:, -1])[:, None]
  positions_N = jnp.arange(weights_RN.shape[1])
  weighty_RN = weights_RN > 0
  # Sums of a long row are made of partial ones: where there is no weight they can grow, or fall.
  index_RN = jnp.where(weighty_RN & (sums_RN > target_R1), positions_N, positions_N.size)
  # Rounding can push the target to the total: the last index that has weight.
  last_R = jnp.max(jnp.where(weighty_RN, positions_N, 0), axis=1)
  return jnp.minimum(jnp.min(index_RN, axis=1), last_R)


def top(logprobs_RV: jax.Array, count: int, wanted: jax.Array) -> Top:
  """The `count` likeliest ids of each row; zeros where nobody wants them."""
  shape = (*logprobs_RV.shape[:-1], count)
  nothing = lambda _: Top(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))  # noqa: E731
  return jax.lax.cond(wanted, lambda x: Top(*jax.lax.top_k(x, count)), nothing, logprobs_RV)


def _penalize(logits_RV: jax.Array, counts_RV: jax.Array, sampling: Sampling) -> jax.Array:
  """SGLang's penalties: frequency per occurrence, presence once, repetition by scaling."""
  sampled_RV = counts_RV > 0
  logits_RV -= counts_RV * sampling.frequency_R[:, None]
  logits_RV -= jnp.where(sampled_RV, sampling.presence_R[:, None], 0)
  factor_R1 = sampling.repetition_R[:, None]
  scaled_RV = jnp.where(logits_RV > 0, logits_RV / factor_R1, logits_RV * factor_R1)
  return jnp.where(sampled_RV, scaled_RV, logits_RV)


def _ban_stops(logits_RV: jax.Array, sampling: Sampling) -> jax.Array:
  banned_RJ = jnp.where(
    (sampling.positions_R < sampling.min_new_R)[:, None],
    sampling.stops_RJ,
    logits_RV.shape[1],
  )
  rows_R1 = jnp.arange(logits_RV.shape[0])[:, None]
  return logits_RV.at[rows_R1, banned_RJ].set(jnp.finfo(jnp.float32).min, mode="drop")


def _filter(weights_RV: jax.Array, sampling: Sampling) -> jax.Array:
  """Zeroes what top_k, top_p and min_p exclude; all three look at the unfiltered weights."""
  order_RV = jnp.argsort(-weights_RV, axis=1, stable=True)
  sorted_RV = jnp.take_along_axis(weights_RV, order_RV, axis=1)
  total_R1 = jnp.sum(sorted_RV, axis=1, keepdims=True)
  before_RV = jnp.cumsum(sorted_RV, axis=1) - sorted_RV
  rank_V = jnp.arange(weights_RV.shape[1])
  # Sums round: a top_p of 1 is not left to them, so that it excludes nothing.
  top_k_R1, top_p_R1 = sampling.top_k_R[:, None], sampling.top_p_R[:, None]
  keep_RV = (
    ((top_k_R1 == 0) | (rank_V < top_k_R1))
    & ((top_p_R1 == 1) | (before_RV <= top_p_R1 * total_R1))
    & (sorted_RV >= sampling.min_p_R[:, None] * sorted_RV[:, :1])
  )
  keep_RV = keep_RV.at[:, 0].set(True)
  rows_R1 = jnp.arange(weights_RV.shape[0])[:, None]
  kept_RV = jnp.zeros(weights_RV.shape, bool).at[rows_R1, order_RV].set(keep_RV)
  return jnp.where(kept_RV, weights_RV, 0)
