"""Where trainer and server agree, every correction is REINFORCE; where not, its bounds hold."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from intellect3.losses import policy_gradient
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

EXAMPLES = [8, pytest.param(200, marks=pytest.mark.slow)]
SEED = {"seed": st.integers(0, 10_000)}
CORRECTIONS = tuple(
  case
  for case in (*house.DEFAULTS, *house.VARIANTS)
  if case.loss.__name__ in policy_gradient.__all__
)


@functools.cache
def reinforce(mean):
  return next(
    case
    for case in (*house.DEFAULTS, *house.AVERAGED)
    if case.oracle.__name__ == "reinforce" and case.mean == mean
  )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("case", CORRECTIONS, ids=str)
def test_on_policy_it_is_reinforce(case, examples):
  """With ratios of exactly 1 nothing is bounded and the gradients agree, whatever the method.

  GSPO spreads a trajectory's gradient evenly, so there the advantage is one per trajectory.
  """

  def holds(seed):
    arrays = batches.batch(seed, on_policy=True)
    for row, places in batches.trajectories(arrays):
      arrays["advantages"][row, places] = arrays["advantages"][row, places[0]]
    given = house.denominators(case, arrays)
    result = house.run(case, arrays, **given)
    wanted = house.run(reinforce(case.mean), arrays, **given).gradient
    if not (case.oracle.__name__ == "sequence_ratio" and not case.options.get("token_level")):
      house.close(result.gradient, wanted, rtol=1e-6)
    else:
      for row, places in batches.trajectories(arrays):
        mine = [t for t in places if arrays["loss_mask"][row, t]]
        house.close(result.gradient[row, mine], wanted[row, mine], rtol=2e-6)
    trained = (arrays["loss_mask"] & (arrays["segment_ids"] != 0)).any()
    assert result.metrics["mismatch_kl"] == 0
    np.testing.assert_allclose(result.metrics["importance_ratio"], trained, rtol=1e-6)
    np.testing.assert_allclose(result.metrics["importance_ratio_squared"], trained, rtol=1e-6)
    assert result.metrics["masked_share"] == result.metrics["sequence_masked_share"] == 0

  house.for_all(examples, holds, **SEED)


def weights(case, arrays, **given):
  """What multiplies -A in the token's gradient, without the mean's own factor."""
  result = house.run(case, arrays, **given)
  trained = arrays["loss_mask"] & (arrays["segment_ids"] != 0) & (arrays["advantages"] != 0)
  factor = result.gradient * given["denominator"]
  return np.where(trained, -factor / np.where(trained, arrays["advantages"], 1), 0), result, trained


# Case, the largest weight at positive and at negative advantage, and the smallest nonzero weight.
BOUNDS = {
  "masked_importance": (5.0, 5.0, 0.5),
  "masked_importance_narrow": (1.1, 1.1, 0.9),
  "truncated_importance": (2.0, 2.0, 0.0),
  "truncated_importance_1": (1.0, 1.0, 0.0),
  "clipped": (1.2, np.inf, 0.0),
  "clipped_higher": (1.28, np.inf, 0.0),
  "clipped_dual": (1.2, 3.0, 0.0),
  "clipped_old_bounded": (1.5 * 1.2, 1.5 * 2.0, 0.0),
  "cispo": (5.0, 5.0, 0.0),
  "cispo_both": (1.5, 1.5, 0.5),
  "geometric_masked_truncated": (2.0, 2.0, 0.0),
}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_hold(name, examples):
  case = next(case for case in CORRECTIONS if case.name == name)
  positive, negative, smallest = BOUNDS[name]

  def holds(seed):
    arrays = batches.batch(seed)
    found, _, trained = weights(case, arrays, **house.denominators(case, arrays))
    assert np.all(found >= 0)
    assert np.all(found[arrays["advantages"] > 0] <= positive * 1.00001)
    assert np.all(found[arrays["advantages"] < 0] <= negative * 1.00001)
    kept = found[trained & (found != 0)]
    assert np.all(kept >= smallest * 0.99999)
    if name.startswith(("truncated", "cispo")):  # what they bound keeps a gradient
      assert np.all(found[trained] > 0)

  house.for_all(examples, holds, **SEED)


@pytest.mark.parametrize("name", ["masked_importance", "clipped", "probability_difference_0"])
def test_out_of_bounds_the_gradient_is_exactly_zero_and_counted(name):
  case = next(case for case in CORRECTIONS if case.name == name)
  for seed in range(10):
    arrays = batches.batch(seed)
    given = house.denominators(case, arrays)
    found, result, trained = weights(case, arrays, **given)
    d = arrays["logprobs"].astype(np.float64) - arrays["inference_logprobs"]
    up = arrays["advantages"] > 0
    if name == "masked_importance":
      cut = (np.exp(d) < 0.5) | (np.exp(d) > 5)
    elif name == "clipped":
      cut = np.where(up, np.exp(d) > 1.2, np.exp(d) < 0.8)
    else:
      difference = np.exp(arrays["logprobs"]) - np.exp(arrays["inference_logprobs"])
      cut = np.where(up, difference > 0.2, difference < -0.2)
    np.testing.assert_array_equal(found[trained & cut], 0)
    if name != "masked_importance":
      assert np.all(found[trained & ~cut] != 0)
    if name == "clipped":  # with an advantage of 0 there is nothing to clip
      cut &= arrays["advantages"] != 0
    cut &= arrays["loss_mask"] & (arrays["segment_ids"] != 0)
    share = result.metrics["masked_share"] * given["denominator"]
    np.testing.assert_allclose(share, cut.sum(), rtol=1e-6)


@pytest.mark.parametrize("name", ["masked_importance", "geometric_masked"])
def test_a_dropped_trajectory_has_no_gradient_and_is_counted(name):
  case = next(case for case in CORRECTIONS if case.name == name)
  met = 0
  for seed in range(10):
    arrays = batches.batch(seed)
    given = house.denominators(case, arrays)
    result = house.run(case, arrays, **given)
    dropped = 0
    for row, places in batches.trajectories(arrays):
      mine = [t for t in places if arrays["loss_mask"][row, t]]
      d = arrays["logprobs"][row, mine].astype(float) - arrays["inference_logprobs"][row, mine]
      if not mine:
        continue
      mean = np.exp(np.mean(d))
      if np.exp(np.min(d)) < 1e-5 if name == "masked_importance" else not 0.1 <= mean <= 10:
        dropped += len(mine)
        np.testing.assert_array_equal(result.gradient[row, mine], 0)
    share = result.metrics["sequence_masked_share"] * given["denominator"]
    np.testing.assert_allclose(share, dropped, rtol=1e-6)
    met += dropped
  assert met > 0


def test_the_dual_clip_bounds_the_loss_of_bad_tokens():
  """With A = -1 a token costs at most `dual_clip`; without it the cost grows with the ratio."""
  d = np.float32([[0.0, 1.0, 3.0, 9.0]])
  ones = np.ones_like(d)
  mask = ones > 0
  loss = functools.partial(policy_gradient.clipped_loss, denominator=1.0)
  np.testing.assert_allclose(
    loss(d, 0 * d, -ones, mask, dual_clip=4.0)[0], 1 + np.e + 4 + 4, rtol=1e-6
  )
  np.testing.assert_allclose(loss(d, 0 * d, -ones, mask)[0], np.exp(d).sum(), rtol=1e-6)
  gradient = jax.grad(lambda x: loss(x, 0 * d, -ones, mask, dual_clip=4.0)[0])(d)
  np.testing.assert_allclose(gradient, [[1, np.e, 0, 0]], rtol=1e-6)
