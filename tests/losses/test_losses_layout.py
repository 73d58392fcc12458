"""The layout never matters: order, rows, padding, micro-batches, jit, vmap (contract 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

# Sums in another order; ratios up to e^10 stand beside ones of 1.
RTOL = 2e-5
EXAMPLES = [8, pytest.param(200, marks=pytest.mark.slow)]
SEEDS = {"seed": st.integers(0, 10_000), "layout": st.integers(0, 10_000)}


def same(case, arrays, moved, **given):
  """Both layouts give the same loss, metrics, and gradient at each token."""
  before, after = (house.run(case, layout, **given) for layout in (arrays, moved))
  np.testing.assert_allclose(after.scalars, before.scalars, rtol=RTOL, atol=2e-5)
  count = arrays["token"].size
  wanted = batches.by_token(before.gradient, arrays, count)
  house.close(batches.by_token(after.gradient, moved, count), wanted)
  outside = ~house.trained(case, moved)
  np.testing.assert_array_equal(after.gradient[outside], 0)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_trajectories_may_stand_anywhere(case, examples):
  """In other rows, at scattered places of a row, under other ids, beside other padding."""

  def holds(seed, layout):
    arrays = batches.batch(seed)
    moved = batches.repacked(arrays, np.random.default_rng(layout))
    same(case, arrays, moved, **house.denominators(case, arrays))

  house.for_all(examples, holds, **SEEDS)


@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_rows_may_have_another_length(case):
  for seed in range(3):
    arrays = batches.batch(seed)
    moved = batches.repacked(arrays, np.random.default_rng(seed), rows=7, length=19)
    same(case, arrays, moved, **house.denominators(case, arrays))


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_micro_batches_add_up(case, examples):
  """Any split of the rows, each part with the global denominators."""

  def holds(seed, layout):
    arrays = batches.batch(seed)
    given = house.denominators(case, arrays)
    whole = house.run(case, arrays, **given)
    part_of = np.random.default_rng(layout).integers(0, 3, batches.ROWS)
    parts = [
      house.run(case, batches.rows_of(arrays, np.flatnonzero(part_of == part)), **given)
      for part in range(3)
    ]
    scalars = np.sum([part.scalars for part in parts], axis=0)
    np.testing.assert_allclose(scalars, whole.scalars, rtol=RTOL, atol=2e-5)
    house.close(np.sum([part.gradient for part in parts], axis=0), whole.gradient)

  house.for_all(examples, holds, **SEEDS)


@pytest.mark.parametrize("case", house.DEFAULTS, ids=str)
def test_one_trajectory_a_row_needs_no_segment_ids(case):
  arrays = batches.batch(4)
  found = batches.trajectories(arrays)
  moved = {
    name: np.zeros((len(found), 24), array.dtype) for name, array in arrays.items()
  }  # fmt: skip
  for new, (row, places) in enumerate(found):
    for name, array in arrays.items():
      moved[name][new, : len(places)] = array[row, places]
  given = house.denominators(case, arrays)
  packed = house.run(case, arrays, **given)
  rest = house.arguments(case, moved, **given)
  del rest["segment_ids"]
  (loss, _), gradient = house.compiled(case)(moved["logprobs"], rest)
  np.testing.assert_allclose(loss, packed.loss, rtol=RTOL, atol=1e-6)
  count = arrays["token"].size
  wanted = batches.by_token(packed.gradient, arrays, count)
  house.close(batches.by_token(gradient, moved, count), wanted)


@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_jit_is_eager(case):
  arrays = batches.batch(5)
  given = house.denominators(case, arrays)
  eager, jitted = house.run(case, arrays, house.plain(case), **given), house.run(
    case, arrays, **given
  )  # fmt: skip
  np.testing.assert_allclose(eager.scalars, jitted.scalars, rtol=1e-5, atol=1e-6)
  house.close(eager.gradient, jitted.gradient, rtol=1e-5)


@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_vmap_is_a_loop(case):
  arrays = [batches.batch(seed) for seed in range(3)]
  calls = [house.arguments(case, one, **house.denominators(case, one)) for one in arrays]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *calls)
  logprobs = np.stack([one["logprobs"] for one in arrays])
  (loss, metrics), gradient = jax.jit(jax.vmap(house.plain(case)))(logprobs, stacked)
  for index, one in enumerate(arrays):
    alone = house.run(case, one, **house.denominators(case, one))
    np.testing.assert_allclose(loss[index], alone.loss, rtol=1e-5, atol=1e-6)
    house.close(gradient[index], alone.gradient, rtol=1e-5)
    for name, value in alone.metrics.items():
      np.testing.assert_allclose(metrics[name][index], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", house.PROPERTIES, ids=str)
def test_named_vmap_counts_over_its_axis(case):
  """With `axis_name` and without denominators: each lane knows the whole loss, once."""
  arrays = batches.batch(6)
  whole = house.run(case, arrays)

  def lanes(logprobs):
    def lane(logprobs, rest):
      return case.loss(logprobs, **rest, **case.options, axis_name="lane")

    rows = jax.tree.map(lambda array: array[:, None], house.arguments(case, arrays))
    loss, metrics = jax.vmap(lane, axis_name="lane")(logprobs[:, None], rows)
    return loss[0], (loss, metrics)

  (_, (loss, metrics)), gradient = jax.jit(jax.value_and_grad(lanes, has_aux=True))(
    arrays["logprobs"]
  )
  np.testing.assert_allclose(loss, [whole.loss] * batches.ROWS, rtol=RTOL, atol=1e-6)
  for name, value in whole.metrics.items():
    np.testing.assert_allclose(metrics[name], [value] * 4, rtol=RTOL, atol=1e-6, err_msg=name)
  house.close(gradient, whole.gradient)


INSIDE = ("masked_importance", "sequence_ratio", "weighted_sum", "reinforce-constant_mean")


@pytest.mark.parametrize(
  "case", [case for case in house.PROPERTIES if case.name in INSIDE], ids=str
)
def test_a_gradient_inside_a_named_vmap(case):
  """By global denominators: a lane's own without `axis_name`, and with it as many times as lanes.

  jax transposes the sum over lanes to a sum over lanes; `terms.prepare` says so.
  """
  arrays = batches.batch(6)
  given = house.denominators(case, arrays)
  whole = house.run(case, arrays, **given)
  rows = jax.tree.map(lambda array: array[:, None], house.arguments(case, arrays))
  for axis_name, times in ((None, 1), ("lane", batches.ROWS)):

    def lane(logprobs, rest, axis_name=axis_name):
      return house.plain(case)(logprobs, {**rest, **given, "axis_name": axis_name})[1]

    gradient = jax.jit(jax.vmap(lane, axis_name="lane"))(arrays["logprobs"][:, None], rows)
    house.close(gradient[:, 0], times * whole.gradient, err_msg=str(axis_name))
