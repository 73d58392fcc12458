"""Sampling against NumPy: frequencies, logprobs, and what a sample may depend on."""

import jax
import numpy as np
import pytest

from intellect3.inference.engine.device import sample
from intellect3.inference.engine.steps import Sampling

ROWS, VOCAB = 4096, 12
LOGITS_V = np.random.default_rng(0).normal(scale=2.0, size=VOCAB).astype(np.float32)

sample_compiled = jax.jit(sample)


def draw(seeds, positions, temperature):
  logits = np.broadcast_to(LOGITS_V, (ROWS, VOCAB))
  seeds_R2 = np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=1).astype(np.uint32)
  temperatures = np.full(ROWS, temperature, np.float32)
  sampling = Sampling(seeds_R2, positions.astype(np.int32), temperatures)
  ids, logprobs = jax.device_get(sample_compiled(logits, sampling))
  return ids, logprobs


def softmax64(temperature):
  scaled = LOGITS_V.astype(np.float64) / temperature
  exponentials = np.exp(scaled - scaled.max())
  return exponentials / exponentials.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_and_logprobs_are_of_the_tempered_softmax(temperature, vary):
  """Over many seeds at one position, and over many positions of one seed."""
  many, one = np.arange(ROWS, dtype=np.int64), np.full(ROWS, 3, np.int64)
  seeds, positions = (many + (5 << 32), one) if vary == "seed" else (one, many)
  ids, logprobs = draw(seeds, positions, temperature)
  expected = softmax64(temperature)
  np.testing.assert_allclose(logprobs, np.log(expected)[ids], atol=2e-6)
  counts = np.bincount(ids, minlength=VOCAB)
  deviation = np.abs(counts - ROWS * expected) / np.sqrt(ROWS * expected * (1 - expected))
  assert deviation.max() < 4.5


def test_temperature_zero_takes_the_largest_with_its_unscaled_logprob():
  many = np.arange(ROWS, dtype=np.int64)
  ids, logprobs = draw(many, many, 0.0)
  assert set(ids.tolist()) == {int(LOGITS_V.argmax())}
  np.testing.assert_allclose(logprobs, np.log(softmax64(1.0).max()), atol=2e-6)


def test_a_sample_depends_on_seed_and_position_and_not_on_its_row():
  generator = np.random.default_rng(1)
  seeds = generator.integers(0, 1 << 62, ROWS)
  positions = generator.integers(0, 1000, ROWS)
  ids, logprobs = draw(seeds, positions, 1.0)
  order = generator.permutation(ROWS)
  shuffled, shuffled_logprobs = draw(seeds[order], positions[order], 1.0)
  assert (shuffled == ids[order]).all() and (shuffled_logprobs == logprobs[order]).all()
  high_word, _ = draw(seeds ^ (1 << 40), positions, 1.0)
  next_position, _ = draw(seeds, positions + 1, 1.0)
  assert (high_word != ids).mean() > 0.3 and (next_position != ids).mean() > 0.3
