"""Run by test_layout_contract in a process of its own: contract 5 on eight fake devices.

For a model family and each mesh named: the loss, every gradient and three steps of AdamW on eight
devices are those of one device.
"""

import os
import sys

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import flax.linen as nn
import jax
import numpy as np
from training_batches import pack, records

from intellect3.losses.policy_gradient import masked_importance_loss
from intellect3.models import presets, transformer
from intellect3.pipeline import placement
from intellect3.sharding import rules
from intellect3.sharding.mesh import make_mesh
from intellect3.training import layout, optimizer, step

SIZES = dict(
  embed_dim=16,
  head_dim=4,
  mlp_dim=24,
  expert_mlp_dim=8,
  vocab_size=32,
  num_layers=3,
  expert_block_size=8,
  expert_receive_rows=32,
)
FAMILIES = {
  "glm4_moe": presets.tiny(**SIZES),
  "qwen3_moe": presets.tiny_qwen3_moe(**SIZES, remat_policy="full"),
}
LENGTHS = [16, 5, 7, 11, 4, 6, 8, 3, 16, 9, 2, 12, 5, 5]
ROWS = ((0,), (1, 3), (2, 4), (5, 6), (7,), (8,), (9, 10), (11,), (12, 13))
RATE = 1e-3
STEPS = 3


def batch(seed):
  return pack(records(LENGTHS, seed=seed), ROWS, row_length=16, row_count=16)


def gradients(config, mesh, table):
  shardings = layout.param_shardings(config, mesh, table)
  params = jax.jit(
    lambda: transformer.init(config, jax.random.key(0)), out_shardings=shardings
  )()
  make = dict(micro_rows=8, head_chunk_size=8)
  gradient = step.make_gradient_fn(config, masked_importance_loss, **make)
  with jax.set_mesh(mesh), nn.logical_axis_rules(table):
    grads, metrics = jax.jit(gradient)(params, placement.place(batch(0), mesh))
  return jax.device_get(grads), jax.device_get(metrics)


def steps(config, mesh, table):
  made = optimizer.adamw(learning_rate=RATE, eps=1e-3)
  shardings = layout.state_shardings(config, made, mesh, table)
  state = layout.make_state(config, made, shardings, seed=0)
  one = step.make_train_step(
    config, masked_importance_loss, made, micro_rows=8, head_chunk_size=8
  )
  compiled = layout.compile_step(one, shardings, mesh, table)
  loads = []
  for seed in range(STEPS):
    state, metrics = compiled(state, placement.place(batch(seed), mesh))
    loads.append(np.asarray(metrics["expert_load_LE"]))
  return jax.device_get(state.params), loads


def close(found, expected, tolerance=2e-5):
  def one(path, a, b):
    largest = np.abs(b).max()
    error = np.abs(a - b).max() / max(largest, 1e-9)
    assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e} of {largest:.1e}"

  jax.tree_util.tree_map_with_path(one, found, expected)


def main(family, meshes):
  config = FAMILIES[family]
  alone = make_mesh(devices=jax.devices()[:1]), rules.TRAIN_FSDP
  grads_1, metrics_1 = gradients(config, *alone)
  params_1, loads_1 = steps(config, *alone)
  for named in meshes:
    table, *axes = named.split(":")
    mesh = make_mesh(**{axis: 2 for axis in axes})
    layout_8 = mesh, getattr(rules, table)()
    grads_8, metrics_8 = gradients(config, *layout_8)
    close(grads_8, grads_1)
    for name, value in metrics_1.items():
      np.testing.assert_allclose(metrics_8[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    params_8, loads_8 = steps(config, *layout_8)
    for a, b in zip(jax.tree.leaves(params_8), jax.tree.leaves(params_1), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * RATE * STEPS)
    np.testing.assert_array_equal(loads_8, loads_1)  # no router chose otherwise
    print(named, flush=True)


main(sys.argv[1], sys.argv[2:])
