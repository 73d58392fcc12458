"""The policy-gradient losses against NumPy in float64, and the properties the contracts ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from intellect3.losses import policy_gradient, supervised

ROWS, LENGTH = 3, 16
LOSSES = (policy_gradient.masked_importance_loss, policy_gradient.reinforce_loss)

jitted = {loss_fn: jax.jit(loss_fn) for loss_fn in LOSSES}
masked_importance = jitted[policy_gradient.masked_importance_loss]
masked_importance_grad = jax.jit(
  jax.grad(lambda *args, **kwargs: policy_gradient.masked_importance_loss(*args, **kwargs)[0])
)


def batch(seed, spread=1.0):
  """Rows of several trajectories and padding, with ratios in and out of every bound."""
  rng = np.random.default_rng(seed)
  logprobs = -rng.exponential(1.0, (ROWS, LENGTH))
  inference_logprobs = logprobs - spread * rng.standard_normal((ROWS, LENGTH))
  inference_logprobs -= np.where(rng.random((ROWS, LENGTH)) < 0.05, 20.0, 0.0)
  inference_logprobs += np.where(rng.random((ROWS, LENGTH)) < 0.05, 20.0, 0.0)
  segment_ids = np.sort(rng.integers(1, 5, (ROWS, LENGTH)), axis=1)
  segment_ids[:, LENGTH - rng.integers(1, 4) :] = 0
  loss_mask = (rng.random((ROWS, LENGTH)) < 0.7) & (segment_ids != 0)
  return {
    "logprobs": logprobs.astype(np.float32),
    "inference_logprobs": inference_logprobs.astype(np.float32),
    "advantages": rng.standard_normal((ROWS, LENGTH)).astype(np.float32),
    "loss_mask": loss_mask,
    "segment_ids": segment_ids.astype(np.int32),
  }


def oracle(
  logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator=None, low=0.5,
  high=5.0, sequence_min=1e-5,
):  # fmt: skip
  """Token by token, in float64, by the definition; returns loss, metrics, gradient."""
  count = denominator or max(loss_mask.sum(), 1)
  loss = kl = ratio_sum = token_out = sequence_out = 0.0
  gradient = np.zeros(logprobs.shape)
  for row in range(logprobs.shape[0]):
    for segment in set(segment_ids[row]) - {0}:
      tokens = [t for t in np.flatnonzero(segment_ids[row] == segment) if loss_mask[row, t]]
      d = {t: float(logprobs[row, t]) - float(inference_logprobs[row, t]) for t in tokens}
      dropped = any(np.exp(d[t]) < sequence_min for t in tokens)
      for t in tokens:
        ratio = np.exp(d[t])
        kl += np.exp(d[t]) - 1 - d[t]
        ratio_sum += ratio
        out = not low <= ratio <= high
        token_out += out
        sequence_out += dropped
        if not out and not dropped:
          loss -= ratio * float(advantages[row, t])
          gradient[row, t] = -ratio * float(advantages[row, t]) / count
  metrics = {
    "importance_ratio": ratio_sum,
    "mismatch_kl": kl,
    "masked_share": token_out,
    "sequence_masked_share": sequence_out,
  }
  return loss / count, {name: value / count for name, value in metrics.items()}, gradient


def test_one_token_by_hand():
  # ratio e^0.5 = 1.6487, advantage 2: loss -3.2974; alone in a denominator of 4: -0.82436.
  one = np.float32([[0.0]])
  loss, metrics = policy_gradient.masked_importance_loss(
    one, one - 0.5, one + 2, one == 0, denominator=4.0
  )
  np.testing.assert_allclose(loss, -0.82436, rtol=1e-5)
  np.testing.assert_allclose(metrics["mismatch_kl"], (1.6487213 - 1 - 0.5) / 4, rtol=1e-5)
  np.testing.assert_allclose(metrics["importance_ratio"], 1.6487213 / 4, rtol=1e-5)


def test_the_bounds_belong_to_the_kept():
  d = np.log(np.float32([[0.25, 4.0, 0.125, 8.0]]))
  loss, metrics = policy_gradient.masked_importance_loss(
    d, np.zeros_like(d), np.ones_like(d), np.ones(d.shape, bool), ratio_low=0.25, ratio_high=4.0
  )
  np.testing.assert_allclose(loss, -(0.25 + 4.0) / 4, rtol=1e-6)
  np.testing.assert_allclose(metrics["masked_share"], 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_masked_importance_against_float64(seed):
  arrays = batch(seed)
  loss, metrics = masked_importance(**arrays)
  expected, expected_metrics, _ = oracle(**arrays)
  np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_cases_hold_dropped_tokens_and_sequences():
  cases = [oracle(**batch(seed))[1] for seed in range(8)]
  assert all(case["masked_share"] > 0 for case in cases)
  assert sum(case["sequence_masked_share"] > 0 for case in cases) >= 3


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_flows_through_the_ratio(seed):
  arrays = batch(seed)
  logprobs = arrays.pop("logprobs")
  gradient = masked_importance_grad(logprobs, **arrays)
  expected = oracle(logprobs, **arrays)[2]
  np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_gradients_numerically(loss_fn):
  arrays = batch(3, spread=0.2)
  logprobs = arrays.pop("logprobs")
  with jax.enable_x64(True):
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()}
    check_grads(
      lambda x: loss_fn(x, **wide)[0], (logprobs.astype(np.float64),), order=1, modes=("rev",)
    )


def test_reinforce_against_float64():
  arrays = batch(1)
  loss, metrics = policy_gradient.reinforce_loss(**arrays)
  mask = arrays["loss_mask"]
  wide = arrays["advantages"].astype(np.float64) * arrays["logprobs"]
  np.testing.assert_allclose(loss, -wide[mask].sum() / mask.sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics["mismatch_kl"], oracle(**arrays)[1]["mismatch_kl"], rtol=1e-5)
  gradient = jax.grad(lambda x: policy_gradient.reinforce_loss(**{**arrays, "logprobs": x})[0])(
    arrays["logprobs"]
  )
  np.testing.assert_allclose(
    gradient, np.where(mask, -arrays["advantages"] / mask.sum(), 0), rtol=1e-5
  )


def test_supervised_by_hand():
  logprobs = np.float32([[-1.0, -2.0, np.nan], [-4.0, np.inf, np.nan]])
  mask = np.array([[True, True, False], [True, False, False]])
  loss, metrics = supervised.negative_log_likelihood(logprobs, mask)
  np.testing.assert_allclose(loss, 7 / 3, rtol=1e-6)
  np.testing.assert_allclose(metrics["negative_log_likelihood"], 7 / 3, rtol=1e-6)
  gradient = jax.grad(
    lambda x: supervised.negative_log_likelihood(x, mask, denominator=6.0)[0]
  )(logprobs)  # fmt: skip
  np.testing.assert_allclose(gradient, np.where(mask, -1 / 6, 0), rtol=1e-6)


def results(arrays, loss_fn=masked_importance):
  loss, metrics = loss_fn(**arrays)
  return np.array([loss, *(metrics[name] for name in sorted(metrics))], np.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), where=st.randoms(use_true_random=False))
def test_tokens_may_stand_in_any_order(seed, where):
  arrays = batch(seed)
  order = list(range(LENGTH))
  where.shuffle(order)
  rows = list(range(ROWS))
  where.shuffle(rows)
  shuffled = {name: array[rows][:, order] for name, array in arrays.items()}
  np.testing.assert_allclose(results(shuffled), results(arrays), rtol=1e-4, atol=1e-6)
  logprobs, moved = arrays.pop("logprobs"), shuffled.pop("logprobs")
  gradient = masked_importance_grad(logprobs, **arrays)
  np.testing.assert_allclose(
    masked_importance_grad(moved, **shuffled), np.asarray(gradient)[rows][:, order], rtol=1e-6
  )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_segment_numbers_are_only_names(seed):
  arrays = batch(seed)
  names = np.array([0, 7_000_000, -3, 12, 5], np.int32)
  renamed = {**arrays, "segment_ids": names[arrays["segment_ids"]]}
  np.testing.assert_array_equal(results(renamed), results(arrays))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_packed_is_alone(seed):
  """Each trajectory in a row of its own, padded, adds up to the packed rows."""
  arrays = batch(seed)
  denominator = float(arrays["loss_mask"].sum())
  packed = results({**arrays, "denominator": denominator})
  alone = np.zeros_like(packed)
  for segment in range(1, 5):
    mine = arrays["segment_ids"] == segment
    rows = {
      name: np.where(mine, array, np.zeros((), array.dtype)) for name, array in arrays.items()
    }
    alone += results({**rows, "denominator": denominator})
  np.testing.assert_allclose(alone, packed, rtol=1e-4, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_micro_batches_add_up(loss_fn, seed):
  arrays = batch(seed)
  count = float(arrays["loss_mask"].sum())
  run = functools.partial(results, loss_fn=functools.partial(jitted[loss_fn], denominator=count))
  parts = [run({name: array[row : row + 1] for name, array in arrays.items()}) for row in range(3)]
  np.testing.assert_allclose(np.sum(parts, axis=0), run(arrays), rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 10_000),
  junk=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
  field=st.sampled_from(["logprobs", "inference_logprobs", "advantages"]),
)
def test_what_is_masked_never_matters(seed, junk, field):
  arrays = batch(seed)
  dirty = {**arrays, field: np.where(arrays["loss_mask"], arrays[field], np.float32(junk))}
  np.testing.assert_array_equal(results(dirty), results(arrays))
  logprobs, dirty_logprobs = arrays.pop("logprobs"), dirty.pop("logprobs")
  np.testing.assert_array_equal(
    masked_importance_grad(dirty_logprobs, **dirty), masked_importance_grad(logprobs, **arrays)
  )


def test_an_overflowing_ratio_is_dropped_without_a_nan():
  arrays = batch(0)
  row, token = np.argwhere(arrays["loss_mask"])[0]
  arrays["inference_logprobs"][row, token] = -1e4
  logprobs = arrays.pop("logprobs")
  gradient = masked_importance_grad(logprobs, **arrays)
  assert np.all(np.isfinite(gradient)) and gradient[row, token] == 0


def test_a_nan_at_a_trained_token_is_seen():
  arrays = batch(0)
  row, token = np.argwhere(arrays["loss_mask"])[0]
  arrays["logprobs"][row, token] = np.nan
  assert np.isnan(masked_importance(**arrays)[0])


def test_an_unmasked_token_does_not_drop_its_trajectory():
  d = np.float32([[-30.0, 0.0, 0.0, 0.0]])
  mask = np.array([[False, True, True, True]])
  ones = np.ones_like(d)
  loss, metrics = policy_gradient.masked_importance_loss(d, 0 * d, ones, mask)
  assert metrics["sequence_masked_share"] == 0 and loss == -1
  # Masked in, it takes the whole of its own trajectory, and only that, out.
  segments = np.int32([[1, 1, 2, 2]])
  loss, metrics = policy_gradient.masked_importance_loss(
    d, 0 * d, ones, mask | True, segment_ids=segments
  )
  np.testing.assert_allclose([loss, metrics["sequence_masked_share"]], [-0.5, 0.5])
  loss, metrics = policy_gradient.masked_importance_loss(d, 0 * d, ones, mask | True)
  np.testing.assert_allclose([loss, metrics["sequence_masked_share"]], [0.0, 1.0])


def test_padding_is_not_a_trajectory_even_if_masked_in():
  arrays = batch(5)
  opened = {**arrays, "loss_mask": arrays["loss_mask"] | (arrays["segment_ids"] == 0)}
  np.testing.assert_array_equal(results(opened), results(arrays))


def test_an_empty_batch_costs_nothing():
  arrays = batch(0)
  arrays["loss_mask"][:] = False
  np.testing.assert_array_equal(results(arrays), 0)


def test_half_precision_logprobs_are_summed_in_float32():
  arrays = {name: np.ones((4, 4096), np.float32) for name in ("logprobs", "advantages")}
  half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
  mask = np.ones((4, 4096), bool)
  loss, _ = policy_gradient.masked_importance_loss(
    half["logprobs"], half["logprobs"], half["advantages"], mask, denominator=1.0
  )
  assert loss.dtype == jnp.float32 and loss == -4 * 4096


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_wrong_arguments_are_named(loss_fn):
  arrays = batch(0)
  with pytest.raises(ValueError, match=r"logprobs: expected a floating dtype, got int32"):
    loss_fn(**{**arrays, "logprobs": arrays["segment_ids"]})
  with pytest.raises(ValueError, match=r"loss_mask: expected bool, got int32"):
    loss_fn(**{**arrays, "loss_mask": arrays["segment_ids"]})
  with pytest.raises(AssertionError):
    loss_fn(**{**arrays, "advantages": arrays["advantages"][:, :1]})
  with pytest.raises(AssertionError):
    loss_fn(**{name: array[0] for name, array in arrays.items()})


def test_swapped_bounds_are_named():
  with pytest.raises(ValueError, match=r"ratio_low: expected at most ratio_high \(1.0\), got 2.0"):
    policy_gradient.masked_importance_loss(**batch(0), ratio_low=2.0, ratio_high=1.0)
