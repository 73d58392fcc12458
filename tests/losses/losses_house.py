"""The table of losses under test: what each is called with, and what it must give.

Place: `tests/losses`. Every property runs over this table. One compiled function per case and
shape, shared by all properties.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from hypothesis import given, settings

from intellect3.losses import aggregation, components, kl, policy_gradient, supervised
from tests.losses import losses_batches, losses_oracles

COMMON = ("inference_logprobs", "advantages", "loss_mask", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Case:
  """One loss with its hyperparameters.

  Attributes:
    name: of the test.
    loss: the function under test.
    oracle: its definition, from `losses_oracles`.
    options: hyperparameters, under the names of the loss.
    oracle_options: the same under the names of the oracle; None where they agree.
    fields: arrays it is called with, apart from the logprobs.
    mean: how it averages: "token", "sequence", "constant".
    smooth: whether its gradient is the derivative of its value (nothing under a stop-gradient).
  """

  name: str
  loss: Callable[..., Any]
  oracle: Callable[..., losses_oracles.Terms]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  oracle_options: Mapping[str, Any] | None = None
  fields: tuple[str, ...] = COMMON
  mean: str = "token"
  smooth: bool = True

  def __str__(self):
    return self.name

  def __hash__(self):
    return hash(self.name)


def _case(name, oracle, /, mean="token", extra=(), smooth=True, loss=None, **options):
  loss = loss or getattr(policy_gradient, f"{oracle.__name__}_loss")
  return Case(name, loss, oracle, options, None, (*COMMON, *extra), mean, smooth)


o, OLD, REF = losses_oracles, ("old_logprobs",), ("ref_logprobs",)
DEFAULTS = (
  _case("reinforce", o.reinforce),
  _case("masked_importance", o.masked_importance),
  _case("truncated_importance", o.truncated_importance, smooth=False),
  _case("clipped", o.clipped),
  _case("sequence_ratio", o.sequence_ratio, mean="sequence"),
  _case("cispo", o.cispo, smooth=False),
  _case("probability_difference", o.probability_difference),
  _case("geometric_masked", o.geometric_masked),
  _case("reverse_kl", o.reverse_kl, loss=kl.reverse_kl_loss, extra=REF, smooth=False),
  _case("penalty", o.penalty, loss=kl.penalty_loss, extra=REF),
  Case(
    "negative_log_likelihood",
    supervised.negative_log_likelihood,
    o.negative_log_likelihood,
    fields=("loss_mask", "segment_ids"),
  ),
)
VARIANTS = (
  _case(
    "masked_importance_narrow", o.masked_importance, ratio_low=0.9, ratio_high=1.1,
    sequence_ratio_min=0.3,
  ),
  _case("truncated_importance_1", o.truncated_importance, smooth=False, ratio_max=1.0),
  _case("truncated_importance_old", o.truncated_importance, extra=OLD),
  _case("clipped_higher", o.clipped, clip_high=0.28),
  _case("clipped_dual", o.clipped, dual_clip=3.0),
  _case("clipped_old", o.clipped, extra=OLD),
  _case("clipped_old_bounded", o.clipped, extra=OLD, behaviour_ratio_max=1.5, dual_clip=2.0),
  _case("sequence_ratio_wide", o.sequence_ratio, mean="sequence", clip_low=0.2, clip_high=0.3),
  _case(
    "sequence_ratio_token", o.sequence_ratio, mean="sequence", smooth=False, token_level=True,
    clip_low=0.2, clip_high=0.3,
  ),
  _case("sequence_ratio_old", o.sequence_ratio, mean="sequence", extra=OLD, clip_high=0.1),
  _case("cispo_both", o.cispo, smooth=False, ratio_low=0.5, ratio_high=1.5),
  _case("cispo_old", o.cispo, extra=OLD, smooth=False),
  _case("probability_difference_0", o.probability_difference, kl_tau=0.0),
  _case(
    "probability_difference_sides", o.probability_difference, difference_low=0.02,
    difference_high=0.1, kl_tau=0.3,
  ),
  _case("probability_difference_both", o.probability_difference, by_sign=False),
  _case("geometric_masked_narrow", o.geometric_masked, ratio_low=0.9, ratio_high=1.2),
  _case("geometric_masked_truncated", o.geometric_masked, smooth=False, ratio_max=2.0),
  _case("reverse_kl_1", o.reverse_kl, loss=kl.reverse_kl_loss, extra=REF, smooth=False,
        ratio_max=1.0),
  *(
    dataclasses.replace(
      _case(f"penalty_{name}", o.penalty, loss=kl.penalty_loss, extra=REF),
      options={"estimator": getattr(kl, name)},
      oracle_options={"estimator": name},
    )
    for name in ("k1", "k2")
  ),
)  # fmt: skip
MEANS = ("token", "sequence", "constant")
AGGREGATES = {
  "token": aggregation.token_mean,
  "sequence": aggregation.sequence_mean,
  "constant": functools.partial(aggregation.constant, divisor=37.0),
}
AVERAGED = tuple(
  dataclasses.replace(
    case,
    name=f"{case.name}-{mean}_mean",
    mean=mean,
    options={**case.options, "aggregate": AGGREGATES[mean]},
    oracle_options=dict(case.options),
  )
  for case in DEFAULTS
  for mean in MEANS
  if mean != case.mean
)
ALL = (*DEFAULTS, *VARIANTS, *AVERAGED)
COMPONENTS = Case(
  "weighted_sum",
  components.weighted_sum_loss,
  losses_oracles.masked_importance,  # of the rl term; the sum has its own oracle in test_components
  {"rl_coefficient": 0.7, "ce_coefficient": 0.5, "ref_kl_coefficient": 0.3},
  fields=(*COMMON, *REF, *losses_batches.WEIGHTS),
  smooth=False,
)
# What the properties run over: every function, every mean, every option that adds a mechanism.
PROPERTIES = (
  *DEFAULTS,
  COMPONENTS,
  *(
    case
    for case in (*VARIANTS, *AVERAGED)
    if case.name
    in (
      "truncated_importance_old", "clipped_old_bounded", "sequence_ratio_token",
      "geometric_masked_truncated", "masked_importance-sequence_mean", "reinforce-constant_mean",
      "sequence_ratio-token_mean", "negative_log_likelihood-sequence_mean",
    )
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
  loss: np.ndarray
  metrics: dict[str, np.ndarray]
  gradient: np.ndarray

  @property
  def scalars(self):
    """The loss, then the metrics by name, as one float64 vector."""
    return np.array([self.loss, *(self.metrics[name] for name in sorted(self.metrics))], np.float64)


@functools.cache
def compiled(case):
  """`value_and_grad` of a case, jitted: `(logprobs, arguments) -> (loss, metrics), gradient`."""
  return jax.jit(plain(case))


def plain(case):
  return jax.value_and_grad(
    lambda logprobs, arguments: case.loss(logprobs, **arguments, **case.options), has_aux=True
  )


def trained(case, arrays):
  """Tokens at which a loss may read its arrays."""
  mask = arrays["loss_mask"] & (arrays["segment_ids"] != 0)
  if "ce_weights" in case.fields:  # it also imitates tokens that were not sampled
    mask |= (arrays["ce_weights"] != 0) & (arrays["segment_ids"] != 0)
  return mask


def denominators(case, arrays):
  """The global denominators of a batch, those that the case takes."""
  found = counts(arrays)
  if "ce_weights" not in case.fields:
    return found
  inside = arrays["segment_ids"] != 0
  mask = arrays["loss_mask"] & inside
  tokens = {
    "rl": mask & (arrays["rl_weights"] != 0),
    "ce": inside & (arrays["ce_weights"] != 0),
    "ref_kl": mask & (arrays["ref_kl_weights"] != 0),
  }
  sums = {name: np.float32(max(part.sum(), 1)) for name, part in tokens.items()}
  return {**found, "component_denominators": components.Denominators(**sums)}


def counts(arrays):
  """The tokens and the trajectories of a batch that are trained on."""
  mask = arrays["loss_mask"] & (arrays["segment_ids"] != 0)
  held = [mask[row, places].any() for row, places in losses_batches.trajectories(arrays)]
  return {
    "denominator": np.float32(max(mask.sum(), 1)),
    "num_sequences": np.float32(max(sum(held), 1)),
  }


def arguments(case, arrays, **given):
  return {**{name: arrays[name] for name in case.fields}, **given}


def run(case, arrays, function=None, **given):
  """The case on a batch; `given` are denominators, if not the batch's own."""
  (loss, metrics), gradient = (function or compiled(case))(
    arrays["logprobs"], arguments(case, arrays, **given)
  )
  return Result(
    np.asarray(loss),
    {name: np.asarray(value) for name, value in metrics.items()},
    np.asarray(gradient),
  )


def expected(case, arrays):
  """Loss, metrics and gradient by the oracle; also the sum of the terms' sizes, for tolerances."""
  options = case.options if case.oracle_options is None else case.oracle_options
  count, sequences = (float(counts(arrays)[name]) for name in ("denominator", "num_sequences"))
  loss = size = 0.0
  gradient = np.zeros(arrays["logprobs"].shape)
  names = (
    "importance_ratio", "importance_ratio_squared", "mismatch_kl", "masked_share",
    "sequence_masked_share",
  )  # fmt: skip
  metrics = dict.fromkeys(names, 0.0)
  for row, positions in losses_batches.trajectories(arrays):
    places = [t for t in positions if arrays["loss_mask"][row, t]]
    if not places:
      continue
    x, q, a, old, ref = (
      arrays[name][row, places].astype(np.float64)
      for name in ("logprobs", "inference_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    )
    extra = {"old": old} if "old_logprobs" in case.fields else {}
    extra |= {"ref": ref} if "ref_logprobs" in case.fields else {}
    terms = case.oracle(x, q, a, at=x, **extra, **options)
    per_token = {"token": count, "sequence": sequences * len(places), "constant": 37.0}[case.mean]
    for t in range(len(places)):
      loss += terms.values[t] / per_token
      size += abs(terms.values[t]) / per_token
      for u in range(len(places)):
        gradient[row, places[u]] += terms.jacobian[t, u] / per_token
      ratio = np.exp(x[t] - q[t])
      metrics["importance_ratio"] += ratio / count
      metrics["importance_ratio_squared"] += ratio**2 / count
      metrics["mismatch_kl"] += (np.expm1(x[t] - q[t]) - (x[t] - q[t])) / count
      metrics["masked_share"] += terms.out[t] / count
      metrics["sequence_masked_share"] += terms.dropped[t] / count
      for name, own in terms.own.items():
        metrics[name] = metrics.get(name, 0.0) + own[t] / count
  return Result(np.asarray(loss), metrics, gradient), size


def for_all(examples, body, **strategies):
  """Runs a Hypothesis property; the suites differ in how many examples they take."""
  settings(max_examples=examples, deadline=None)(given(**strategies)(body))()


def close(actual, wanted, *, rtol=2e-5, scale=None, err_msg=""):
  """Equal to `rtol`, apart from rounding at the size of the largest entry (or of `scale`)."""
  size = np.max(np.abs(wanted), initial=0.0) if scale is None else scale
  np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=1e-6 * size + 1e-12, err_msg=err_msg)
