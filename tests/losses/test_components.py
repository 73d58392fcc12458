"""The weighted sum of terms: each with its own tokens, weights and denominator."""

import functools

import jax
import numpy as np
import pytest

from intellect3.losses import aggregation, components, kl, policy_gradient, supervised
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house
from tests.losses import losses_oracles as oracles

COEFFICIENTS = {"rl": 0.7, "ce": 0.5, "ref_kl": 0.3}
ONE = np.ones((1, 4), np.float32)


def term(arrays, oracle, weights, within, ref=False):
  """(loss, gradient) of one term: weighted token losses over the number of its tokens."""
  tokens = within & (arrays["segment_ids"] != 0)
  tokens &= True if weights is None else weights != 0
  loss, gradient = 0.0, np.zeros(tokens.shape)
  for row, positions in batches.trajectories(arrays):
    places = [t for t in positions if tokens[row, t]]
    if not places:
      continue
    x, q, a, to = (
      arrays[name][row, places].astype(np.float64)
      for name in ("logprobs", "inference_logprobs", "advantages", "ref_logprobs")
    )
    found = oracle(x, q, a, at=x, **({"ref": to} if ref else {}))
    for t, place in enumerate(places):
      share = (1.0 if weights is None else float(weights[row, place])) / tokens.sum()
      loss += share * found.values[t]
      gradient[row, places] += share * found.jacobian[t]
  return loss, gradient


def expected(arrays, rl=oracles.masked_importance, ref_kl=oracles.reverse_kl, weighted=True):
  rl_weights, ce_weights, ref_kl_weights = (
    arrays[name] if weighted else None for name in batches.WEIGHTS
  )
  mask = arrays["loss_mask"]
  return {
    "rl": term(arrays, rl, rl_weights, mask),
    "ce": term(arrays, oracles.negative_log_likelihood, ce_weights, mask | weighted),
    "ref_kl": term(arrays, ref_kl, ref_kl_weights, mask, ref=True),
  }


def options(coefficients):
  return {f"{name}_coefficient": value for name, value in coefficients.items()}


@pytest.mark.parametrize(
  "coefficients",
  [COEFFICIENTS, {"rl": 1.0}, {"rl": 0.0, "ce": 2.0}, {"rl": 0.0, "ref_kl": 1.0}, {"rl": -1.0}],
)
def test_against_the_definition(coefficients):
  case = house.dataclasses.replace(
    house.COMPONENTS, name=str(coefficients), options=options(coefficients)
  )
  for seed in range(4):
    arrays = batches.batch(seed)
    result = house.run(case, arrays, **house.denominators(case, arrays))
    terms = expected(arrays)
    loss = sum(coefficients.get(name, 0) * terms[name][0] for name in terms)
    gradient = sum(coefficients.get(name, 0) * terms[name][1] for name in terms)
    np.testing.assert_allclose(result.loss, loss, rtol=2e-5, atol=2e-6)
    house.close(result.gradient, gradient)
    told = {name for name in terms if f"{name}_loss" in result.metrics}
    assert told == {name for name in terms if {"rl": 1.0, **coefficients}.get(name)}
    for name in told:
      np.testing.assert_allclose(result.metrics[f"{name}_loss"], terms[name][0], rtol=2e-5)
    own = house.run(case, arrays)
    np.testing.assert_allclose(own.loss, result.loss, rtol=1e-5, atol=1e-6)


def test_without_weights_every_term_is_on_the_loss_mask():
  arrays = batches.batch(3)
  case = house.dataclasses.replace(
    house.COMPONENTS, name="unweighted", fields=(*house.COMMON, *house.REF)
  )
  result = house.run(case, arrays)
  terms = expected(arrays, weighted=False)
  loss = sum(COEFFICIENTS[name] * terms[name][0] for name in terms)
  gradient = sum(COEFFICIENTS[name] * terms[name][1] for name in terms)
  np.testing.assert_allclose(result.loss, loss, rtol=2e-5)
  house.close(result.gradient, gradient)


def test_the_default_is_masked_importance():
  arrays = batches.batch(3)
  alone = house.run(house.DEFAULTS[1], arrays)
  case = house.dataclasses.replace(house.DEFAULTS[1], loss=components.weighted_sum_loss)
  result = house.run(case, arrays, house.plain(case))
  np.testing.assert_array_equal(result.loss, alone.loss)
  np.testing.assert_array_equal(result.gradient, alone.gradient)
  assert alone.metrics.keys() <= result.metrics.keys()


def test_other_losses_may_be_the_terms():
  case = house.dataclasses.replace(
    house.COMPONENTS,
    name="others",
    options={
      **options(COEFFICIENTS),
      "rl_loss": functools.partial(policy_gradient.clipped_loss, clip_high=0.28),
      "ref_kl_loss": functools.partial(kl.penalty_loss, estimator=kl.k2),
    },
  )
  arrays = batches.batch(5)
  result = house.run(case, arrays, **house.denominators(case, arrays))
  terms = expected(
    arrays,
    functools.partial(oracles.clipped, clip_high=0.28),
    functools.partial(oracles.penalty, estimator="k2"),
  )
  loss = sum(COEFFICIENTS[name] * terms[name][0] for name in terms)
  np.testing.assert_allclose(result.loss, loss, rtol=2e-5)
  house.close(result.gradient, sum(COEFFICIENTS[name] * terms[name][1] for name in terms))


def test_terms_do_not_dilute_one_another():
  """By hand: two sampled tokens and one observation; the observation has its own denominator."""
  logprobs = np.float32([[-1.0, -2.0, -4.0, -8.0]])
  mask = np.array([[True, True, False, False]])
  loss, metrics = components.weighted_sum_loss(
    logprobs, logprobs, 2 * ONE, mask,
    ce_weights=np.float32([[0, 0, 0.5, 0]]), ce_coefficient=0.1,
  )  # fmt: skip
  np.testing.assert_allclose(metrics["rl_loss"], -2.0, rtol=1e-6)  # -(2 + 2) / 2, ratios of 1
  np.testing.assert_allclose(metrics["ce_loss"], 0.5 * 4 / 1, rtol=1e-6)
  np.testing.assert_allclose(loss, -2.0 + 0.1 * 2.0, rtol=1e-6)


def test_a_token_of_weight_zero_is_out_of_its_term_whatever_it_holds():
  arrays = batches.batch(2)
  case = house.COMPONENTS
  out = arrays["loss_mask"] & (np.arange(batches.LENGTH) % 3 == 0)
  for name in batches.WEIGHTS:
    arrays[name] = np.where(out, np.float32(0), arrays[name])
  given = house.denominators(case, arrays)
  assert out.sum() > 5
  before = house.run(case, arrays, **given)
  for name in ("logprobs", "inference_logprobs", "advantages", "ref_logprobs"):
    dirty = {**arrays, name: np.where(out, np.float32(np.nan), arrays[name])}
    after = house.run(case, dirty, **given)
    np.testing.assert_array_equal(after.scalars, before.scalars)
    np.testing.assert_array_equal(after.gradient, before.gradient)


def test_a_nan_is_seen_in_the_term_that_reads_it():
  for name in (*batches.FLOATS, *batches.WEIGHTS):
    arrays = batches.batch(2)
    everywhere = arrays["loss_mask"] & (arrays["segment_ids"] != 0)
    for weights in batches.WEIGHTS:
      everywhere &= arrays[weights] != 0
    row, place = np.argwhere(everywhere)[0]
    arrays[name][row, place] = np.nan
    result = house.run(
      house.COMPONENTS, arrays, **house.denominators(house.COMPONENTS, batches.batch(2))
    )
    assert np.isnan(result.loss) == (name != "old_logprobs"), name


def test_each_term_divides_by_its_component_denominator():
  """Also a term without weights: it is one of a micro-batch, not the whole of a batch."""
  mask = np.array([[True, True, False, False]])
  own = components.Denominators(rl=8.0, ce=5.0, ref_kl=4.0)
  for weights in (None, ONE):
    _, metrics = components.weighted_sum_loss(
      -ONE, -ONE, 2 * ONE, mask, rl_weights=weights, ce_weights=ONE, ref_kl_weights=weights,
      ref_logprobs=-2 * ONE, component_denominators=own, denominator=8.0 if weights is None else 77,
      ce_coefficient=1.0, ref_kl_coefficient=1.0, ref_kl_loss=kl.penalty_loss,
    )  # fmt: skip
    np.testing.assert_allclose(metrics["rl_loss"], -2 * 2 / 8, rtol=1e-6)
    np.testing.assert_allclose(metrics["ce_loss"], 4 / 5, rtol=1e-6)
  np.testing.assert_allclose(metrics["ref_kl_loss"], 2 * np.exp(-1) / 4, rtol=1e-6)


def test_component_denominators_serve_the_terms_without_weights_too():
  """A micro-batch must not count itself because one term has no weights."""
  mask = np.array([[True, True, False, False]])
  _, metrics = components.weighted_sum_loss(
    -ONE, -ONE, 2 * ONE, mask, ce_weights=ONE, ce_coefficient=1.0,
    component_denominators=components.Denominators(rl=8.0, ce=5.0, ref_kl=4.0),
  )  # fmt: skip
  np.testing.assert_allclose(metrics["rl_loss"], -2 * 2 / 8, rtol=1e-6)


def test_of_metrics_of_one_name_the_first_terms_is_told():
  """rl before ce before ref_kl, each over its own tokens: ratios of 2, 3, 5 and 7."""
  logprobs = np.log(np.float32([[2, 3, 5, 7]]))

  def also(name):
    """The term, which says of its tokens what the cross-entropy says of its own."""

    def loss(logprobs, *rest, **common):
      common.pop("ref_logprobs", None)
      value, told = policy_gradient.reinforce_loss(logprobs, *rest, **common)
      return value, {**told, "negative_log_likelihood": told["importance_ratio"], name: value}

    return loss

  call = functools.partial(
    components.weighted_sum_loss, logprobs, 0 * ONE, ONE, ONE > 0,
    rl_weights=np.float32([[1, 1, 0, 0]]), ce_weights=np.float32([[0, 0, 1, 0]]),
    ref_kl_weights=np.float32([[0, 0, 1, 1]]), ref_logprobs=ONE,
    rl_loss=also("rl_only"), ref_kl_loss=also("ref_kl_only"),
  )  # fmt: skip
  every = {"rl_only", "ref_kl_only"}
  for (rl, ce, ref_kl), ratio, nats, only in (
    ((1.0, 1.0, 1.0), 2.5, 2.5, every),
    ((1.0, 0.0, 1.0), 2.5, 2.5, every),
    ((0.0, 1.0, 1.0), 6.0, -np.log(5), {"ref_kl_only"}),
    ((0.0, 0.0, 1.0), 6.0, 6.0, {"ref_kl_only"}),
    ((1.0, 1.0, 0.0), 2.5, 2.5, {"rl_only"}),
  ):
    _, metrics = call(rl_coefficient=rl, ce_coefficient=ce, ref_kl_coefficient=ref_kl)
    np.testing.assert_allclose(metrics["importance_ratio"], ratio, rtol=1e-6)
    np.testing.assert_allclose(metrics["negative_log_likelihood"], nats, rtol=1e-6)
    assert metrics.keys() & every == only


def test_wrong_use_is_named():
  call = functools.partial(components.weighted_sum_loss, -ONE, -ONE, ONE, ONE > 0)
  with pytest.raises(ValueError, match=r"ref_logprobs: expected .*, got None"):
    call(ref_kl_coefficient=1.0)
  with pytest.raises(ValueError, match=r"component_denominators: expected .*, got None"):
    call(rl_weights=ONE, denominator=4.0)
  with pytest.raises(ValueError, match=r"rl_weights: expected .*\[1, 4\], got \[4\]"):
    call(rl_weights=ONE[0])
  with pytest.raises(ValueError, match="ce_weights: expected a floating dtype, got int32"):
    call(ce_weights=ONE.astype(np.int32))
  with pytest.raises(ValueError, match=r"expected .*, got none"):
    call(rl_coefficient=0.0)
  with pytest.raises(ValueError, match=r"ce_coefficient: expected .*, got nan"):
    call(ce_coefficient=float("nan"))
  with pytest.raises(ValueError, match="num_sequences: expected"):
    call(
      rl_weights=ONE, aggregate=aggregation.sequence_mean, num_sequences=1.0,
      component_denominators=components.Denominators(4.0, 4.0, 4.0),
    )  # fmt: skip


def test_negative_log_likelihood_by_hand():
  logprobs = np.float32([[-1.0, -2.0, np.nan], [-4.0, np.inf, np.nan]])
  mask = np.array([[True, True, False], [True, False, False]])
  loss, metrics = supervised.negative_log_likelihood(logprobs, mask)
  np.testing.assert_allclose(loss, 7 / 3, rtol=1e-6)
  np.testing.assert_allclose(metrics["negative_log_likelihood"], 7 / 3, rtol=1e-6)
  gradient = jax.grad(
    lambda x: supervised.negative_log_likelihood(x, mask, denominator=6.0)[0]
  )(logprobs)  # fmt: skip
  np.testing.assert_allclose(gradient, np.where(mask, -1 / 6, 0), rtol=1e-6)
