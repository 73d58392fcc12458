"""Replaying the servers' choice of experts: the same program where it is one's own choice."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from training_batches import counts, records

from intellect3 import types
from intellect3.losses import policy_gradient
from intellect3.models import presets, transformer
from intellect3.pipeline import packing
from intellect3.training import scoring, step

CONFIG = presets.tiny(
  embed_dim=16,
  head_dim=4,
  mlp_dim=24,
  expert_mlp_dim=8,
  vocab_size=32,
  expert_block_size=8,
  num_layers=3,
)
ROUTER = types.RouterShape(num_layers=3, num_dense_layers=1, num_experts=8, num_experts_per_token=2)
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
    counts=counts(made),
    router=router,
  )


@pytest.fixture(scope="module")
def own(params):
  return batch_of(recorded(params, records(LENGTHS)))


@pytest.fixture(scope="module")
def by_two():
  loss_fn = policy_gradient.masked_importance_loss
  return jax.jit(step.make_gradient_fn(CONFIG, loss_fn, micro_rows=2, head_chunk_size=16))


def test_replaying_ones_own_choice_changes_nothing(params, own, by_two):
  """To rounding: the two programs are not the same."""
  grads, metrics = by_two(params, own)
  grads_0, metrics_0 = by_two(params, own._replace(routed_experts=None, experts_recorded=None))
  assert metrics.pop("router_agreement") == 1.0
  assert metrics.keys() == metrics_0.keys()
  for name, value in metrics_0.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
  np.testing.assert_array_equal(metrics["expert_load_LE"], metrics_0["expert_load_LE"])
  for leaf, leaf_0 in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_0), strict=True):
    np.testing.assert_allclose(leaf, leaf_0, rtol=0, atol=2e-6 * float(jnp.abs(leaf_0).max()))


def test_another_choice_is_taken_and_counted_in_any_micro_batches(params, own, by_two):
  """Changed in the last layer, where no further router sees it: the own choices stay."""
  rng = np.random.default_rng(1)
  experts = own.routed_experts.copy()
  changed = own.experts_recorded & (rng.random(own.tokens.shape) < 0.5)
  experts[changed, 1, 0] = (experts[changed, 1] + 1).max(axis=1) % 8
  clash = experts[..., 1, 0] == experts[..., 1, 1]
  experts[clash & changed, 1, 0] = (experts[clash & changed, 1, 0] + 1) % 8
  batch = own._replace(routed_experts=experts)
  differs = (np.sort(experts, axis=-1) != np.sort(own.routed_experts, axis=-1)).any(axis=-1)
  assert 10 < differs.sum() < own.experts_recorded.sum()

  grads, metrics = by_two(params, batch)
  expected = 1.0 - differs.sum() / (2 * own.experts_recorded.sum())
  np.testing.assert_allclose(metrics["router_agreement"], expected, rtol=1e-6)

  # The load is that of the experts taken: recorded ones, and of each last token its own choice.
  _, metrics_0 = by_two(params, own)
  load = np.asarray(metrics_0["expert_load_LE"]).copy()
  for before, after in zip(own.routed_experts[changed], experts[changed], strict=True):
    load[1] += np.bincount(after[1], minlength=8) - np.bincount(before[1], minlength=8)
  np.testing.assert_array_equal(metrics["expert_load_LE"], load)
  assert abs(float(metrics["loss"] - metrics_0["loss"])) > 1e-4

  # Other micro-batches of the same rows.
  order = np.array([1, 0, 2, 3])
  reordered = jax.tree.map(lambda leaf: leaf[order] if leaf.ndim else leaf, batch)
  grads_1, metrics_1 = by_two(params, reordered)
  for name, value in metrics.items():
    np.testing.assert_allclose(metrics_1[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
  for leaf, leaf_1 in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_1), strict=True):
    bound = 2e-5 * max(float(jnp.abs(leaf).max()), 1e-3)
    np.testing.assert_allclose(leaf_1, leaf, rtol=0, atol=bound)


def test_replay_lowers_the_mismatch_of_a_server_with_another_router(params):
  """The server's router is off by noise; all else of it is the trainer's."""
  rng = np.random.default_rng(2)

  def noisy(path, leaf):
    router = "router" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    return leaf + router * 0.02 * rng.normal(size=leaf.shape).astype(np.float32)

  served = jax.tree_util.tree_map_with_path(noisy, params)
  batch = batch_of(recorded(served, records([8] * 8)))

  @jax.jit
  def scores(params, marked):
    return scoring.score(
      CONFIG,
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      batch.temperature,
      head_chunk_size=16,
      routed_experts=batch.routed_experts,
      experts_recorded=marked,
    )

  def mismatch(ours, theirs):
    difference = np.float64(ours.logprobs - theirs.logprobs)[batch.loss_mask]
    return np.mean(np.expm1(difference) - difference)

  nothing = np.zeros_like(batch.experts_recorded)
  theirs, without = scores(served, nothing), scores(params, nothing)
  with_replay = scores(params, batch.experts_recorded)
  assert with_replay.agreed < 2 * batch.experts_recorded.sum()  # some choices did differ
  assert mismatch(with_replay, theirs) < 0.2 * mismatch(without, theirs)


def test_a_dense_model_has_no_experts_to_replay(own):
  dense = presets.tiny_qwen3(vocab_size=32, num_layers=1, num_dense_layers=1)
  fn = step.make_gradient_fn(
    dense, policy_gradient.masked_importance_loss, micro_rows=4, head_chunk_size=16
  )
  shapes = jax.eval_shape(lambda: transformer.init(dense, jax.random.key(0)))
  with pytest.raises(ValueError, match="routed_experts: expected None for a model without experts"):
    jax.eval_shape(fn, shapes, own)
