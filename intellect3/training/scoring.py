"""The trainer's logprobs of packed tokens: the model's forward pass and its vocabulary head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intellect3.losses.logprobs import chunked_logprobs
from intellect3.models import transformer
from intellect3.models.config import ModelConfig


class Scores(NamedTuple):
  """What the model says of a packed `[B, T]` batch.

  Attributes:
    logprobs: float32[B, T]; `logprobs[t]` scores `tokens[t]`; 0.0 where `scored` is False.
    entropy: float32[B, T], of the distribution that `tokens[t]` was scored under, in nats; 0.0
      where `scored` is False.
    scored: bool[B, T], False in padding and on the first token of each segment, which nothing
      predicts.
    expert_load_LE: float32[moe layers, experts], tokens routed to each expert; no layers in a
      dense model.
  """

  logprobs: jax.Array
  entropy: jax.Array
  scored: jax.Array
  expert_load_LE: jax.Array


def score(
  config: ModelConfig,
  params: Any,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  temperature: jax.Array,
  *,
  head_chunk_size: int,
) -> Scores:
  """Scores every token of a packed batch under the model.

  The hidden state at t - 1 predicts token t, so targets and temperatures are shifted by one
  against the hidden states, and a row's last hidden state predicts nothing.

  Args:
    config: the model.
    params: its parameters.
    tokens: int32[B, T].
    positions: int32[B, T].
    segment_ids: int32[B, T], 0 in padding.
    temperature: float32[B, T], the temperature that each token was sampled with.
    head_chunk_size: tokens per chunk of the vocabulary head.

  Returns:
    The scores, differentiable in the parameters.
  """
  model = transformer.Transformer(config)
  output: Any = model.apply({"params": params}, tokens, positions, segment_ids)
  hidden_ND = output.hidden_BTD.reshape(-1, output.hidden_BTD.shape[-1])
  # The last column has no target; any id does, its result is cut off.
  targets = jnp.roll(tokens, -1, axis=1)
  logprobs_N, entropy_N = chunked_logprobs(
    hidden_ND,
    transformer.head(params, config),
    targets.reshape(-1),
    temperature_N=jnp.roll(temperature, -1, axis=1).reshape(-1),
    chunk_size=head_chunk_size,
  )
  same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
  scored = jnp.pad(same, ((0, 0), (1, 0)))
  return Scores(
    logprobs=jnp.where(scored, jnp.roll(logprobs_N.reshape(tokens.shape), 1, axis=1), 0.0),
    entropy=jnp.where(scored, jnp.roll(entropy_N.reshape(tokens.shape), 1, axis=1), 0.0),
    scored=scored,
    expert_load_LE=output.router.load_LE,
  )


def make_logprob_fn(
  config: ModelConfig, *, head_chunk_size: int
) -> Callable[[Any, jax.Array], jax.Array]:
  """Makes the function that scores one prompt with the trainer's forward pass (the canary).

  Args:
    config: the model.
    head_chunk_size: tokens per chunk of the vocabulary head.

  Returns:
    (params, ids int32[T]) -> logprobs float32[T] at temperature 1, 0.0 for the first id. Pure;
    `jax.jit` it.
  """

  def logprob_fn(params: Any, ids: jax.Array) -> jax.Array:
    tokens = jnp.asarray(ids, jnp.int32)[None]
    length = tokens.shape[1]
    return score(
      config,
      params,
      tokens,
      jnp.arange(length, dtype=jnp.int32)[None],
      jnp.ones((1, length), jnp.int32),
      jnp.ones((1, length), jnp.float32),
      head_chunk_size=head_chunk_size,
    ).logprobs[0]

  return logprob_fn
