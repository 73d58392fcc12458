"""Logprobs, entropies and most likely tokens from hidden states, without a `[tokens, vocab]` array.

Place in the ring: the train step and the engine's scoring call it with the model's vocabulary head.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class TokenScores(NamedTuple):
  """What a vocabulary head says of N tokens.

  Attributes:
    logprobs_N: float32, of the targets, in nats.
    entropy_N: float32, of the tempered distribution, in nats.
    top1_N: int32, the most likely token (the lowest of equals); no gradient flows through it.
  """

  logprobs_N: jax.Array
  entropy_N: jax.Array
  top1_N: jax.Array


def chunked_logprobs(
  hidden_ND: jax.Array,
  head_DV: jax.Array,
  targets_N: jax.Array,
  *,
  temperature_N: jax.Array,
  chunk_size: int,
) -> TokenScores:
  """Scores tokens under `softmax(hidden @ head / temperature)`, in one pass over the vocabulary.

  A map over chunks of tokens whose body is checkpointed: the forward and the backward pass hold
  the logits of one chunk at a time. Temperature 0 (greedy) means the unscaled softmax, as servers
  record the logprobs of greedy tokens.

  Args:
    hidden_ND: floating [N, D], after the final norm.
    head_DV: floating [D, V]; multiplied in the dtype of the hidden states, summed in float32.
    targets_N: integer [N], each in [0, V); a target outside gets the logprob NaN.
    temperature_N: floating [N], >= 0.
    chunk_size: tokens per chunk, >= 1; N need not be a multiple. A backward pass holds about three
      float32 arrays [chunk, V]: 444 MiB at 256 x 151,552.

  Returns:
    `TokenScores`; logprobs and entropies are differentiable in the hidden states and the head.

  Raises:
    ValueError: where chunk_size < 1 or a dtype is wrong.
  """
  chex.assert_rank([hidden_ND, head_DV, targets_N, temperature_N], [2, 2, 1, 1])
  chex.assert_equal_shape_prefix([hidden_ND, targets_N, temperature_N], 1)
  chex.assert_equal(hidden_ND.shape[1], head_DV.shape[0])
  if chunk_size < 1:
    raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
  if not jnp.issubdtype(targets_N.dtype, jnp.integer):
    raise ValueError(f"targets_N: expected an integer dtype, got {targets_N.dtype}")
  if not jnp.issubdtype(hidden_ND.dtype, jnp.floating):
    raise ValueError(f"hidden_ND: expected a floating dtype, got {hidden_ND.dtype}")

  @jax.checkpoint
  def chunk(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> TokenScores:
    hidden_CD, targets_C, temperature_C = inputs
    accumulate = jnp.promote_types(hidden_CD.dtype, jnp.float32)
    logits_CV = jnp.dot(
      hidden_CD, head_DV.astype(hidden_CD.dtype), preferred_element_type=accumulate
    )
    divisor_C = jnp.where(temperature_C == 0, 1, temperature_C).astype(accumulate)
    logits_CV = logits_CV / divisor_C[:, None]
    normaliser_C = jax.nn.logsumexp(logits_CV, axis=1)
    # A comparison and a sum fuse, forward and backward; a gather's gradient is a scatter.
    chosen_CV = targets_C[:, None] == jnp.arange(logits_CV.shape[1])
    chosen_C = jnp.sum(jnp.where(chosen_CV, logits_CV, 0), axis=1)
    known_C = (targets_C >= 0) & (targets_C < logits_CV.shape[1])
    logprobs_C = jnp.where(known_C, chosen_C - normaliser_C, jnp.nan)
    probabilities_CV = jnp.exp(logits_CV - normaliser_C[:, None])
    entropy_C = normaliser_C - jnp.sum(probabilities_CV * logits_CV, axis=1)
    top1_C = jnp.argmax(jax.lax.stop_gradient(logits_CV), axis=1).astype(jnp.int32)
    return TokenScores(logprobs_C, entropy_C, top1_C)

  count = hidden_ND.shape[0]
  if count <= chunk_size:
    return chunk((hidden_ND, targets_N, temperature_N))
  padding = -count % chunk_size

  def split(array: jax.Array) -> jax.Array:
    padded = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(-1, chunk_size, *array.shape[1:])

  scores = jax.lax.map(chunk, (split(hidden_ND), split(targets_N), split(temperature_N)))
  return jax.tree.map(lambda array: array.reshape(-1)[:count], scores)
