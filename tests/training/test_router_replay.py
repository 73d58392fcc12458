"""Replaying the servers' choice of experts: the same program where it is one's own choice."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from training_batches import records

from intellect3 import types
from intellect3.losses import policy_gradient
from intellect3.models import presets, transformer
from intellect3.pipeline import packing
from intellect3.training import step

CONFIG = presets.tiny(
  embed_dim=16,
  head_dim=4,
  mlp_dim=24,
  expert_mlp_dim=8,
  vocab_size=32,
  expert_block_size=8,
  num_layers=3,
)
ROUTER = types.RouterShape(
  num_layers=3, num_dense_layers=1, num_experts=8, num_experts_per_token=2
)
LENGTHS = [8, 5, 7, 3, 4, 6, 8, 3]
PLAN = ((6, 3), (0, 1), (5, 2), (7, 4))


@pytest.fixture(scope="module")
def params():
  leaves, tree = jax.tree.flatten(transformer.init(CONFIG, jax.random.key(0)))
  rng = np.random.default_rng(0)
  noisy = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  return tree.unflatten(noisy)


@jax.jit
def chosen(params, tokens):
  """The experts that the model chooses for one sequence, [T, MoE layers, A]."""
  length = tokens.shape[0]
  output = transformer.Transformer(CONFIG).apply(
    {"params": params}, tokens[None], jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
  )
  return jnp.moveaxis(output.router.experts_LBTA[:, 0], 1, 0)


def recorded(params, made):
  """The records with the choice of a server of these weights, of every token but the last."""
  found = []
  for record in made:
    tokens = np.zeros(8, np.int32)
    tokens[: len(record.trajectory.tokens)] = record.trajectory.tokens
    experts = np.asarray(chosen(params, tokens))[: len(record.trajectory.tokens) - 1]
    trajectory = msgspec.structs.replace(
      record.trajectory, routed_experts=experts.astype(ROUTER.dtype)
    )
    found.append(msgspec.structs.replace(record, trajectory=trajectory))
  return found


def batch_of(made, router=ROUTER):
  return packing.pack(
    dict(enumerate(made)),
    PLAN,
    row_length=16,
    row_count=4,
    step=1,
    loss_tokens=int(sum(record.trajectory.loss_mask.sum() for record in made)),
    router=router,
  )


def gradient_fn(micro_rows):
  return jax.jit(
    step.make_gradient_fn(
      CONFIG, policy_gradient.masked_importance_loss, micro_rows=micro_rows, head_chunk_size=16
    )
  )


def test_replaying_ones_own_choice_changes_nothing(params):
  batch = batch_of(recorded(params, records(LENGTHS)))
  fn = gradient_fn(2)
  grads, metrics = fn(params, batch)
  grads_0, metrics_0 = fn(params, batch._replace(routed_experts=None, experts_recorded=None))
  assert metrics.pop("router_agreement") == 1.0
  assert metrics.keys() == metrics_0.keys()
  for name, value in metrics_0.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
  for leaf, leaf_0 in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_0), strict=True):
    np.testing.assert_allclose(leaf, leaf_0, rtol=0, atol=2e-6 * float(jnp.abs(leaf_0).max()))
