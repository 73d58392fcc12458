"""Run by test_layout_contract in a process of its own: contract 5 on eight fake devices.

For a model family and each mesh named: the loss, every gradient and three steps of AdamW on eight
devices are those of one device.
"""

import os
import sys

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import optax
from training_batches import pack, records

from intellect3.losses.policy_gradient import masked_importance_loss
from intellect3.models import presets
from intellect3.pipeline import placement
from intellect3.sharding import rules
from intellect3.sharding.mesh import make_mesh
from intellect3.training import layout, optimizer, scoring, step

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
B1 = 0.9


def batch(seed):
  return pack(records(LENGTHS, seed=seed), ROWS, row_length=16, row_count=16)


def steps(config, mesh, table):
  """The gradients and metrics of the first step, and parameters and loads after the last."""
  made = optimizer.adamw(learning_rate=RATE, eps=1e-3, b1=B1, clip_norm=None)
  shardings = layout.state_shardings(config, made, mesh, table)
  state = layout.make_state(config, made, shardings, seed=0)
  one = step.make_train_step(config, masked_importance_loss, made, micro_rows=8, head_chunk_size=8)
  compiled = layout.compile_step(one, shardings, mesh, table)
  metrics = []
  for seed in range(STEPS):
    state, told = compiled(state, placement.place(batch(seed), mesh))
    metrics.append(jax.device_get(told))
    if seed == 0:
      score = scoring.make_logprob_fn(config, head_chunk_size=8)
      canary = layout.compile_canary(score, mesh, table)(state.params, np.arange(5, dtype=np.int32))
      metrics[0]["canary"] = np.asarray(canary)
      grads = {name: np.asarray(moment) / (1 - B1) for name, moment in first_moments(state)}
  return grads, metrics, jax.device_get(state.params)


def first_moments(state):
  """Adam's first moments, by parameter: after one step (1 - b1) times the gradients."""
  is_adam = lambda leaf: isinstance(leaf, optax.ScaleByAdamState)  # noqa: E731
  for adam in filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam)):
    for path, moment in jax.tree_util.tree_flatten_with_path(adam.mu)[0]:
      yield jax.tree_util.keystr(path), moment


def close(found, expected, tolerance=2e-5):
  for name, b in expected.items():
    error, largest = np.abs(found[name] - b).max(), max(np.abs(b).max(), 1e-9)
    assert error <= tolerance * largest, f"{name}: {error:.1e} of {largest:.1e}"


def main(family, meshes):
  config = FAMILIES[family]
  grads_1, metrics_1, params_1 = steps(
    config, make_mesh(devices=jax.devices()[:1]), rules.TRAIN_FSDP
  )
  for named in meshes:
    table, *axes = named.split(":")
    mesh = make_mesh(**{axis: 2 for axis in axes})
    grads_8, metrics_8, params_8 = steps(config, mesh, getattr(rules, table)())
    assert len(grads_1) >= len(jax.tree.leaves(params_1)) - 1  # all but a frozen bias
    close(grads_8, grads_1)
    for found, expected in zip(metrics_8, metrics_1, strict=True):
      # No router chose otherwise.
      np.testing.assert_array_equal(found["expert_load_LE"], expected["expert_load_LE"])
      for name in expected.keys() - {"expert_extra_rounds"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(params_8), jax.tree.leaves(params_1), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * RATE * STEPS)
    print(named, flush=True)


main(sys.argv[1], sys.argv[2:])
