"""The step's gradient does not depend on the layout, and is that of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_batches import pack, records

from intellect3.losses import policy_gradient, supervised
from intellect3.models import presets, transformer
from intellect3.training import optimizer, scoring, state, step

CONFIG = presets.tiny(
  embed_dim=16, head_dim=4, mlp_dim=24, expert_mlp_dim=8, vocab_size=32, expert_block_size=8
)
LENGTHS = [8, 5, 7, 3, 4, 6, 8, 3]
ROWS = ((0,), (1, 3), (2,), (4,), (5,), (6,), (7,))


@pytest.fixture(scope="module")
def params():
  params = transformer.init(CONFIG, jax.random.key(0))
  # Away from the symmetric start, and with the frozen bias at work.
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  noisy = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  return tree.unflatten(noisy)


def _gradients(params, batch, micro_rows, loss_fn=policy_gradient.masked_importance_loss, chunk=16):
  fn = step.make_gradient_fn(CONFIG, loss_fn, micro_rows=micro_rows, head_chunk_size=chunk)
  return jax.jit(fn)(params, batch)


@pytest.fixture(scope="module")
def reference(params):
  batch = pack(records(LENGTHS), ROWS, row_length=8, row_count=8)
  return _gradients(params, batch, 8)


def _assert_same(found, expected):
  (grads, metrics), (grads_0, metrics_0) = found, expected
  for (path, leaf), leaf_0 in zip(
    jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(grads_0), strict=True
  ):
    name = jax.tree_util.keystr(path)
    # The key bias has no gradient but rounding: softmax does not see what all keys share, except
    # through the rotation; its scale is that of the query bias.
    bound = 2e-5 * max(float(jnp.abs(leaf_0).max()), 1e-3)
    assert float(jnp.abs(leaf - leaf_0).max()) <= bound, name
  for name, value in metrics_0.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_gradient_does_not_depend_on_micro_batches(params, reference):
  batch = pack(records(LENGTHS), ROWS, row_length=8, row_count=8)
  _assert_same(_gradients(params, batch, 2), reference)


def test_gradient_does_not_depend_on_packing(params, reference):
  fn = step.make_gradient_fn(
    CONFIG, policy_gradient.masked_importance_loss, micro_rows=2, head_chunk_size=10
  )
  compiled = jax.jit(fn)
  for plan in (
    ((6, 3, 0), (5, 7, 4, 1), (2,)),
    ((2,), (1, 4, 7, 5), (0, 3, 6)),
    ((0, 1), (2, 3, 7), (4, 5), (6,)),
  ):
    batch = pack(records(LENGTHS), plan, row_length=24, row_count=4)
    _assert_same(compiled(params, batch), reference)


def test_gradient_is_that_of_the_naive_loss(params, reference):
  made = records(LENGTHS)
  total = sum(int(record.trajectory.loss_mask.sum()) for record in made)
  rows = pack(made, tuple((n,) for n in range(8)), row_length=8, row_count=8)

  def row_loss(params, row):  # one trajectory, without packing, chunks or micro-batches
    tokens = row.tokens[None]
    output = transformer.Transformer(CONFIG).apply(
      {"params": params}, tokens, jnp.arange(8)[None], jnp.ones_like(tokens)
    )
    temperature = row.temperature[0]
    logits = output.hidden_BTD[0] @ transformer.head(params, CONFIG) / temperature
    logprobs = jax.nn.log_softmax(logits[:-1])
    chosen = logprobs[jnp.arange(7), tokens[0, 1:]]
    ratio = jnp.exp(chosen - row.inference_logprobs[1:])
    mask = row.loss_mask[1:]
    fits = (ratio >= 0.5) & (ratio <= 5.0) & (jnp.where(mask, ratio, 1.0).min() >= 1e-5)
    return -jnp.sum(jnp.where(fits & mask, ratio, 0.0)) * row.advantages.sum() / row.loss_mask.sum()

  def loss(params):
    counts = dict.fromkeys(("step", "loss_tokens", "loss_sequences"), np.zeros(8))
    fields = rows._replace(**counts)
    return jax.lax.map(lambda row: row_loss(params, row), fields).sum() / total

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  _assert_same((grads, {}), (reference[0], {}))
  np.testing.assert_allclose(reference[1]["loss"], value, rtol=2e-5)


def test_scores_are_aligned_with_their_tokens(params):
  made = records(LENGTHS)
  batch = pack(made, ((6, 3, 0), (5, 7, 4, 1), (2,)), row_length=24, row_count=3)
  rng = np.random.default_rng(0)
  temperature = rng.uniform(0.5, 2.0, batch.tokens.shape).astype(np.float32)
  scores = jax.jit(
    lambda params: scoring.score(
      CONFIG,
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      temperature,
      head_chunk_size=7,
    )
  )(params)
  third = made[0].trajectory.tokens  # in row 0, after 8 + 3 tokens
  output = jax.jit(transformer.Transformer(CONFIG).apply)(
    {"params": params}, third[None], np.arange(8)[None], np.ones((1, 8), np.int32)
  )
  logits = np.float64(output.hidden_BTD[0]) @ np.float64(transformer.head(params, CONFIG))

  def normalised(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

  cool = normalised(logits[:-1] / temperature[0, 12:19, None])
  np.testing.assert_allclose(scores.logprobs[0, 12:19], cool[np.arange(7), third[1:]], atol=1e-5)
  np.testing.assert_allclose(scores.entropy[0, 12:19], -(np.exp(cool) * cool).sum(-1), atol=1e-5)
  logprob_fn = jax.jit(scoring.make_logprob_fn(CONFIG, head_chunk_size=64))
  plain = normalised(logits[:-1])[np.arange(7), third[1:]]
  np.testing.assert_allclose(logprob_fn(params, third), [0.0, *plain], atol=1e-5)
  assert not scores.scored[:, 0].any() and not scores.scored[batch.segment_ids == 0].any()
  assert scores.scored.sum() == sum(LENGTHS) - len(LENGTHS)
  assert (np.asarray(scores.logprobs)[~scores.scored] == 0.0).all()
  assert (scores.expert_load_LE.sum(axis=1) == 2 * sum(LENGTHS)).all()


def test_entropy_and_loads_are_those_of_the_whole_batch(params, reference):
  _, metrics = reference
  assert 0.0 < float(metrics["entropy"]) < np.log(32)
  load = np.asarray(metrics["expert_load_LE"])
  assert load.sum() == 2 * sum(LENGTHS)
  expected = load.max(axis=1) / load.mean(axis=1) - 1
  np.testing.assert_allclose(metrics["max_violation_L"], expected, rtol=1e-6)
  np.testing.assert_allclose(metrics["max_violation"], expected.max(), rtol=1e-6)


def test_a_step_is_gradient_then_optimizer(params):
  made = optimizer.adamw(learning_rate=1e-2, weight_decay=0.1)
  batch = pack(records(LENGTHS), ROWS, row_length=8, row_count=8)
  loss_fn = policy_gradient.masked_importance_loss
  train_step = step.make_train_step(CONFIG, loss_fn, made, micro_rows=4, head_chunk_size=16)
  first = state.create(params, made)
  after, metrics = jax.jit(train_step)(first, batch)
  assert int(after.step) == 1
  grads, _ = _gradients(params, batch, 4)
  norm = np.sqrt(sum(float((np.float64(leaf) ** 2).sum()) for leaf in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  np.testing.assert_allclose(metrics["learning_rate"], 1e-2)
  bias = lambda tree: tree["moe_layers"]["moe"]["router"]["correction_bias"]  # noqa: E731
  np.testing.assert_array_equal(bias(after.params), bias(params))
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, params)
  moved["moe_layers"]["moe"]["router"].pop("correction_bias")
  assert all(0.0 < value < 0.05 for value in jax.tree.leaves(moved))


def test_a_supervised_loss_becomes_one_of_the_steps():
  rng = np.random.default_rng(0)
  logprobs = -rng.random((2, 4), np.float32)
  mask = rng.random((2, 4)) < 0.5
  ones = np.ones_like(logprobs)
  loss, metrics = step.supervised(supervised.negative_log_likelihood)(
    logprobs, ones, ones, mask, segment_ids=None, denominator=jnp.float32(10.0)
  )
  np.testing.assert_allclose(loss, -logprobs[mask].sum() / 10.0, rtol=1e-6)
  assert "negative_log_likelihood" in metrics


def test_rows_must_divide(params):
  batch = pack(records(LENGTHS), ROWS, row_length=8, row_count=8)
  with pytest.raises(ValueError, match="micro_rows = 3"):
    _gradients(params, batch, 3)
  with pytest.raises(ValueError, match="micro_rows"):
    step.make_gradient_fn(CONFIG, policy_gradient.reinforce_loss, micro_rows=0, head_chunk_size=8)
