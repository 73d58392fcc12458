"""The step benchmark compares like with like: the packed batch and the check of agreement."""

import numpy as np
import pytest

from tools.benchmarks import step, step_theirs


def test_packed_batch_trains_on_all_but_first_tokens_and_padding():
  size = step.Size(model={}, rows=3, length=64, steps=1, experts="eager")
  batch = step.packed_batch(size, vocab_size=11, seed=0)
  first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
  np.testing.assert_array_equal(batch["loss_mask"], (batch["segment_ids"] > 0) & ~first)
  assert batch["loss_tokens"] == batch["loss_mask"].sum()
  assert batch["tokens"].max() < 11
  assert batch["segment_ids"].max() > 1


def test_packed_mask_is_block_diagonal_and_causal():
  mask = step_theirs.packed_mask(np.array([[1, 1, 2, 0]]))[0, 0].int().tolist()
  assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
  ("change", "match"),
  [({"losses": [5.0, 4.1]}, "loss"), ({"grad_norm": 2.01}, "grad_norm")],
)
def test_disagreement_fails_the_run(change, match):
  ours = {"losses": [5.0, 4.0], "grad_norm": 2.0}
  step.check_agreement(ours, dict(ours), (3.0, 3.0))
  with pytest.raises(RuntimeError, match=match):
    step.check_agreement(ours, {**ours, **change}, (3.0, 3.0))
  with pytest.raises(RuntimeError, match="last loss"):
    step.check_agreement(ours, dict(ours), (3.0, 3.1))
