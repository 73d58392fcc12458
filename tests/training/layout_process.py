"""Run by test_layout in a process of its own: one step on eight fake devices and on one.

With all that a step may do: a reference scores the batch, tokens have weights, experts are
replayed, and the router's bias is updated.
"""

import dataclasses
import functools
import os

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
from training_batches import pack, records, weighted

from intellect3.losses.components import weighted_sum_loss
from intellect3.models import presets, transformer
from intellect3.pipeline import placement
from intellect3.sharding.mesh import make_mesh
from intellect3.sharding.rules import TRAIN_CONTEXT
from intellect3.training import layout, optimizer, scoring, step

CONFIG = dataclasses.replace(
  presets.tiny(embed_dim=16, head_dim=4, mlp_dim=24, expert_mlp_dim=8, vocab_size=32),
  expert_block_size=8,
)
LENGTHS = [8, 5, 7, 3, 4, 6, 8, 3]
ROWS = ((0,), (1, 3), (2,), (4,), (5,), (6,), (7,))
RATE = 1e-2
LOSS = functools.partial(weighted_sum_loss, ce_coefficient=0.5, ref_kl_coefficient=0.2)
REFERENCE = presets.tiny_qwen3(
  embed_dim=16,
  head_dim=4,
  mlp_dim=24,
  vocab_size=32,
  num_layers=1,
  num_dense_layers=1,
  tie_embeddings=True,
)


def one_step(mesh, made):
  shardings = layout.state_shardings(CONFIG, made, mesh, TRAIN_CONTEXT)
  state = layout.make_state(CONFIG, made, shardings, seed=0)
  train_step = step.make_train_step(
    CONFIG, LOSS, made, micro_rows=4, head_chunk_size=16, router_bias_rate=RATE
  )
  batch = replayed(pack(weighted(records(LENGTHS)), ROWS, row_length=8, row_count=8))
  placed = placement.place(batch, mesh)
  placed = placed._replace(ref_logprobs=reference_logprobs(mesh, placed))
  _laid(placed.ref_logprobs, placed.tokens.sharding)
  compiled = layout.compile_step(train_step, shardings, mesh, TRAIN_CONTEXT)
  state, metrics = compiled(state, placed)
  jax.tree.map(lambda leaf, sharding: _laid(leaf, sharding), state, shardings)
  return state, metrics


def reference_logprobs(mesh, placed):
  shardings = layout.param_shardings(REFERENCE, mesh, TRAIN_CONTEXT)
  make = jax.jit(lambda: transformer.init(REFERENCE, jax.random.key(1)), out_shardings=shardings)
  fn = scoring.make_batch_logprob_fn(REFERENCE, micro_rows=4, head_chunk_size=16)
  return layout.compile_scoring(fn, placement.row_sharding(mesh), mesh, TRAIN_CONTEXT)(
    make(), placed
  )


def replayed(batch):
  """The batch with the experts of some server; each row's last token has none."""
  rng = np.random.default_rng(0)
  ids = np.broadcast_to(np.arange(CONFIG.num_experts), (*batch.tokens.shape, 1, CONFIG.num_experts))
  experts = rng.permuted(ids, axis=-1)[..., : CONFIG.num_experts_per_token].astype(np.uint8)
  recorded = batch.segment_ids > 0
  recorded[:, -1] = False
  return batch._replace(routed_experts=experts, experts_recorded=recorded)


def _laid(leaf, sharding):
  assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)


def main():
  made = optimizer.adamw(learning_rate=RATE, eps=1e-3, clip_norm=None)
  alone = make_mesh(devices=jax.devices()[:1])
  state_1, metrics_1 = one_step(alone, made)
  state_8, metrics_8 = one_step(make_mesh(fsdp=2, expert=2, context=2), made)
  kernel = state_8.params["moe_layers"]["moe"]["experts"]["up"]
  shard = kernel.addressable_shards[0].data.shape  # experts over expert, width over the others
  assert shard[1:3] == (kernel.shape[1] // 2, kernel.shape[2] // 4)
  moments = [
    leaf
    for leaf in jax.tree.leaves(state_8.opt_state)
    if leaf.shape == kernel.shape and leaf.sharding.is_equivalent_to(kernel.sharding, kernel.ndim)
  ]
  assert len(moments) >= 2  # Adam's two moments lie as the parameter does
  for name, value in metrics_1.items():
    if name == "expert_extra_rounds":  # of the exchange that one device has not
      continue
    np.testing.assert_allclose(metrics_8[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * RATE), state_8.params, state_1.params
  )
  assert 0.0 < metrics_8["router_agreement"] < 0.5
  bias = state_8.params["moe_layers"]["moe"]["router"]["correction_bias"]
  assert set(np.unique(np.abs(bias))) <= {np.float32(0.0), np.float32(RATE)} and np.any(bias)
  print("same")


main()
