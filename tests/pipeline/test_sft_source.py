"""Supervised batches are a function of the step number alone."""

import threading

import numpy as np
import pytest

from intellect3.pipeline import sft_source


def example(number):
  rng = np.random.default_rng(number)
  tokens = rng.integers(1, 50, 4 + number % 5, dtype=np.int32)
  return tokens, np.arange(len(tokens)) >= 2


def _batches(**changes):
  arguments = {
    "examples_per_step": 6,
    "first_step": 1,
    "last_step": 4,
    "row_length": 12,
    "micro_rows": 1,
    "stop": threading.Event(),
  }
  return sft_source.batches(example, **{**arguments, **changes})


def test_each_step_holds_its_own_examples():
  with _batches() as iterator:
    found = list(iterator)
  for step, batch in enumerate(found):
    wanted = sorted(tuple(example(6 * step + n)[0]) for n in range(6))
    got = []
    for row in range(len(batch.tokens)):
      for segment in range(1, batch.segment_ids[row].max() + 1):
        got.append(tuple(batch.tokens[row][batch.segment_ids[row] == segment]))
    assert sorted(got) == wanted
    assert batch.loss_tokens == sum(len(tokens) - 2 for tokens in wanted)
    assert (batch.advantages == batch.loss_mask).all()


def test_it_goes_on_from_a_state():
  with _batches() as iterator:
    batches = list(iterator)
  with _batches() as fresh:
    fresh.set_state({"next_step": 3})
    for batch in batches[2:]:
      assert all(np.array_equal(a, b) for a, b in zip(next(fresh), batch, strict=True))
    with pytest.raises(StopIteration):
      next(fresh)


def test_a_batch_without_a_trained_token_is_an_error():
  def silent(number):
    return np.ones(4, np.int32), np.zeros(4, bool)

  with (
    sft_source.batches(
      silent,
      examples_per_step=2,
      first_step=1,
      last_step=1,
      row_length=8,
      micro_rows=1,
      stop=threading.Event(),
    ) as iterator,
    pytest.raises(ValueError, match="loss_mask"),
  ):
    next(iterator)
