"""A misuse raises before anything is computed, and says what was expected and what was given."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.losses import aggregation, components, kl, policy_gradient
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

CASES = (*house.DEFAULTS, house.COMPONENTS)
NAN = float("nan")


def call(case, without=(), **changes):
  arrays = {**batches.batch(0), **changes}
  fields = {name: arrays[name] for name in ("logprobs", *case.fields) if name not in without}
  return case.loss(**fields, **case.options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_of_another_shape(case):
  arrays = batches.batch(0)
  for name in ("logprobs", *case.fields):
    for wrong in (arrays[name][:, 1:], arrays[name][:1], arrays[name][0], arrays[name][None]):
      with pytest.raises(ValueError, match=r"expected .*\[.*got.*\[") as raised:
        call(case, **{name: wrong})
      named = raised.value.args[0].split(":")[0]
      assert named == name or name == "loss_mask", raised.value


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_of_another_rank_all_at_once(case):
  """Equal shapes are not enough: a row alone, or a batch of batches, is refused too."""
  for change in (lambda array: array[0], lambda array: array[None]):
    arrays = {name: change(array) for name, array in batches.batch(0).items()}
    with pytest.raises(ValueError, match=r"loss_mask: expected \[B, T\], got shape"):
      call(case, **arrays)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_of_another_dtype(case):
  arrays = batches.batch(0)
  for name in ("logprobs", *case.fields):
    if name in ("loss_mask", "segment_ids"):
      continue
    with pytest.raises(ValueError, match=f"{name}: expected a floating dtype, got int32"):
      call(case, **{name: arrays["segment_ids"]})
  with pytest.raises(ValueError, match="loss_mask: expected bool, got int32"):
    call(case, loss_mask=arrays["segment_ids"])
  with pytest.raises(ValueError, match="loss_mask: expected bool, got float32"):
    call(case, loss_mask=arrays["advantages"])
  with pytest.raises(ValueError, match="segment_ids: expected an integer dtype, got float32"):
    call(case, segment_ids=arrays["advantages"])
  with pytest.raises(ValueError, match="segment_ids: expected an integer dtype, got bool"):
    call(case, segment_ids=arrays["loss_mask"])


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_denominators(case):
  bound = functools.partial(case.loss, **case.options)
  arrays = {name: batches.batch(0)[name] for name in ("logprobs", *case.fields)}
  with pytest.raises(ValueError, match=r"denominator: expected a scalar, got shape \[4\]"):
    bound(**arrays, denominator=np.ones(4, np.float32))
  with pytest.raises(ValueError, match=r"num_sequences: expected .*, got None"):
    bound(**arrays, denominator=3.0, aggregate=aggregation.sequence_mean)
  with pytest.raises(ValueError, match=r"aggregate: expected .*, got 'token_mean'"):
    bound(**arrays, aggregate="token_mean")


OLD = np.zeros((4, 24), np.float32)
WRONG = [
  (policy_gradient.masked_importance_loss, "ratio_low", {"ratio_low": 2.0, "ratio_high": 1.0}),
  (policy_gradient.masked_importance_loss, "ratio_low", {"ratio_low": -0.1}),
  (policy_gradient.masked_importance_loss, "ratio_low", {"ratio_low": NAN}),
  (policy_gradient.masked_importance_loss, "ratio_high", {"ratio_high": NAN}),
  (policy_gradient.masked_importance_loss, "sequence_ratio_min", {"sequence_ratio_min": -1.0}),
  (policy_gradient.masked_importance_loss, "sequence_ratio_min", {"sequence_ratio_min": NAN}),
  (policy_gradient.truncated_importance_loss, "ratio_max", {"ratio_max": 0.0}),
  (policy_gradient.truncated_importance_loss, "ratio_max", {"ratio_max": NAN}),
  (policy_gradient.truncated_importance_loss, "old_logprobs", {"old_logprobs": OLD[:, 1:]}),
  (policy_gradient.clipped_loss, "clip_low", {"clip_low": -0.1}),
  (policy_gradient.clipped_loss, "clip_low", {"clip_low": 1.1}),
  (policy_gradient.clipped_loss, "clip_low", {"clip_low": NAN}),
  (policy_gradient.clipped_loss, "clip_high", {"clip_high": -0.1}),
  (policy_gradient.clipped_loss, "clip_high", {"clip_high": NAN}),
  (policy_gradient.clipped_loss, "dual_clip", {"dual_clip": 1.0}),
  (policy_gradient.clipped_loss, "dual_clip", {"dual_clip": 0.5}),
  (policy_gradient.clipped_loss, "dual_clip", {"dual_clip": NAN}),
  (policy_gradient.clipped_loss, "behaviour_ratio_max", {"behaviour_ratio_max": 2.0}),
  (
    policy_gradient.clipped_loss,
    "behaviour_ratio_max",
    {"behaviour_ratio_max": -2.0, "old_logprobs": OLD},
  ),
  (policy_gradient.clipped_loss, "old_logprobs", {"old_logprobs": OLD.astype(np.int32)}),
  (policy_gradient.sequence_ratio_loss, "clip_low", {"clip_low": -1e-4}),
  (policy_gradient.sequence_ratio_loss, "clip_high", {"clip_high": NAN}),
  (policy_gradient.sequence_ratio_loss, "old_logprobs", {"old_logprobs": OLD[0]}),
  (policy_gradient.sequence_ratio_loss, "token_level", {"token_level": "x"}),
  (policy_gradient.sequence_ratio_loss, "token_level", {"token_level": 1}),
  (policy_gradient.cispo_loss, "ratio_low", {"ratio_low": 6.0}),
  (policy_gradient.cispo_loss, "ratio_low", {"ratio_low": -1.0}),
  (policy_gradient.cispo_loss, "ratio_high", {"ratio_high": NAN}),
  (policy_gradient.cispo_loss, "old_logprobs", {"old_logprobs": OLD[:1]}),
  (policy_gradient.probability_difference_loss, "difference_low", {"difference_low": -0.2}),
  (policy_gradient.probability_difference_loss, "difference_high", {"difference_high": NAN}),
  (policy_gradient.probability_difference_loss, "kl_tau", {"kl_tau": -1e-3}),
  (policy_gradient.probability_difference_loss, "kl_tau", {"kl_tau": float("inf")}),
  (policy_gradient.probability_difference_loss, "by_sign", {"by_sign": "no"}),
  (policy_gradient.probability_difference_loss, "by_sign", {"by_sign": None}),
  (policy_gradient.geometric_masked_loss, "ratio_low", {"ratio_low": 11.0}),
  (policy_gradient.geometric_masked_loss, "ratio_low", {"ratio_low": -0.1}),
  (policy_gradient.geometric_masked_loss, "ratio_high", {"ratio_high": NAN}),
  (policy_gradient.geometric_masked_loss, "ratio_max", {"ratio_max": 0.0}),
  (policy_gradient.cispo_loss, "ratio_high", {"ratio_high": np.ones(1, np.float32)}),
  (policy_gradient.cispo_loss, "ratio_high", {"ratio_high": np.asarray(NAN)}),
  (policy_gradient.clipped_loss, "clip_low", {"clip_low": np.asarray(1.1)}),
  (policy_gradient.clipped_loss, "clip_high", {"clip_high": np.float32(-0.1)}),
  (policy_gradient.clipped_loss, "clip_high", {"clip_high": "0.2"}),
  (policy_gradient.clipped_loss, "clip_high", {"clip_high": True}),
  (kl.reverse_kl_loss, "ratio_max", {"ratio_max": -1.0, "ref_logprobs": OLD}),
  (kl.reverse_kl_loss, "ratio_max", {"ratio_max": NAN, "ref_logprobs": OLD}),
  (kl.penalty_loss, "estimator", {"estimator": "k3", "ref_logprobs": OLD}),
]


@pytest.mark.parametrize(("loss_fn", "name", "options"), WRONG)
def test_hyperparameters(loss_fn, name, options):
  arrays = {field: batches.batch(0)[field] for field in ("logprobs", *house.COMMON)}
  with pytest.raises(ValueError, match=rf"{name}: expected .*, (got|since)"):
    loss_fn(**arrays, **options)


RIGHT = [
  (policy_gradient.masked_importance_loss, {"ratio_low": 0.7, "ratio_high": 1.5}),
  (policy_gradient.truncated_importance_loss, {"ratio_max": 1.25}),
  (policy_gradient.clipped_loss, {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": 3.0}),
  (policy_gradient.sequence_ratio_loss, {"clip_low": 0.1, "clip_high": 0.5}),
  (policy_gradient.cispo_loss, {"ratio_low": 0.75, "ratio_high": 1.5}),
  (policy_gradient.probability_difference_loss, {"difference_low": 0.1, "kl_tau": 0.25}),
  (policy_gradient.geometric_masked_loss, {"ratio_low": 0.75, "ratio_max": 1.5}),
  (functools.partial(kl.reverse_kl_loss, ref_logprobs=OLD), {"ratio_max": 1.5}),
  (functools.partial(components.weighted_sum_loss, ref_logprobs=OLD), {"ref_kl_coefficient": 0.5}),
]


@pytest.mark.parametrize(("loss_fn", "options"), RIGHT)
def test_hyperparameters_may_be_numbers_of_a_library(loss_fn, options):
  """As they come from a sweep over an array, or from a schedule; the same as Python's."""
  arrays = {field: batches.batch(0)[field] for field in ("logprobs", *house.COMMON)}
  wanted, _ = loss_fn(**arrays, **options)
  for kind in (np.float32, np.float64, np.asarray, jnp.float32):
    found, _ = loss_fn(**arrays, **{name: kind(value) for name, value in options.items()})
    np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=str(kind))
    assert found.dtype == np.float32


def test_an_option_may_be_a_bool_of_numpy():
  arrays = {field: batches.batch(0)[field] for field in ("logprobs", *house.COMMON)}
  for by_sign in (True, False):
    wanted, found = (
      policy_gradient.probability_difference_loss(**arrays, by_sign=kind(by_sign))[0]
      for kind in (bool, np.bool_)
    )
    assert found == wanted


def test_both_bounds_are_told():
  arrays = {field: batches.batch(0)[field] for field in ("logprobs", *house.COMMON)}
  with pytest.raises(ValueError, match=r"ratio_low: expected at most ratio_high \(1.0\), got 2.0"):
    policy_gradient.masked_importance_loss(**arrays, ratio_low=2.0, ratio_high=1.0)


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_hyperparameters_are_keywords(case):
  arrays = batches.batch(0)
  positional = [arrays[name] for name in ("logprobs", *case.fields) if name != "segment_ids"]
  with pytest.raises(TypeError):
    case.loss(*positional, arrays["segment_ids"])
