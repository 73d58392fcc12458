"""A weighted sum of losses: reinforcement, imitation and a reference in one step.

Place in the ring: the train step's loss where a run mixes signals. The step itself knows none of
them; which token feeds which term comes with the batch, as per-token weights that the rollout
workers wrote beside the tokens. So a new algorithm is a new way of writing weights and advantages,
and the trainer stays as it is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, kl, supervised
from intellect3.losses.policy_gradient import masked_importance, terms

PolicyGradientLoss = Callable[..., tuple[jax.Array, terms.Metrics]]


class Denominators(NamedTuple):
  """The tokens of weight != 0 of each term in the whole batch: scalars."""

  rl: jax.typing.ArrayLike
  ce: jax.typing.ArrayLike
  ref_kl: jax.typing.ArrayLike


def weighted_sum_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate: aggregation.Aggregate = aggregation.token_mean,
  axis_name: aggregation.AxisName | None = None,
  ref_logprobs: jax.Array | None = None,
  rl_weights: jax.Array | None = None,
  ce_weights: jax.Array | None = None,
  ref_kl_weights: jax.Array | None = None,
  component_denominators: Denominators | None = None,
  rl_loss: PolicyGradientLoss = masked_importance.masked_importance_loss,
  ref_kl_loss: PolicyGradientLoss = kl.reverse_kl_loss,
  rl_coefficient: float = 1.0,
  ce_coefficient: float = 0.0,
  ref_kl_coefficient: float = 0.0,
) -> tuple[jax.Array, terms.Metrics]:
  """Sum of a policy-gradient, a cross-entropy and a reference term.

    loss = sum over terms c of coefficient_c aggregate_c(weights_ct term_ct)

  Each term has its own tokens, those whose weight is not 0, and its own global denominator, their
  number, so that terms do not dilute one another. prime-rl's loss components work so (`rl_weights`,
  `ce_weights`, `ref_kl_weights`); its ECHO is a cross-entropy term on observations, its `opd` a
  reference term. A term of coefficient 0 is left out.

  Args:
    ref_logprobs: floating [B, T], of the reference; needed where `ref_kl_coefficient` is not 0.
    rl_weights: floating [B, T], scale the first term token by token, within the loss mask; None: 1.
    ce_weights: floating [B, T], of the cross-entropy term, on any token with a logprob, sampled or
      not (a trajectory's first token has none: its weight must be 0); None: 1 on the loss mask.
    ref_kl_weights: floating [B, T], of the reference term, within the loss mask; None: 1.
    component_denominators: of the whole batch, for every term; needed where weights and
      `denominator` are given. None: `denominator` for a term without weights.
    rl_loss: of `policy_gradient`.
    ref_kl_loss: `kl.reverse_kl_loss` or `kl.penalty_loss`.
    rl_coefficient, ce_coefficient, ref_kl_coefficient: of the terms.
    The common arguments: see `policy_gradient.terms.prepare`.

  Returns:
    The loss, scalar, and metrics: `rl_loss`, `ce_loss`, `ref_kl_loss` (before their coefficients),
    and those of the terms; where two terms have one of the same name, the first term's. Each is a
    mean over its own term's tokens.

  Raises:
    ValueError: no coefficient differs from 0; weights of the wrong shape or dtype; weights and
      `denominator` without `component_denominators`; or as the terms do.
  """
  coefficients = {"rl": rl_coefficient, "ce": ce_coefficient, "ref_kl": ref_kl_coefficient}
  weights = {"rl": rl_weights, "ce": ce_weights, "ref_kl": ref_kl_weights}
  checks.tokens(loss_mask, **{f"{c}_weights": w for c, w in weights.items() if w is not None})
  for name, coefficient in coefficients.items():
    checks.finite(f"{name}_coefficient", coefficient)
  used = [c for c in coefficients if not _is_zero(coefficients[c])]
  if not used:
    raise ValueError("coefficients: expected one of rl, ce, ref_kl that is not 0, got none")

  loss: jax.Array = jnp.zeros((), jnp.float32)
  metrics: terms.Metrics = {}
  for name in used:
    mask, common = _of_term(
      name,
      weights[name],
      loss_mask,
      component_denominators,
      segment_ids=segment_ids,
      denominator=denominator,
      num_sequences=num_sequences,
      aggregate=aggregate,
      axis_name=axis_name,
    )
    if name == "ce":
      value, told = supervised.negative_log_likelihood(logprobs, mask, **common)
    else:
      function, given = rl_loss, {}
      if name == "ref_kl":
        function, given = ref_kl_loss, {"ref_logprobs": ref_logprobs}
      value, told = function(logprobs, inference_logprobs, advantages, mask, **common, **given)
    loss = loss + coefficients[name] * value
    metrics = {**told, **metrics, f"{name}_loss": jax.lax.stop_gradient(value)}
  return loss, metrics


def _of_term(
  name: str,
  weights: jax.Array | None,
  loss_mask: jax.Array,
  denominators: Denominators | None,
  **common: Any,
) -> tuple[jax.Array, dict[str, Any]]:
  """The tokens of a term, and the common arguments for it."""
  if denominators is not None:
    common["denominator"] = getattr(denominators, name)
  if weights is None:
    return loss_mask, common
  in_term = weights != 0
  mask = in_term if name == "ce" else loss_mask & in_term
  if denominators is None and common["denominator"] is not None:
    raise ValueError(
      f"component_denominators: expected the tokens of each term in the whole batch, since "
      f"{name}_weights and denominator are given, got None"
    )
  common["num_sequences"] = None  # of the batch, not of the term: sequence_mean has to refuse
  common["aggregate"] = functools.partial(_weighted, common["aggregate"], weights)
  return mask, common


def _weighted(
  aggregate: aggregation.Aggregate,
  weights: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  **common: Any,
) -> jax.Array:
  return aggregate(
    values * aggregation.masked(jax.lax.stop_gradient(weights), mask), mask, **common
  )


def _is_zero(coefficient: Any) -> bool:
  return not isinstance(coefficient, jax.Array) and coefficient == 0
