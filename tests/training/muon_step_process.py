"""Run by test_muon in a process of its own: train steps with Muon on eight fake devices and one."""

import os

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
from training_batches import pack, records

from intellect3.losses.policy_gradient import masked_importance_loss
from intellect3.models import presets
from intellect3.pipeline import placement
from intellect3.sharding import rules
from intellect3.sharding.mesh import make_mesh
from intellect3.training import layout, optimizer, step

CONFIG = presets.tiny(
  embed_dim=16, head_dim=4, mlp_dim=24, expert_mlp_dim=8, vocab_size=32, expert_block_size=8
)
ROWS = ((0,), (1, 3), (2,), (4,), (5,), (6,), (7,))
RATE = 1e-3
STEPS = 3


def train(mesh, table):
  made = optimizer.muon(learning_rate=RATE, eps=1e-3)
  shardings = layout.state_shardings(CONFIG, made, mesh, table)
  state = layout.make_state(CONFIG, made, shardings, seed=0)
  one = step.make_train_step(CONFIG, masked_importance_loss, made, micro_rows=8, head_chunk_size=16)
  compiled = layout.compile_step(one, shardings, mesh, table)
  losses = []
  for seed in range(STEPS):
    batch = pack(records([8, 5, 7, 3, 4, 6, 8, 3], seed=seed), ROWS, row_length=8, row_count=8)
    state, metrics = compiled(state, placement.place(batch, mesh))
    losses.append((metrics["loss"], metrics["grad_norm"]))
  return state, losses


def main():
  state_1, losses_1 = train(make_mesh(devices=jax.devices()[:1]), rules.TRAIN_FSDP)
  mesh = make_mesh(data=2, fsdp=2, expert=2)
  state_8, losses_8 = train(mesh, rules.TRAIN_FSDP_EXPERT)
  np.testing.assert_allclose(losses_8, losses_1, rtol=2e-5, atol=1e-6)
  for a, b in zip(jax.tree.leaves(state_8.params), jax.tree.leaves(state_1.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * RATE * STEPS)
  gate = state_8.params["moe_layers"]["moe"]["experts"]["gate"]
  momentum = [
    leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(state_8.opt_state)[0]
    if "gate" in str(path[-1]) and leaf.shape == gate.shape
  ]
  assert len(momentum) == 1 and momentum[0].sharding.is_equivalent_to(gate.sharding, gate.ndim)
  assert gate.addressable_shards[0].data.shape == (1, 4, 8, 8)
  print("same")


main()
