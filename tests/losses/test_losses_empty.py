"""A batch without tokens, or without rows, is worth 0 and no error."""

import jax
import numpy as np
import pytest

from intellect3.losses import aggregation, importance, segments
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

SHAPES = ((3, 0), (0, 5), (0, 0))
CASES = (
  *house.DEFAULTS,
  house.COMPONENTS,
  *(case for case in house.AVERAGED if case.name.startswith("reinforce")),
)


def empty(case, shape, with_ids):
  """The arrays of a case, without an entry."""
  arrays = {name: array[:0] for name, array in batches.batch(0).items()}
  fields = [name for name in case.fields if with_ids or name != "segment_ids"]
  return {name: arrays[name].reshape(shape) for name in ("logprobs", *fields)}


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no_ids"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_loss(case, with_ids):
  for shape in SHAPES:
    arrays = empty(case, shape, with_ids)
    logprobs = arrays.pop("logprobs")
    (loss, metrics), gradient = house.plain(case)(logprobs, arrays)
    assert loss == 0 and loss.dtype == np.float32, shape
    assert metrics and all(value == 0 for value in metrics.values()), metrics
    assert gradient.shape == shape


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_of_a_batch_that_has_tokens_elsewhere(case):
  """With the global counts of the batch, as one micro-batch of it; jitted."""
  arrays = empty(case, (2, 0), with_ids=True)
  logprobs = arrays.pop("logprobs")
  counts = {"denominator": np.float32(7), "num_sequences": np.float32(2)}
  function = jax.jit(lambda logprobs, rest: case.loss(logprobs, **rest, **case.options))
  loss, metrics = function(logprobs, {**arrays, **counts})
  assert loss == 0 and all(value == 0 for value in metrics.values()), metrics


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_helpers(shape):
  values, mask, ids = (np.zeros(shape, kind) for kind in (np.float32, bool, np.int32))
  for one in (None, ids):
    for name in ("sum", "mean", "min"):
      assert getattr(segments, f"segment_{name}")(values, mask, one).shape == shape
    assert segments.segment_count(mask, one).shape == shape
    assert importance.sequence_ratio(values, mask, one).shape == shape
    assert aggregation.token_mean(values, mask, segment_ids=one) == 0
    assert aggregation.sequence_mean(values, mask, segment_ids=one) == 0
    assert aggregation.constant(values, mask, divisor=2.0, segment_ids=one) == 0
  assert importance.effective_sample_size(values, mask) == 0
  assert importance.effective_sample_share(values, mask) == 0
  assert importance.masked_share(mask, mask) == 0
  assert np.isnan(importance.quantiles(values, mask, [0.0, 0.5])).all()
