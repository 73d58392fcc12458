"""Ratios and what they say of a batch, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.losses import importance, policy_gradient
from tests.losses import losses_batches as batches

SHAPE = (3, 16)


def arrays(seed):
  rng = np.random.default_rng(seed)
  logprobs = -rng.exponential(1.0, SHAPE).astype(np.float32)
  behaviour = (logprobs - rng.standard_normal(SHAPE)).astype(np.float32)
  mask = rng.random(SHAPE) < 0.6
  return np.where(mask, logprobs, np.float32(np.nan)), behaviour, mask


def test_mismatch_kl_is_accurate_where_the_policies_nearly_agree():
  d = np.float32([[1e-6, -1e-6, 1e-4, -1e-4, 0.0]])
  expected = np.expm1(d.astype(np.float64)) - d.astype(np.float64)
  # exp(d) - d - 1 would be off by 1e-8, more than the value itself.
  error = np.abs(importance.mismatch_kl(d) - expected)
  assert np.all(error <= 1e-7 * np.abs(d)), error


def test_mismatch_kl_in_expectation_is_the_kl():
  """E over tokens of the behaviour policy q of expm1(d) - d, d = log p / q, is KL(q || p)."""
  with jax.enable_x64(True):
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.25, 0.3, 0.2])
    found = np.sum(q * np.asarray(importance.mismatch_kl(np.log(p / q)[None])))
    np.testing.assert_allclose(found, np.sum(q * np.log(q / p)), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_log_ratio_and_ratio(seed):
  logprobs, behaviour, mask = arrays(seed)
  d = np.where(mask, logprobs.astype(float) - behaviour, 0)
  np.testing.assert_allclose(importance.log_ratio(logprobs, behaviour, mask), d, atol=1e-6)
  found = importance.importance_ratio(logprobs, behaviour, mask)
  np.testing.assert_allclose(found, np.exp(d), rtol=1e-5)
  assert np.all(np.asarray(found)[~mask] == 1)


def test_ratios_are_held_to_e_to_the_20():
  d = np.float32([[-1e4, -200.0, 0.0, 19.0, 20.0, 21.0, 1e4]])
  found = importance.ratio(d)
  np.testing.assert_allclose(found, np.exp(np.minimum(d.astype(float), 20)), rtol=1e-6, atol=1e-37)
  gradient = jax.grad(lambda x: jnp.sum(importance.ratio(x)))(d)
  np.testing.assert_array_equal(gradient[0, 5:], 0)
  assert np.all(np.isfinite(importance.mismatch_kl(d))) and np.all(importance.mismatch_kl(d) >= 0)


def test_only_the_logprobs_have_a_gradient():
  logprobs, behaviour, mask = arrays(0)
  total = lambda *pair: jnp.sum(importance.log_ratio(*pair, mask))  # noqa: E731
  first, second = jax.grad(total, argnums=(0, 1))(logprobs, behaviour)
  np.testing.assert_array_equal(first, mask.astype(np.float32))
  np.testing.assert_array_equal(second, 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_sequence_ratio_is_the_geometric_mean(seed):
  batch = batches.batch(seed)
  mask = batch["loss_mask"] & (batch["segment_ids"] != 0)
  d = importance.log_ratio(batch["logprobs"], batch["inference_logprobs"], mask)
  found = np.asarray(importance.sequence_ratio(d, mask, batch["segment_ids"]))
  for row, positions in batches.trajectories(batch):
    r = [
      np.exp(float(batch["logprobs"][row, t]) - float(batch["inference_logprobs"][row, t]))
      for t in positions
      if mask[row, t]
    ]
    wanted = np.prod(r) ** (1 / len(r)) if r else 1.0
    np.testing.assert_allclose(found[row, positions], wanted, rtol=1e-5)


def test_the_sequence_ratio_without_ids_is_the_rows():
  d = np.log(np.float32([[2.0, 8.0, 5.0], [1.0, 1.0, 9.0]]))
  mask = np.array([[True, True, False], [True, True, False]])
  found = importance.sequence_ratio(d, mask)
  np.testing.assert_allclose(found, [[4.0] * 3, [1.0] * 3], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.0, 0.1, 2.0, 9.0]))
def test_the_effective_sample_share_lies_between_1_over_n_and_1(seed, spread):
  rng = np.random.default_rng(seed)
  mask = rng.random(SHAPE) < 0.6
  ratios = np.exp(spread * rng.standard_normal(SHAPE)).astype(np.float32)
  share = float(importance.effective_sample_share(ratios, mask))
  size = float(importance.effective_sample_size(ratios, mask))
  kept = ratios[mask].astype(float)
  np.testing.assert_allclose(share, kept.sum() ** 2 / (kept**2).sum() / mask.sum(), rtol=1e-5)
  np.testing.assert_allclose(size, share * mask.sum(), rtol=1e-6)
  assert 1 / mask.sum() * 0.9999 <= share <= 1.0001
  if spread == 0:
    np.testing.assert_allclose(share, 1, rtol=1e-6)


def test_the_effective_sample_share_at_its_ends():
  alone = np.float32([[1e-30, 5.0, 1e-30, 1e-30]])
  np.testing.assert_allclose(importance.effective_sample_share(alone, alone > 0), 0.25)
  assert importance.effective_sample_share(alone, alone < 0) == 0
  assert importance.effective_sample_share(0 * alone, alone > 0) == 0


def test_the_effective_sample_share_from_the_metrics():
  """What every loss tells is enough: (sum r)^2 / (n sum r^2), each sum divided by n."""
  batch = batches.batch(0)
  names = ("logprobs", "inference_logprobs", "advantages", "loss_mask")
  _, metrics = policy_gradient.reinforce_loss(*(batch[name] for name in names))
  mask = batch["loss_mask"]
  ratios = importance.importance_ratio(batch["logprobs"], batch["inference_logprobs"], mask)
  np.testing.assert_allclose(
    metrics["importance_ratio"] ** 2 / metrics["importance_ratio_squared"],
    importance.effective_sample_share(ratios, mask),
    rtol=1e-5,
  )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.03, 0.5, 1.0]))
def test_quantiles_against_numpy(seed, share):
  rng = np.random.default_rng(seed)
  values = rng.standard_normal(SHAPE).astype(np.float32)
  mask = rng.random(SHAPE) < share
  mask[0, 0] = True
  wanted = np.quantile(values[mask].astype(float), [0.0, 0.1, 0.5, 0.99, 1.0])
  found = importance.quantiles(np.where(mask, values, np.nan), mask, (0.0, 0.1, 0.5, 0.99, 1.0))
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_quantiles_of_nothing_and_of_a_nan():
  ones = np.ones((1, 3), np.float32)
  assert np.isnan(importance.quantiles(ones, ones < 0, [0.5])).all()
  np.testing.assert_array_equal(
    importance.quantiles(np.float32([[1.0, np.inf, 3.0]]), ones > 0, [0.0, 1.0]), [1.0, np.inf]
  )
  seen = importance.quantiles(
    np.float32([[np.nan, 1.0, 2.0]]), np.array([[True, True, False]]), [0]
  )
  assert np.isnan(seen).all()
  with pytest.raises(ValueError, match=r"probabilities: expected .*\[0, 1\], got 1.5"):
    importance.quantiles(ones, ones > 0, [1.5])


def test_masked_share():
  mask = np.array([[True, True, True, False]])
  removed = np.array([[True, False, False, True]])
  np.testing.assert_allclose(importance.masked_share(removed, mask), 1 / 3)
  np.testing.assert_allclose(importance.masked_share(removed, mask, denominator=10.0), 0.1)


def test_wrong_arguments_are_named():
  logprobs, behaviour, mask = arrays(0)
  with pytest.raises(ValueError, match=r"inference_logprobs: expected .*\[3, 16\], got \[3, 15\]"):
    importance.log_ratio(logprobs, behaviour[:, 1:], mask)
  with pytest.raises(ValueError, match="logprobs: expected a floating dtype, got int32"):
    importance.log_ratio(np.zeros(SHAPE, np.int32), behaviour, mask)
