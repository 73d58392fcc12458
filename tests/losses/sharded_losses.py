"""Every loss inside `shard_map` over four devices; run as a process of its own with fake devices.

Place: `test_losses_sharding.py` starts it and reads the names of the checks it prints.
"""

import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec

from intellect3.losses import importance, segments
from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

SHARDS = 4
ROWS = PartitionSpec("rows")
WHOLE = PartitionSpec()
# The denominators are not read by the losses themselves: one of each mean is enough.
GIVEN = ("masked_importance", "sequence_ratio", "reinforce-constant_mean")
# (axis_name, check_vma), and how many times the gradient is that of the batch.
INSIDE = ((None, True, 1), ("rows", True, 1), (None, False, 1), ("rows", False, SHARDS))


def mesh(names=("rows",), shape=(SHARDS,)):
  return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def sharded(case, specs=ROWS, axis_name="rows", over=None):
  """The case as a function of whole arrays, each device with a row of them."""

  def one(logprobs, arrays, given):
    return case.loss(logprobs, **arrays, **given, **case.options, axis_name=axis_name)

  mapped = jax.shard_map(one, mesh=over or mesh(), in_specs=(specs, specs, WHOLE), out_specs=WHOLE)
  return jax.jit(jax.value_and_grad(mapped, has_aux=True))


def agree(case, arrays, function, given, label):
  whole = house.run(case, arrays, **house.denominators(case, arrays))
  (loss, metrics), gradient = function(arrays["logprobs"], house.arguments(case, arrays), given)
  np.testing.assert_allclose(loss, whole.loss, rtol=2e-5, atol=1e-6, err_msg=label)
  for name, value in whole.metrics.items():
    np.testing.assert_allclose(
      metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=f"{label} {name}"
    )
  house.close(gradient, whole.gradient, err_msg=label)


def raises(case, arrays, specs=ROWS, axis_name=None, over=None, check_vma=True):
  """Without a denominator, and without the names of all axes that split the rows."""

  def one(logprobs, arrays):
    loss, _ = case.loss(logprobs, **arrays, **case.options, axis_name=axis_name)
    return loss[None]

  mapped = jax.shard_map(
    one, mesh=over or mesh(), in_specs=specs, out_specs=specs, check_vma=check_vma
  )
  refused(mapped, arrays["logprobs"], house.arguments(case, arrays))


def refused(mapped, *arguments):
  try:
    jax.eval_shape(mapped, *arguments)
  except ValueError as error:
    assert "axis_name: expected" in str(error), error
    return
  raise AssertionError("a count of some shards was taken for the batch's")


def main():
  assert jax.device_count() == SHARDS
  for case in house.PROPERTIES:
    arrays = batches.batch(6)
    agree(case, arrays, sharded(case), {}, f"{case} counts over the axis")
    raises(case, arrays)
    print("ok", case.name, flush=True)
  for case in (case for case in house.PROPERTIES if case.name in GIVEN):
    arrays = batches.batch(8)
    agree(
      case, arrays, sharded(case), house.denominators(case, arrays), f"{case} global denominators"
    )
    whole = house.run(case, arrays, **house.denominators(case, arrays))
    for axis_name, checked, times in INSIDE:
      loss, gradient = inside(case, axis_name, checked)(
        arrays["logprobs"], house.arguments(case, arrays), house.denominators(case, arrays)
      )
      losses = SHARDS if axis_name else 1  # each shard's share, or the whole in each
      np.testing.assert_allclose(np.sum(loss), losses * whole.loss, rtol=2e-5, atol=1e-6)
      house.close(gradient, times * whole.gradient, err_msg=f"{case} {axis_name} {checked}")
    print("ok inside", case.name, flush=True)
  long_rows()
  two_axes()
  unchecked()
  measures()


def inside(case, axis_name, check_vma):
  """The gradient taken inside `shard_map`, of the row that a device has, by global denominators.

  Without `axis_name` the loss is this shard's share, and nothing crosses shards. With it, and
  nothing that tells jax what is split, a psum is transposed to a psum (see `terms.prepare`).
  """

  def one(logprobs, arrays, given):
    given = {**arrays, **given, "axis_name": axis_name}
    (loss, _), gradient = house.plain(case)(logprobs, given)
    return loss[None], gradient

  specs = {"in_specs": (ROWS, ROWS, WHOLE), "out_specs": ROWS, "check_vma": check_vma}
  return jax.jit(jax.shard_map(one, mesh=mesh(), **specs))


def long_rows():
  """Where sums over segments go by blocks, each device decides for its own row how."""
  length = 2 * max(segments.BLOCKS) * segments.MIXED
  long, short = (
    batches.batch(3, length=length, packed=packed) for packed in ((2, length // 2), (40, 30))
  )
  mixed = {name: np.concatenate([long[name][:2], short[name][:2]]) for name in long}
  for case in (case for case in house.PROPERTIES if case.name in GIVEN[:2]):
    agree(case, mixed, sharded(case), {}, f"{case} long rows")
  print("ok long rows", flush=True)


def two_axes():
  """Rows over two mesh axes: both are named, or the call raises."""
  case, arrays = house.DEFAULTS[1], batches.batch(6)
  over = mesh(("data", "fsdp"), (2, 2))
  rows = PartitionSpec(("data", "fsdp"))
  agree(case, arrays, sharded(case, rows, ("data", "fsdp"), over), {}, "two axes")
  raises(case, arrays, rows, "data", over)
  print("ok two axes", flush=True)


def unchecked():
  """With check_vma=False nothing tells what is split; a call without names still raises."""
  case, arrays = house.DEFAULTS[1], batches.batch(6)
  raises(case, arrays, check_vma=False)
  print("ok unchecked", flush=True)


def measures():
  """What `importance` says of a batch, of shards that differ; without names it raises."""
  rng = np.random.default_rng(0)
  scale = np.array([1, 3, 0.1, 20], np.float32)[:, None]
  ratios = scale * rng.exponential(1, (SHARDS, 9)).astype(np.float32)
  mask = rng.random((SHARDS, 9)) < np.array([0.9, 0.2, 0.6, 0.4])[:, None]
  kept = ratios[mask].astype(np.float64)
  size = kept.sum() ** 2 / (kept**2).sum()
  for name, wanted, arguments in (
    ("effective_sample_size", size, (ratios, mask)),
    ("effective_sample_share", size / mask.sum(), (ratios, mask)),
    ("masked_share", (kept > 1).mean(), (ratios > 1, mask)),
  ):
    measure = getattr(importance, name)
    for checked in (True, False):
      split = functools.partial(jax.shard_map, mesh=mesh(), in_specs=ROWS, check_vma=checked)
      found = split(functools.partial(measure, axis_name="rows"), out_specs=WHOLE)(*arguments)
      np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
      refused(split(lambda *given: measure(*given)[None], out_specs=ROWS), *arguments)  # noqa: B023
  found = split(
    functools.partial(importance.masked_share, axis_name="rows", denominator=100.0), out_specs=WHOLE
  )(*arguments)
  np.testing.assert_allclose(found, (kept > 1).sum() / 100, rtol=1e-5)
  print("ok measures", flush=True)


if __name__ == "__main__":
  main()
