"""Every loss through the step: in micro-batches, its gradient is that of the loss on the whole.

The witness puts the loss on the logprobs of all rows at once, with counts taken from the records,
and pulls its gradient back through one forward pass that all losses share.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_batches import pack, records, weighted

from intellect3.losses import aggregation, components, kl, policy_gradient, supervised
from intellect3.models import presets, transformer
from intellect3.training import scoring, step

CONFIG = presets.tiny_qwen3(
  embed_dim=16,
  head_dim=4,
  mlp_dim=24,
  vocab_size=32,
  num_layers=1,
  num_dense_layers=1,
  attention="plain",
)
MADE = weighted(records([8, 5, 7, 3, 4, 6, 8, 3, 9, 2]))  # of the last, nothing is trained on
PLAN = ((8, 0), (6, 5, 3), (2, 1, 7), (4, 9))  # rows of 2, 3, 3, 2 trajectories
SUMS = functools.partial(aggregation.constant, divisor=64.0)
PG = policy_gradient
MIXED = functools.partial(components.weighted_sum_loss, ref_kl_coefficient=0.3, ce_coefficient=0.7)

LOSSES = {
  **{name: getattr(PG, name) for name in PG.__all__},
  "dual_clip": functools.partial(PG.clipped_loss, clip_high=0.05, clip_low=0.05, dual_clip=1.1),
  "sequence_mean": functools.partial(
    PG.masked_importance_loss, aggregate=aggregation.sequence_mean, ratio_low=0.8, ratio_high=1.2
  ),
  "constant": functools.partial(PG.reinforce_loss, aggregate=SUMS),
  "sequence_ratio_wide": functools.partial(PG.sequence_ratio_loss, clip_low=0.1, clip_high=0.1),
  "mixed": MIXED,
  "mixed_penalty": functools.partial(MIXED, ref_kl_loss=kl.penalty_loss, rl_loss=PG.cispo_loss),
  "reverse_kl_loss": kl.reverse_kl_loss,
  "penalty_loss": kl.penalty_loss,
  "supervised": step.supervised(supervised.negative_log_likelihood),
}
QUICK = (
  "masked_importance_loss",
  "probability_difference_loss",
  "sequence_mean",
  "mixed",
  "reverse_kl_loss",
  "supervised",
)
"""One of every way of asking for inputs; the others are in the slow suite."""
DECOUPLED = {
  "clipped_loss": functools.partial(PG.clipped_loss, behaviour_ratio_max=1.1),
  "truncated_importance_loss": functools.partial(PG.truncated_importance_loss, ratio_max=1.1),
}
REFERENCE = ("mixed", "mixed_penalty", "reverse_kl_loss", "penalty_loss")
WEIGHTED = ("mixed", "mixed_penalty")


@pytest.fixture(scope="module")
def params():
  leaves, tree = jax.tree.flatten(transformer.init(CONFIG, jax.random.key(0)))
  rng = np.random.default_rng(0)
  return tree.unflatten(
    [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  )


def whole_batch():
  batch = pack(MADE, PLAN, row_length=18, row_count=4)
  reference = np.random.default_rng(3).normal(-3.5, 0.3, batch.tokens.shape)
  return batch._replace(ref_logprobs=np.where(batch.segment_ids > 0, reference, 0).astype("f4"))


def batch_for(name):
  """The batch with what a run of this loss would have, and nothing else."""
  batch = whole_batch()
  if name not in REFERENCE:
    batch = batch._replace(ref_logprobs=None)
  if name not in WEIGHTED:
    nothing = dict.fromkeys((*WEIGHTS, "component_denominators"))
    batch = batch._replace(**nothing)
  return batch


WEIGHTS = ("rl_weights", "ce_weights", "ref_kl_weights")


@pytest.fixture(scope="module")
def forward(params):
  """Logprobs of all rows, and what pulls a gradient back to the parameters."""
  batch = whole_batch()

  @jax.jit
  def scored(params):
    def logprobs(params):
      return scoring.score(
        CONFIG,
        params,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        batch.temperature,
        head_chunk_size=16,
      ).logprobs

    return jax.vjp(logprobs, params)

  logprobs, pull = scored(params)
  return logprobs, jax.jit(lambda gradient: pull(gradient)[0])


def expected(loss_fn, name, logprobs, **more):
  """Value, metrics and gradient with respect to all logprobs, counts from the records."""
  batch = batch_for(name)
  trained = [int(record.trajectory.loss_mask.sum()) for record in MADE]
  if name != "supervised":
    more |= {"num_sequences": sum(count > 0 for count in trained)}
  if name in REFERENCE:
    more |= {"ref_logprobs": batch.ref_logprobs}
  if name in WEIGHTED:
    counts = [each.component_tokens() for each in MADE]
    sums = {key: float(sum(c[key] for c in counts)) for key in ("rl", "ce", "ref_kl")}
    more |= {weights: getattr(batch, weights) for weights in WEIGHTS}
    more |= {"component_denominators": components.Denominators(**sums)}

  def loss(logprobs):
    return loss_fn(
      logprobs,
      batch.inference_logprobs,
      batch.advantages,
      jnp.asarray(batch.loss_mask),
      segment_ids=jnp.asarray(batch.segment_ids),
      denominator=float(sum(trained)),
      **more,
    )

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(logprobs)


def assert_same(found, value, metrics, grads):
  grads_found, metrics_found = found
  np.testing.assert_allclose(metrics_found["loss"], value, rtol=2e-5, atol=1e-7)
  for metric, number in metrics.items():
    np.testing.assert_allclose(metrics_found[metric], number, rtol=2e-5, atol=1e-6, err_msg=metric)
  largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
  assert largest > 1e-4
  for leaf, wanted in zip(jax.tree.leaves(grads_found), jax.tree.leaves(grads), strict=True):
    bound = 2e-5 * max(float(jnp.abs(wanted).max()), 1e-2 * largest)
    assert float(jnp.abs(leaf - wanted).max()) <= bound


def gradients(loss_fn, **options):
  fn = step.make_gradient_fn(CONFIG, loss_fn, micro_rows=2, head_chunk_size=16, **options)
  return jax.jit(fn)


@pytest.mark.parametrize(
  "name",
  [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES],
)
def test_the_gradient_in_micro_batches_is_that_of_the_whole(params, forward, name):
  logprobs, pull = forward
  (value, metrics), gradient = expected(LOSSES[name], name, logprobs)
  found = gradients(LOSSES[name])(params, batch_for(name))
  assert_same(found, value, metrics, pull(gradient))


@pytest.mark.parametrize(
  "name",
  ["truncated_importance_loss", pytest.param("clipped_loss", marks=pytest.mark.slow)],
)
def test_decoupled_the_old_policy_is_the_one_before_the_step(params, forward, name):
  logprobs, pull = forward
  loss_fn = DECOUPLED[name]
  constant = np.asarray(logprobs)
  (value, metrics), gradient = expected(loss_fn, name, logprobs, old_logprobs=constant)
  found = gradients(loss_fn, decoupled=True)(params, batch_for(name))
  assert_same(found, value, metrics, pull(gradient))
  # Without, the policy that sampled is the old one: another gradient.
  if name == "truncated_importance_loss":
    coupled = gradients(loss_fn)(params, batch_for(name))
    assert abs(float(coupled[1]["loss"] - found[1]["loss"])) > 1e-4


@pytest.mark.parametrize(
  "plan",
  [
    ((0, 1), (2, 3, 4), (5, 6), (8, 9, 7)),
    pytest.param(((9, 8), (7, 6, 5), (4, 3, 2), (1, 0)), marks=pytest.mark.slow),
  ],
)
def test_weights_and_sequences_do_not_depend_on_the_packing(params, plan):
  """Rows of other trajectories, and other micro-batches with them."""
  for name in ("sequence_mean", "mixed"):
    loss_fn = LOSSES[name]
    if name == "mixed":
      loss_fn = functools.partial(components.weighted_sum_loss, ce_coefficient=0.7)
    fn = gradients(loss_fn)
    found = []
    for each in (PLAN, plan):
      batch = pack(MADE, each, row_length=18, row_count=4)
      if name == "sequence_mean":
        batch = batch._replace(**dict.fromkeys((*WEIGHTS, "component_denominators")))
      else:
        batch = batch._replace(ref_kl_weights=None)
      found.append(fn(params, batch))
    (grads, metrics), other = found
    assert_same(other, metrics["loss"], metrics, grads)


def test_per_token_weights_that_the_loss_does_not_read_are_an_error(params):
  batch = pack(MADE, PLAN, row_length=18, row_count=4)
  shapes = jax.eval_shape(lambda: params)
  for loss_fn in (PG.reinforce_loss, components.weighted_sum_loss):
    fn = step.make_gradient_fn(CONFIG, loss_fn, micro_rows=2, head_chunk_size=16)
    with pytest.raises(
      ValueError, match=r"token_weights: expected none .*does not read ce_weights"
    ):
      jax.eval_shape(fn, shapes, batch)


def test_a_users_own_loss_gets_the_basic_arguments(params, forward):
  def own(logprobs, inference_logprobs, advantages, loss_mask, *, segment_ids, denominator):
    return -jnp.sum(jnp.where(loss_mask, logprobs * advantages, 0.0)) / denominator, {}

  logprobs, pull = forward
  (value, _), gradient = expected(PG.reinforce_loss, "reinforce_loss", logprobs)
  found = gradients(own)(params, batch_for("own"))
  assert_same(found, value, {}, pull(gradient))


def test_a_term_without_a_token_is_nothing(params):
  """A step may hold no token of a component: its term is 0, not 0 / 0."""
  batch = pack(MADE, PLAN, row_length=18, row_count=4)
  zeros = np.zeros_like(batch.ce_weights)
  denominators = batch.component_denominators._replace(ce=np.float32(0.0))
  batch = batch._replace(ce_weights=zeros, ref_kl_weights=None, component_denominators=denominators)
  loss_fn = functools.partial(components.weighted_sum_loss, ce_coefficient=0.7)
  grads, metrics = gradients(loss_fn)(params, batch)
  assert metrics["ce_loss"] == 0.0 and np.isfinite(metrics["loss"]) and metrics["loss"] != 0.0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
