"""Small models and batches that the model tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.models import presets, transformer


def small(**changes):
  """A model with every kind of part: a dense and two MoE layers."""
  values = dict(embed_dim=32, num_layers=3, mlp_dim=48, expert_mlp_dim=24, vocab_size=97)
  return presets.tiny(**{**values, **changes})


def random_params(config, seed=0):
  """Parameters without a zero or one: biases, norm scales and correction biases count too."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    center = 1.0 if path[-1].key == "scale" else 0.0
    return rng.normal(center, 0.2, shape.shape).astype(shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, transformer.abstract(config)[0])


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, positions, segment_ids):
  return transformer.Transformer(config).apply({"params": params}, tokens, positions, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def forward_cached(config, params, tokens, positions, segment_ids, cache, slots):
  return transformer.Transformer(config).apply(
    {"params": params}, tokens, positions, segment_ids, cache, slots
  )


def rows(config, batch, length, seed=0):
  """Whole rows of one segment each: tokens, positions, segment ids."""
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
  positions = np.broadcast_to(np.arange(length), (batch, length))
  return tokens.astype(np.int32), positions.astype(np.int32), np.ones((batch, length), np.int32)


def token_logprobs(config, params, hidden, targets):
  logits = hidden @ transformer.head(params, config)
  return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
