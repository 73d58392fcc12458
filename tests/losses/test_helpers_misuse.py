"""The helpers that losses are made of check what they are given, as the losses do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.losses import aggregation, importance, kl, policy_gradient, segments, supervised
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

ONES = np.ones((2, 3), np.float32)
MASK = ONES > 0
IDS = np.ones((2, 3), np.int32)
quantiles = functools.partial(importance.quantiles, probabilities=(0.5,))
constant = functools.partial(aggregation.constant, divisor=2.0)
# Functions of values and a mask, and what they call the values.
HELPERS = {
  "token_mean": (aggregation.token_mean, "values"),
  "sequence_mean": (aggregation.sequence_mean, "values"),
  "constant": (constant, "values"),
  "masked_share": (importance.masked_share, "removed"),
  "effective_sample_size": (importance.effective_sample_size, "ratios"),
  "effective_sample_share": (importance.effective_sample_share, "ratios"),
  "sequence_ratio": (importance.sequence_ratio, "log_ratios"),
  "quantiles": (quantiles, "values"),
  "segment_sum": (segments.segment_sum, "values"),
  "segment_min": (segments.segment_min, "values"),
  "segment_mean": (segments.segment_mean, "values"),
}
BY_SEGMENT = ("sequence_mean", "sequence_ratio", "segment_sum", "segment_min", "segment_mean")
GIVEN = (jnp.asarray, np.asarray)


@pytest.mark.parametrize("name", HELPERS)
def test_values_and_mask_have_one_shape(name):
  """Also where NumPy's rules would stretch one to the other."""
  helper, called = HELPERS[name]
  values = MASK if name == "masked_share" else ONES
  helper(values, MASK)
  for kind in GIVEN:
    for wrong in (values[:, 1:], values[:1], values[:, :1], np.stack([values, values])):
      shape = ", ".join(map(str, wrong.shape))
      with pytest.raises(ValueError, match=rf"{called}: expected .*\[2, 3\], got \[{shape}\]"):
        helper(kind(wrong), kind(MASK))
    with pytest.raises(ValueError, match=rf"{called}: expected .*\[2, 1\], got \[2, 3\]"):
      helper(kind(values), kind(MASK[:, :1]))
    for change in (lambda array: array[0], lambda array: array[None]):  # equal, but no [B, T]
      with pytest.raises(ValueError, match=r"mask: expected \[B, T\], got shape \["):
        helper(kind(change(values)), kind(change(MASK)))


@pytest.mark.parametrize("name", HELPERS)
def test_the_mask_is_bool(name):
  """A mask of weights would be taken for one of ones."""
  helper, _ = HELPERS[name]
  values = MASK if name == "masked_share" else ONES
  for dtype in (np.float32, np.int32):
    for kind in GIVEN:
      with pytest.raises(ValueError, match=f"mask: expected bool, got {np.dtype(dtype)}"):
        helper(kind(values), kind(MASK.astype(dtype)))


@pytest.mark.parametrize(
  "name", [name for name in HELPERS if name not in ("masked_share", "segment_sum", "segment_mean")]
)
def test_values_are_floating(name):
  """But for the shares of a bool, and for sums that are taken in float32 anyway."""
  helper, called = HELPERS[name]
  with pytest.raises(ValueError, match=f"{called}: expected a floating dtype, got int32"):
    helper(IDS, MASK)


@pytest.mark.parametrize("name", [*BY_SEGMENT, "segment_count"])
def test_segment_ids_are_integers_of_the_shape(name):
  def helper(values, mask, segment_ids):
    if name == "segment_count":
      return segments.segment_count(mask, segment_ids)
    return HELPERS[name][0](values, mask, segment_ids=segment_ids)

  helper(ONES, MASK, segment_ids=IDS)
  with pytest.raises(ValueError, match=r"segment_ids: expected .*\[2, 3\], got \[2, 1\]"):
    helper(ONES, MASK, segment_ids=IDS[:, :1])
  with pytest.raises(ValueError, match="segment_ids: expected an integer dtype, got float32"):
    helper(ONES, MASK, segment_ids=ONES)


def test_the_count_of_segments():
  with pytest.raises(ValueError, match="mask: expected bool, got float32"):
    segments.segment_count(ONES, IDS)
  with pytest.raises(ValueError, match=r"mask: expected \[B, T\], got shape \[3\]"):
    segments.segment_count(MASK[0], IDS[0])


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.float32])
def test_counts_are_not_negative(kind):
  """Where they are known; 0 is that of a batch without tokens."""
  for wrong in (-1.0, -1e-3, float("nan")):
    for call in (
      functools.partial(aggregation.token_mean, ONES, MASK),
      functools.partial(importance.masked_share, MASK, MASK),
      functools.partial(policy_gradient.reinforce_loss, ONES, ONES, ONES, MASK),
      functools.partial(supervised.negative_log_likelihood, ONES, MASK),
    ):
      with pytest.raises(ValueError, match=r"denominator: expected .* at least 0, got"):
        call(denominator=kind(wrong))
    for call in (
      functools.partial(aggregation.sequence_mean, ONES, MASK),
      functools.partial(policy_gradient.sequence_ratio_loss, ONES, ONES, ONES, MASK),
    ):
      with pytest.raises(ValueError, match=r"num_sequences: expected .* at least 0, got"):
        call(denominator=kind(6.0), num_sequences=kind(wrong))
  assert aggregation.token_mean(ONES, MASK, denominator=kind(12.0)) == 0.5
  assert aggregation.token_mean(ONES, MASK & False, denominator=kind(0.0)) == 0


def test_counts_that_are_traced_pass():
  mean = jax.jit(lambda count: aggregation.token_mean(ONES, MASK, denominator=count))
  assert mean(12.0) == 0.5


@pytest.mark.parametrize("case", (*house.DEFAULTS, house.COMPONENTS), ids=str)
def test_an_aggregate_returns_a_scalar(case):
  arrays = batches.batch(0)
  fields = {name: arrays[name] for name in ("logprobs", *case.fields)}
  for aggregate, shape in (
    (lambda values, mask, **common: values, r"\[4, 24\]"),
    (lambda values, mask, **common: jnp.sum(values, 1), r"\[4\]"),
    (lambda values, mask, **common: jnp.sum(values)[None], r"\[1\]"),
  ):
    with pytest.raises(ValueError, match=f"aggregate: expected .*scalar.*, got shape {shape}"):
      jax.eval_shape(functools.partial(case.loss, aggregate=aggregate, **case.options), **fields)


def test_the_estimator_of_a_penalty_is_one_of_tokens():
  with pytest.raises(ValueError, match=r"expected .*\[2, 3\], got \[\]"):
    kl.penalty_loss(ONES, ONES, ONES, MASK, ref_logprobs=ONES, estimator=jnp.sum)
