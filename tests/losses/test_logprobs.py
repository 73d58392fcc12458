"""The chunked vocabulary head against a full softmax in float64, its gradients and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.losses import logprobs

N, D, V = 37, 8, 50


def inputs(dtype=np.float32):
  rng = np.random.default_rng(0)
  return (
    rng.standard_normal((N, D)).astype(dtype),
    rng.standard_normal((D, V)).astype(dtype),
    rng.integers(0, V, N).astype(np.int32),
    np.where(np.arange(N) % 5 == 0, 0.0, rng.uniform(0.3, 2.0, N)).astype(np.float32),
  )


def full(hidden, head, targets, temperature):
  scaled = (hidden @ head) / np.where(temperature == 0, 1, temperature)[:, None]
  shifted = scaled - scaled.max(axis=1, keepdims=True)
  log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  entropy = -(np.exp(log_softmax) * log_softmax).sum(axis=1)
  return log_softmax[np.arange(N), targets], entropy


@functools.partial(jax.jit, static_argnames="chunk_size")
def chunked(hidden, head, targets, temperature, chunk_size):
  return logprobs.chunked_logprobs(
    hidden, head, targets, temperature_N=temperature, chunk_size=chunk_size
  )


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 64])
def test_against_a_full_softmax(chunk_size):
  arrays = inputs()
  scores, entropy, top1 = chunked(*arrays, chunk_size)
  wide = [array.astype(np.float64) for array in arrays[:2]]
  np.testing.assert_array_equal(top1, np.argmax(wide[0] @ wide[1], axis=1))
  expected, expected_entropy = full(*wide, *arrays[2:])
  assert scores.dtype == entropy.dtype == jnp.float32
  np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


def test_gradients_against_a_full_softmax():
  hidden, head, targets, temperature = inputs()

  def plain(hidden, head):
    scaled = hidden @ head / jnp.where(temperature == 0, 1, temperature)[:, None]
    scores = jax.nn.log_softmax(scaled)
    entropy = -jnp.sum(jnp.exp(scores) * scores, axis=1)
    return jnp.sum(jnp.sin(scores[jnp.arange(N), targets])) + jnp.sum(entropy**2)

  def ours(hidden, head):
    scores, entropy, _ = chunked(hidden, head, targets, temperature, 8)
    return jnp.sum(jnp.sin(scores)) + jnp.sum(entropy**2)

  for given, expected in zip(
    jax.grad(ours, (0, 1))(hidden, head), jax.grad(plain, (0, 1))(hidden, head), strict=True
  ):
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_bfloat16_states_are_summed_in_float32():
  hidden, head, targets, temperature = inputs()
  half = (jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16))
  rounded = [np.asarray(array, np.float64) for array in half]
  scores, _, _ = chunked(*half, targets, temperature, 8)
  np.testing.assert_allclose(scores, full(*rounded, targets, temperature)[0], rtol=1e-5, atol=1e-5)


def test_a_target_outside_the_vocabulary_is_nan_and_spoils_no_other():
  hidden, head, targets, temperature = inputs()
  targets[3], targets[9] = V, -1
  scores, _, _ = chunked(hidden, head, targets, temperature, 8)
  assert np.flatnonzero(np.isnan(scores)).tolist() == [3, 9]
  kept = jnp.arange(N) != 3

  def loss(hidden, head):
    scores, _, _ = chunked(hidden, head, targets, temperature, 8)
    return jnp.sum(jnp.where(kept & (jnp.arange(N) != 9), scores, 0))

  assert all(np.all(np.isfinite(g)) for g in jax.grad(loss, (0, 1))(hidden, head))


def test_no_buffer_of_all_logits():
  tokens, embed, vocab = 2048, 16, 8192

  def loss(hidden, head, targets, temperature):
    scores, entropy, _ = logprobs.chunked_logprobs(
      hidden, head, targets, temperature_N=temperature, chunk_size=64
    )
    return jnp.sum(scores) + jnp.sum(entropy)

  floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  compiled = (
    jax.jit(jax.grad(loss, (0, 1)))
    .lower(
      floats((tokens, embed)),
      floats((embed, vocab)),
      jax.ShapeDtypeStruct((tokens,), jnp.int32),
      floats((tokens,)),
    )
    .compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 4


def test_the_head_of_glm_4_5_air_is_scored_within_700_mib():
  tokens, embed, vocab = 4096, 256, 151552

  def loss(hidden, head, targets, temperature):
    scores = logprobs.chunked_logprobs(
      hidden, head, targets, temperature_N=temperature, chunk_size=256
    )
    return jnp.sum(scores.logprobs_N) + jnp.sum(scores.entropy_N), scores.top1_N

  for dtype in (jnp.float32, jnp.bfloat16):
    shapes = ((tokens, embed), dtype), ((embed, vocab), dtype), ((tokens,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((tokens,), jnp.float32))]
    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 700 * 2**20


def test_wrong_arguments_are_named():
  hidden, head, targets, temperature = inputs()
  call = functools.partial(logprobs.chunked_logprobs, temperature_N=temperature)
  with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
    call(hidden, head, targets, chunk_size=0)
  with pytest.raises(ValueError, match="targets_N: expected an integer dtype"):
    call(hidden, head, temperature, chunk_size=8)
  with pytest.raises(AssertionError):
    call(hidden[:-1], head, targets, chunk_size=8)
