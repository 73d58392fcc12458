"""Long rows: the whole tiny model, forward and backward, in the memory the project promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.models import presets, transformer
from intellect3.training import scoring
from tests.kernels import attention_cases as cases

ARRAYS = ("tokens", "positions", "segment_ids", "temperature")


def loss(config, params, batch):
  scores = scoring.score(config, params, *(batch[name] for name in ARRAYS), head_chunk_size=512)
  return jnp.sum(scores.logprobs) / scores.logprobs.size


def compile_gradient(tokens):
  config = presets.tiny(remat_policy="full", max_positions=tokens)
  assert config.attention == "auto"
  params, _ = transformer.abstract(config)
  batch = {
    name: jax.ShapeDtypeStruct((1, tokens), jnp.float32 if name == "temperature" else jnp.int32)
    for name in ARRAYS
  }
  gradient = jax.jit(jax.value_and_grad(functools.partial(loss, config)))
  return config, gradient.lower(params, batch).compile()


def test_a_row_of_32768_tokens_trains_within_2_gib():
  _, compiled = compile_gradient(32_768)
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2**30


@pytest.mark.slow
def test_a_row_of_6144_tokens_really_trains():
  config, compiled = compile_gradient(6_144)
  segment_ids, positions = cases.packed_ids([[4_000, 700, 1_400]], 6_144)
  batch = {
    "tokens": np.random.default_rng(0).integers(0, config.vocab_size, segment_ids.shape),
    "positions": positions,
    "segment_ids": segment_ids,
    "temperature": np.ones(segment_ids.shape, np.float32),
  }
  batch["tokens"] = batch["tokens"].astype(np.int32)
  value, gradient = compiled(transformer.init(config, jax.random.key(0)), batch)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
