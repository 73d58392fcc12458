"""Every loss inside `shard_map` over four devices; run as a process of its own with fake devices.

Place: `test_losses_sharding.py` starts it and reads the names of the checks it prints.
"""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from tests.losses import losses_batches as batches
from tests.losses import losses_house as house

SHARDS = 4
ROWS = PartitionSpec("rows")
WHOLE = PartitionSpec()


def mesh(names=("rows",), shape=(SHARDS,)):
  return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def sharded(case, specs=ROWS, axis_name="rows", over=None):
  """The case as a function of whole arrays, each device with a row of them."""

  def one(logprobs, arrays, given):
    return case.loss(logprobs, **arrays, **given, **case.options, axis_name=axis_name)

  mapped = jax.shard_map(one, mesh=over or mesh(), in_specs=(specs, specs, WHOLE), out_specs=WHOLE)
  return jax.jit(jax.value_and_grad(mapped, has_aux=True))


def agree(case, arrays, function, given, label):
  whole = house.run(case, arrays, **house.counts(arrays))
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
  try:
    mapped(arrays["logprobs"], house.arguments(case, arrays))
  except ValueError as error:
    assert "axis_name: expected" in str(error), error
    return
  raise AssertionError(f"{case}: a count of some shards was taken for the batch's")


def main():
  assert jax.device_count() == SHARDS
  for case in house.PROPERTIES:
    arrays = batches.batch(6)
    agree(case, arrays, sharded(case), {}, f"{case} counts over the axis")
    raises(case, arrays)
    print("ok", case.name, flush=True)
  for case in house.DEFAULTS:
    arrays = batches.batch(8)
    agree(case, arrays, sharded(case), house.counts(arrays), f"{case} global denominators")
    # Without the checks of shard_map's types the gradient is taken inside, and summed by nobody:
    # each shard's share, by the global denominators, is its rows' part of the whole.
    share = shares(case)
    whole = house.run(case, arrays, **house.counts(arrays))
    loss, gradient = share(arrays["logprobs"], house.arguments(case, arrays), house.counts(arrays))
    np.testing.assert_allclose(np.sum(loss), whole.loss, rtol=2e-5, atol=1e-6)
    house.close(gradient, whole.gradient, err_msg=f"{case} shares")
    print("ok shares of", case.name, flush=True)
  two_axes()
  unchecked()


def shares(case):
  def one(logprobs, arrays, given):
    (loss, _), gradient = house.plain(case)(logprobs, {**arrays, **given})
    return loss[None], gradient

  return jax.jit(jax.shard_map(one, mesh=mesh(), in_specs=(ROWS, ROWS, WHOLE), out_specs=ROWS))


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


if __name__ == "__main__":
  main()
