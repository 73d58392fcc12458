"""What a loss gets beside the basic arguments, and what is refused before anything starts."""

import functools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from training_batches import pack, records

from intellect3.losses import aggregation, components, kl, policy_gradient, supervised
from intellect3.training import loss_inputs, step

WEIGHTED = components.weighted_sum_loss


def own(logprobs, inference_logprobs, advantages, loss_mask, *, segment_ids, denominator):
  """A user's loss with the basic signature."""
  return -jnp.sum(jnp.where(loss_mask, logprobs * advantages, 0.0)) / denominator, {}


def test_a_loss_declares_by_its_signature():
  assert loss_inputs.declared(own) == set()
  assert loss_inputs.declared(policy_gradient.reinforce_loss) == {"num_sequences"}
  assert loss_inputs.declared(policy_gradient.clipped_loss) == {"num_sequences", "old_logprobs"}
  assert loss_inputs.declared(kl.penalty_loss) == {"num_sequences", "ref_logprobs"}
  assert loss_inputs.declared(WEIGHTED) == set(loss_inputs.NAMES) - {"old_logprobs"}
  bound = functools.partial(policy_gradient.clipped_loss, clip_low=0.1)
  assert loss_inputs.declared(bound) == {"num_sequences", "old_logprobs"}

  @functools.wraps(kl.penalty_loss)
  def wrapped(*arguments, **keywords):
    return kl.penalty_loss(*arguments, **keywords)

  assert loss_inputs.declared(wrapped) == {"num_sequences", "ref_logprobs"}
  assert loss_inputs.declared(lambda *arguments, **keywords: None) == set()


def test_a_loss_gets_what_it_declared_and_what_is_there():
  available = {"num_sequences": 3, "ref_logprobs": None, "denominator": 5, "old_logprobs": 1}
  assert loss_inputs.select({"num_sequences", "ref_logprobs"}, available) == {"num_sequences": 3}


def test_counts_are_the_batchs_own():
  batch = pack(records([5, 4, 3]), ((0, 1), (2,)), row_length=9, row_count=2)
  found = loss_inputs.counts(batch)
  assert found["denominator"] == 3 + 2 + 1 and found["num_sequences"] == 3
  assert found["component_denominators"] == components.Denominators(6, 6, 6)
  each = components.Denominators(*(np.float32(count) for count in (4, 0, 6)))
  found = loss_inputs.counts(batch._replace(component_denominators=each))
  assert found["component_denominators"] == each


@pytest.mark.parametrize(
  ("loss_fn", "given"),
  [
    (own, []),
    *((getattr(policy_gradient, name), []) for name in policy_gradient.__all__),
    (policy_gradient.clipped_loss, ["old_logprobs"]),
    (functools.partial(policy_gradient.clipped_loss, aggregate=aggregation.sequence_mean), []),
    (kl.reverse_kl_loss, ["ref_logprobs"]),
    (WEIGHTED, ["rl_weights"]),
    (functools.partial(WEIGHTED, ce_coefficient=1.0), ["rl_weights", "ce_weights"]),
    (functools.partial(WEIGHTED, ref_kl_coefficient=1.0), ["ref_logprobs", "ref_kl_weights"]),
    (step.supervised(supervised.negative_log_likelihood), []),
  ],
)
def test_a_loss_that_reads_what_it_gets_is_accepted(loss_fn, given):
  loss_inputs.check(loss_fn, given)


def basic(result):
  return lambda a, b, c, d, *, segment_ids, denominator: result(a)


@pytest.mark.parametrize(
  ("loss_fn", "given", "message"),
  [
    (lambda a, b: a, [], "unexpected keyword argument 'segment_ids'"),
    (lambda a, b, c, d, *, segment_ids: a, [], "unexpected keyword argument 'denominator'"),
    (basic(lambda a: a), [], r"expected to return \(loss, metrics\)"),
    (basic(lambda a: (a, {})), [], r"a scalar and a dict of them, got \(\(2, 4\), \{\}\)"),
    (basic(lambda a: (a.sum(), {"m": a})), [], "a scalar and a dict of them"),
    (functools.partial(policy_gradient.clipped_loss, clip_low=-1.0), [], "clip_low: expected"),
    (functools.partial(own, temperature=1.0), [], "loss_fn: own: .*temperature"),
    (
      functools.partial(policy_gradient.clipped_loss, behaviour_ratio_max=2.0),
      [],
      "behaviour_ratio_max: expected old_logprobs",
    ),
    (kl.reverse_kl_loss, [], "reference_path: expected a model's directory for reverse_kl_loss"),
    (
      functools.partial(WEIGHTED, ref_kl_coefficient=1.0),
      [],
      "reference_path: expected a model's directory for weighted_sum_loss, got None",
    ),
    (
      functools.partial(WEIGHTED, ref_kl_coefficient=1.0, ce_coefficient=float("nan")),
      [],
      "ce_coefficient: expected",
    ),
    (own, ["ref_logprobs"], "reference_path: expected None for own, which does not read"),
    (WEIGHTED, ["ref_logprobs"], "reference_path: expected None for weighted_sum_loss"),
    (policy_gradient.reinforce_loss, ["old_logprobs"], "decoupled: expected False for reinforce"),
    (WEIGHTED, ["ce_weights", "rl_weights"], "token_weights: expected none.*not read ce_weights"),
    (policy_gradient.cispo_loss, ["rl_weights"], "token_weights: expected none.*not read rl_wei"),
  ],
)
def test_a_loss_that_does_not_fit_is_refused(loss_fn, given, message):
  with pytest.raises(ValueError, match=message):
    loss_inputs.check(loss_fn, given)


def test_a_divergence_that_is_only_watched_counts_as_read():
  def watched(a, b, c, d, *, segment_ids, denominator, ref_logprobs):
    loss, metrics = own(a, b, c, d, segment_ids=segment_ids, denominator=denominator)
    return loss, {**metrics, "reverse_kl": jnp.sum(jnp.where(d, a - ref_logprobs, 0.0))}

  loss_inputs.check(watched, ["ref_logprobs"])


TOUCHED = """
from jax._src import xla_bridge
from intellect3.losses import policy_gradient
from intellect3.training import loss_inputs
for name in policy_gradient.__all__:
  loss_inputs.check(getattr(policy_gradient, name))
print(xla_bridge.backends_are_initialized())
"""


def test_checking_a_loss_touches_no_device():
  """The process that checks a run is not the one that trains: it must leave the devices alone."""
  found = subprocess.run(
    [sys.executable, "-c", TOUCHED], capture_output=True, text=True, env={**os.environ}
  )
  assert found.stdout.strip() == "False", found.stderr[-2000:]


def test_a_supervised_loss_gets_what_it_takes():
  arrays = (jnp.zeros((1, 2)),) * 3
  mask = jnp.ones((1, 2), bool)
  seen = {}

  def loss(logprobs, loss_mask, *, denominator, segment_ids=None):
    seen["segment_ids"] = segment_ids
    return jnp.float32(0.0), {}

  more = {"segment_ids": jnp.ones((1, 2), jnp.int32), "denominator": 2.0}
  step.supervised(loss)(*arrays, mask, **more, num_sequences=1.0)
  assert seen["segment_ids"] is more["segment_ids"]
  mean = functools.partial(supervised.negative_log_likelihood, aggregate=aggregation.sequence_mean)
  logprobs = jnp.asarray([[-1.0, -3.0]])
  value, _ = step.supervised(mean)(logprobs, *arrays[1:], mask, **more, num_sequences=4.0)
  assert value == 2.0 / 4.0
