"""Run by test_hf_sharded in a process of its own: a checkpoint read to four fake devices.

Also one that `hf-to-orbax` made of it, by plain Orbax.
"""

import math
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from intellect3.models import hf, transformer
from intellect3.models.stored import directory as stored
from intellect3.sharding import mesh as meshes
from intellect3.sharding import rules, specs
from tools import convert_checkpoint


def read_sharded(directory, mesh, table, dtype):
  """The params, where they lie, and how many elements were read."""
  config = hf.check(directory)
  shapes, axes = transformer.abstract(config)
  read = []
  plain = stored.read_into

  def counting(out, root, place, view):
    read.append(out.size)
    return plain(out, root, place, view)

  stored.read_into = counting
  try:
    shardings = specs.tree_shardings(axes, shapes, mesh, table)
    return hf.load_sharded(directory, config, shardings, dtype=dtype), shardings, sum(read)
  finally:
    stored.read_into = plain


def main():
  for directory in sys.argv[1:]:
    _, whole = hf.load(directory)
    size = sum(leaf.size for leaf in jax.tree.leaves(whole))
    for table, axes in (
      (rules.TRAIN_FSDP, {"fsdp": 4}),
      (rules.TRAIN_FSDP, {"data": 2, "fsdp": 2}),
      (rules.SERVE, {"tensor": 2}),
    ):
      mesh = meshes.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
      params, shardings, read = read_sharded(directory, mesh, table, None)
      jax.tree.map(_check, params, shardings, whole)
      assert read == size, (axes, read, size)  # every element once, though several hold it
    as_one_of_two(directory, whole, size)
  restored_by_orbax(sys.argv[1])
  print("same")


def restored_by_orbax(directory):
  """The four devices restore what `hf-to-orbax` writes to their shardings."""
  config, whole = hf.load(directory)
  assert convert_checkpoint.main(["hf-to-orbax", directory, f"{directory}.orbax"]) == 0
  shapes, axes = transformer.abstract(config)
  shardings = specs.tree_shardings(axes, shapes, meshes.make_mesh(fsdp=4), rules.TRAIN_FSDP)
  targets = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    whole,
    shardings,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(f"{directory}.orbax/params", targets)
  assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
  jax.tree.map(_check, restored, shardings, whole)


def as_one_of_two(directory, whole, size):
  """A process that owns two of the four devices reads what lies on those."""
  own = set(jax.devices()[:2])
  every = NamedSharding.addressable_devices_indices_map
  make = jax.make_array_from_single_device_arrays

  def of_two(sharding, shape):
    return {device: index for device, index in every(sharding, shape).items() if device in own}

  NamedSharding.addressable_devices_indices_map = of_two
  jax.make_array_from_single_device_arrays = lambda shape, sharding, shards, dtype: shards
  try:
    mesh = meshes.make_mesh(fsdp=4)
    parts, shardings, read = read_sharded(directory, mesh, rules.TRAIN_FSDP, "float32")
  finally:
    NamedSharding.addressable_devices_indices_map = every
    jax.make_array_from_single_device_arrays = make
  owned = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
    sharding = _at(shardings, path)
    indices = every(sharding, leaf.shape)
    distinct = {str(indices[device]) for device in own}
    owned += len(distinct) * math.prod(sharding.shard_shape(leaf.shape))
    for shard in _at(parts, path):
      (device,) = shard.devices()
      np.testing.assert_array_equal(shard, leaf[indices[device]])
  assert read == owned < 0.6 * size, (read, owned, size)


def _check(array, sharding, expected):
  assert array.sharding.is_equivalent_to(sharding, array.ndim)
  assert array.dtype == expected.dtype and array.committed
  np.testing.assert_array_equal(array, expected)


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree


main()
