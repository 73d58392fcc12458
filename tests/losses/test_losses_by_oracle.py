"""Every loss against its definition: value, metrics and gradient; and the gradients numerically."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from intellect3.losses import policy_gradient
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house


@pytest.mark.parametrize("case", house.ALL, ids=str)
def test_against_the_definition(case):
  for seed in range(6):
    arrays = batches.batch(seed)
    wanted, size = house.expected(case, arrays)
    result = house.run(case, arrays, **house.denominators(case, arrays))
    np.testing.assert_allclose(result.loss, wanted.loss, atol=2e-5 * size, rtol=0)
    house.close(result.gradient, wanted.gradient)
    if case.loss.__name__ in policy_gradient.__all__:
      assert wanted.metrics.keys() == result.metrics.keys()
    for name in wanted.metrics.keys() & result.metrics.keys():
      house.close(result.metrics[name], wanted.metrics[name], scale=1e-2, err_msg=name)


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_the_denominators_of_a_whole_batch_are_its_own_counts(case):
  arrays = batches.batch(7)
  given = house.run(case, arrays, **house.denominators(case, arrays))
  own = house.run(case, arrays)
  np.testing.assert_allclose(own.scalars, given.scalars, rtol=1e-6)
  house.close(own.gradient, given.gradient, rtol=1e-6)


def test_the_batches_meet_every_bound():
  """Otherwise the tests of this folder would pass with the bounds left out."""
  cuts = ("masked_importance", "clipped", "sequence_ratio", "probability_difference")
  drops = ("masked_importance", "geometric", "sequence_ratio")
  for case in (*house.DEFAULTS, *house.VARIANTS):
    found = [house.expected(case, batches.batch(seed))[0].metrics for seed in range(6)]
    sums = {name: sum(float(metrics[name]) for metrics in found) for name in found[0]}
    assert (sums.pop("masked_share") > 0) == case.name.startswith(cuts), case
    assert (sums.pop("sequence_masked_share") > 0) == case.name.startswith(drops), case
    assert (sums.pop("masked_dual_share", 0) > 0) == ("dual_clip" in case.options), case
    assert min(sums.values()) > 0, case


@pytest.mark.parametrize("case", (*house.DEFAULTS, *house.VARIANTS), ids=str)
def test_the_oracles_own_gradients(case):
  """The derivatives written by hand, against differences of the values written by hand."""
  rng = np.random.default_rng(3)
  x = -rng.exponential(1.0, 7)
  q, old, ref = (x - 0.3 * rng.standard_normal(7) for _ in range(3))
  a = rng.standard_normal(7)
  extra = {"old": old} if "old_logprobs" in case.fields else {}
  extra |= {"ref": ref} if "ref_logprobs" in case.fields else {}
  options = case.options if case.oracle_options is None else case.oracle_options
  wanted = case.oracle(x, q, a, at=x, **extra, **options).jacobian
  for u in range(7):
    step = 1e-6 * np.eye(7)[u]
    up = case.oracle(x + step, q, a, at=x, **extra, **options).values
    down = case.oracle(x - step, q, a, at=x, **extra, **options).values
    np.testing.assert_allclose((up - down) / 2e-6, wanted[:, u], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_gradients_in_float64(case):
  """To 1e-11 of the definition; and of the differences of the loss, where it is its derivative."""
  with jax.enable_x64(True):
    arrays = batches.batch(2, dtype=np.float64)
    given = {name: np.float64(value) for name, value in house.denominators(case, arrays).items()}
    function = jax.jit(house.plain(case))
    result = house.run(case, arrays, function, **given)
    wanted, size = house.expected(case, arrays)
    assert result.loss.dtype == result.gradient.dtype == np.float64
    np.testing.assert_allclose(result.loss, wanted.loss, atol=1e-11 * size, rtol=0)
    largest = np.max(np.abs(wanted.gradient))
    np.testing.assert_allclose(result.gradient, wanted.gradient, rtol=1e-9, atol=1e-13 * largest)
    if case.smooth:
      rest = house.arguments(case, arrays, **given)
      check_grads(
        lambda logprobs: function(logprobs, rest)[0][0] / size,
        (arrays["logprobs"],), order=1, modes=("rev",), eps=1e-7,
      )  # fmt: skip


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_only_the_logprobs_have_a_gradient(case):
  arrays = batches.batch(2)
  names = [name for name in case.fields if arrays[name].dtype == np.float32]

  def loss(others):
    fields = {**house.arguments(case, arrays, **house.denominators(case, arrays)), **others}
    return case.loss(arrays["logprobs"], **fields, **case.options)[0]

  for gradient in jax.tree.leaves(jax.grad(loss)({name: arrays[name] for name in names})):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_metrics_have_no_gradient_of_their_own(case):
  arrays = batches.batch(2)
  rest = house.arguments(case, arrays, **house.denominators(case, arrays))

  def metrics(logprobs):
    return sum(jax.tree.leaves(case.loss(logprobs, **rest, **case.options)[1]))

  np.testing.assert_array_equal(jax.grad(metrics)(arrays["logprobs"]), 0)
