"""The scoring step: the train step's forward pass alone, in micro-batches, for a frozen model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_batches import pack, records

from intellect3.models import presets, transformer
from intellect3.training import micro_batches, scoring

CONFIG = presets.tiny_qwen3(
  embed_dim=16, head_dim=4, mlp_dim=24, vocab_size=32, num_layers=1, num_dense_layers=1
)
MADE = records([8, 5, 7, 3, 4, 6])
PLAN = ((0, 3), (1, 5), (2,), (4,))


def test_rows_are_split_so_that_blocks_of_rows_stay_where_they_are():
  rows = jnp.arange(6)[:, None] * jnp.ones((1, 2), jnp.int32)
  split = micro_batches.split(rows, 2)
  assert split[:, :, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
  np.testing.assert_array_equal(micro_batches.merge(split), rows)
  with pytest.raises(ValueError, match="multiple of micro_rows = 4, got 6"):
    micro_batches.check(6, 4, 1)
  with pytest.raises(ValueError, match=r"micro_rows: expected a multiple of the 4 parts .*, got 2"):
    micro_batches.check(6, 2, 4)


def test_each_trajectory_is_scored_as_alone_at_its_own_temperature():
  params = transformer.init(CONFIG, jax.random.key(0))
  batch = pack(MADE, PLAN, row_length=12, row_count=4)
  fn = scoring.make_batch_logprob_fn(CONFIG, micro_rows=2, head_chunk_size=16)
  found = np.asarray(jax.jit(fn)(params, batch))
  assert found.shape == batch.tokens.shape and found.dtype == np.float32
  assert (found[batch.segment_ids == 0] == 0.0).all()
  head = np.float64(transformer.head(params, CONFIG))

  @jax.jit
  def hidden(tokens):
    ones = jnp.ones_like(tokens)
    return (
      transformer.Transformer(CONFIG)
      .apply({"params": params}, tokens, jnp.arange(8)[None], ones)
      .hidden_BTD[0]
    )

  for row, numbers in enumerate(PLAN):
    start = 0
    for number in numbers:
      trajectory = MADE[number].trajectory
      length = len(trajectory.tokens)
      padded = np.zeros((1, 8), np.int32)
      padded[0, :length] = trajectory.tokens
      logits = np.float64(hidden(padded)) @ head / trajectory.temperature
      logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
      expected = logprobs[np.arange(length - 1), trajectory.tokens[1:]]
      np.testing.assert_allclose(found[row, start + 1 : start + length], expected, atol=1e-5)
      assert found[row, start] == 0.0
      start += length


def test_micro_rows_are_checked():
  with pytest.raises(ValueError, match="micro_rows: expected at least 1, got 0"):
    scoring.make_batch_logprob_fn(CONFIG, micro_rows=0, head_chunk_size=16)
