"""The KL estimators in expectation, by enumeration of a categorical in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.losses import kl
from tests.losses import losses_batches as batches

LOGITS = np.array([0.3, -1.2, 0.8, 0.1, -0.4])
OTHER = np.array([-0.2, 0.5, 0.4, -0.9, 0.7])


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def log_softmax(logits):
  return logits - np.log(np.sum(np.exp(logits)))


def mean_of(estimator, log_p, log_ref):
  """E_p[estimator(log p - log ref)]: every outcome by its probability."""
  return np.sum(np.exp(log_p) * np.asarray(estimator(jnp.asarray(log_p - log_ref))))


def test_k1_and_k3_are_unbiased():
  log_p, log_ref = log_softmax(LOGITS), log_softmax(OTHER)
  exact = np.sum(np.exp(log_p) * (log_p - log_ref))
  assert exact > 0.1
  np.testing.assert_allclose(mean_of(kl.k1, log_p, log_ref), exact, rtol=1e-12)
  np.testing.assert_allclose(mean_of(kl.k3, log_p, log_ref), exact, rtol=1e-12)


def test_k2_is_biased_in_the_third_order():
  """k3 - k2 = -d^3/6 + d^4/24 - ..: k2 is too large by E[d^3]/6 - E[d^4]/24 + ..."""
  log_p = log_softmax(LOGITS)
  biases = []
  for scale in (0.1, 0.05):
    log_ref = log_softmax(LOGITS + scale * (OTHER - LOGITS))
    d = log_p - log_ref
    exact = np.sum(np.exp(log_p) * d)
    bias = mean_of(kl.k2, log_p, log_ref) - exact
    stated = np.sum(np.exp(log_p) * (d**3 / 6 - d**4 / 24))
    assert 1e-9 < abs(bias) < 0.05 * exact
    np.testing.assert_allclose(bias, stated, rtol=1e-2)
    biases.append(bias)
  np.testing.assert_allclose(biases[0] / biases[1], 8, rtol=0.2)  # half as far: an eighth


def test_values_by_hand():
  d = np.array([-1.0, 0.0, 2.0])
  np.testing.assert_allclose(kl.k1(d), [-1, 0, 2])
  np.testing.assert_allclose(kl.k2(d), [0.5, 0, 2])
  np.testing.assert_allclose(kl.k3(d), [np.e - 2, 0, np.exp(-2) + 1], rtol=1e-12)


def test_k2_and_k3_are_never_negative_and_accurate_near_zero():
  d = np.float32([1e-6, -1e-6, 1e-4, -1e-4, 0.0, -19.0, 50.0, -1e4, 1e4])
  small = slice(0, 5)
  exact = np.expm1(-d[small].astype(float)) + d[small].astype(float)
  # exp(-d) - 1 + d in float32 would be off by 1e-8, more than the value itself.
  assert np.all(np.abs(kl.k3(d)[small] - exact) <= 1e-7 * np.abs(d[small]))
  for estimator in (kl.k2, kl.k3):
    values = np.asarray(estimator(d))
    assert np.all(values >= 0) and np.all(np.isfinite(values)) and values.dtype == np.float32


def gradient_in_expectation(loss_fn, **options):
  """Over all outcomes x of one token: sum_x p(x) d loss(x) / d logits, the sampling fixed."""
  log_p, log_ref = log_softmax(LOGITS), log_softmax(OTHER)

  def loss(logits):
    logprobs = jax.nn.log_softmax(logits)[:, None]  # [outcomes, 1]: a row each
    fixed = jax.lax.stop_gradient(logprobs)
    per_outcome = lambda values, mask, **_: jnp.sum(values[:, 0] * np.exp(log_p))  # noqa: E731
    return loss_fn(
      logprobs, fixed, 0 * fixed, fixed < 1, ref_logprobs=log_ref[:, None],
      aggregate=per_outcome, **options,
    )[0]  # fmt: skip

  return jax.grad(loss)(LOGITS)


def exact_gradient(forward):
  def divergence(logits):
    log_p, log_ref = jax.nn.log_softmax(logits), log_softmax(OTHER)
    if forward:
      return jnp.sum(jnp.exp(log_ref) * (log_ref - log_p))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_ref))

  return jax.grad(divergence)(LOGITS)


def test_on_policy_distillation_follows_the_reverse_kl():
  found = gradient_in_expectation(kl.reverse_kl_loss)
  np.testing.assert_allclose(found, exact_gradient(forward=False), rtol=1e-10)


def test_what_a_differentiated_penalty_follows():
  """k1: nothing, in expectation; k2: the reverse KL; k3: the forward KL."""
  found = {
    name: gradient_in_expectation(kl.penalty_loss, estimator=getattr(kl, name))
    for name in ("k1", "k2", "k3")
  }
  np.testing.assert_allclose(found["k1"], 0, atol=1e-12)
  np.testing.assert_allclose(found["k2"], exact_gradient(forward=False), rtol=1e-10)
  np.testing.assert_allclose(found["k3"], exact_gradient(forward=True), rtol=1e-10)


@pytest.mark.parametrize("loss_fn", [kl.reverse_kl_loss, kl.penalty_loss])
def test_a_reference_is_needed(loss_fn):
  arrays = batches.batch(0)
  call = [arrays[name] for name in ("logprobs", "inference_logprobs", "advantages", "loss_mask")]
  with pytest.raises(ValueError, match=r"ref_logprobs: expected .*, got None"):
    loss_fn(*call, ref_logprobs=None)
  with pytest.raises(ValueError, match=r"ref_logprobs: expected .*\[4, 24\], got \[4, 23\]"):
    loss_fn(*call, ref_logprobs=arrays["ref_logprobs"][:, 1:])
  with pytest.raises(ValueError, match="ref_logprobs: expected a floating dtype, got int32"):
    loss_fn(*call, ref_logprobs=arrays["segment_ids"])


def test_the_metric_is_the_divergence_of_the_sampled_tokens():
  arrays = batches.batch(0)
  call = [arrays[name] for name in ("logprobs", "inference_logprobs", "advantages", "loss_mask")]
  mask = arrays["loss_mask"]
  d = (arrays["logprobs"].astype(float) - arrays["ref_logprobs"])[mask]
  rest = {"ref_logprobs": arrays["ref_logprobs"]}
  np.testing.assert_allclose(
    kl.reverse_kl_loss(*call, **rest)[1]["reverse_kl"], d.mean(), rtol=1e-5
  )
  loss, metrics = kl.penalty_loss(*call, **rest)
  np.testing.assert_allclose(metrics["reverse_kl"], np.mean(np.exp(-d) - 1 + d), rtol=1e-5)
  assert metrics["reverse_kl"] == loss
