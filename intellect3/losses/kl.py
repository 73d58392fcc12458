"""The divergence from a reference policy: estimators, a penalty, and a policy-gradient signal.

Place in the ring: terms of the loss in which `ref_logprobs`, those of a frozen reference or of a
teacher, meet the trainer's. The divergence between trainer and behaviour policy is
`importance.mismatch_kl`.

The estimators take d = logprobs - ref_logprobs of tokens that the policy sampled and estimate the
reverse KL(policy || reference) per token, in nats (http://joschu.net/blog/kl-approx.html):

    k1(d) = d                unbiased, of high variance, may be negative
    k2(d) = d^2 / 2          biased, of low variance, >= 0
    k3(d) = exp(-d) - 1 + d  unbiased where the policies' supports agree, >= 0
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance
from intellect3.losses.policy_gradient import terms


def k1(log_ratios: jax.Array) -> jax.Array:
  """`d`: unbiased; as a differentiated penalty its gradient is zero in expectation."""
  return log_ratios


def k2(log_ratios: jax.Array) -> jax.Array:
  """`d^2 / 2`: biased as a value; on-policy its gradient is that of the reverse KL."""
  return jnp.square(log_ratios) / 2


def k3(log_ratios: jax.Array) -> jax.Array:
  """`exp(-d) - 1 + d`: unbiased and non-negative as a value.

  As a differentiated penalty (GRPO, arXiv 2402.03300) its gradient on-policy is that of the forward
  KL(reference || policy). `exp(-d)` is at most e^20.
  """
  return importance.mismatch_kl(-log_ratios)


def reverse_kl_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  ref_logprobs: jax.Array,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate: aggregation.Aggregate = aggregation.token_mean,
  axis_name: aggregation.AxisName | None = None,
  ratio_max: float = 2.0,
) -> tuple[jax.Array, terms.Metrics]:
  """Reverse KL to a reference as a policy-gradient signal: on-policy distillation.

    w_t  = sg(min(exp(logprobs_t - inference_logprobs_t), ratio_max))
    loss = aggregate(- w_t sg(ref_logprobs_t - logprobs_t) logprobs_t)

  Each token's advantage is how much likelier the teacher finds it: the policy-gradient estimator of
  -KL(policy || reference) of each token given its prefix (on-policy distillation, arXiv 2306.13649
  and Thinking Machines, 2025; prime-rl's `opd`). Deviation: the effect of a token on the KL of
  later ones is left out (a discount of 0), and stale tokens are weighted as in
  `policy_gradient.truncated_importance_loss`.

  Args:
    advantages: not read but for its shape; of the common signature.
    ref_logprobs: floating [B, T], of the reference for the same tokens and temperature; constant.
    ratio_max: largest weight of a token, above 0.
    The common arguments: see `policy_gradient.terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`, and `reverse_kl` (k1 of the sampled tokens,
    nats per token) and `truncated_share`.

  Raises:
    ValueError: no `ref_logprobs`, `ratio_max` not above 0, or see `terms.prepare`.
  """
  checks.at_least("ratio_max", ratio_max, 0.0, above=True)
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  log_ratios = _to_reference(batch, ref_logprobs)
  signal = jax.lax.stop_gradient(-log_ratios)
  ratios = importance.ratio(jax.lax.stop_gradient(batch.log_ratios))
  loss = batch.total(-jnp.minimum(ratios, ratio_max) * signal * batch.logprobs)
  return loss, {
    **batch.metrics(),
    "reverse_kl": batch.mean(k1(log_ratios)),
    "truncated_share": batch.mean(ratios > ratio_max),
  }


def penalty_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  ref_logprobs: jax.Array,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate: aggregation.Aggregate = aggregation.token_mean,
  axis_name: aggregation.AxisName | None = None,
  estimator: Callable[[jax.Array], jax.Array] = k3,
) -> tuple[jax.Array, terms.Metrics]:
  """An estimator of the KL to a reference, differentiated as it stands.

    loss = aggregate(estimator(logprobs_t - ref_logprobs_t))

  The KL term of GRPO, arXiv 2402.03300, equation 4, with k3. What the gradient of each estimator is
  of, its own docstring says. No importance weight: stale tokens count as they are.

  Args:
    advantages: not read but for its shape; of the common signature.
    ref_logprobs: floating [B, T], of the reference for the same tokens and temperature; constant.
    estimator: `k1`, `k2` or `k3`, of log ratios [B, T].
    The common arguments: see `policy_gradient.terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`, and `reverse_kl` (the estimator's value in
    nats per token).

  Raises:
    ValueError: no `ref_logprobs`, or see `terms.prepare`.
  """
  checks.function("estimator", estimator, "kl.k1, k2 or k3")
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  divergence = estimator(_to_reference(batch, ref_logprobs))
  return batch.total(divergence), {**batch.metrics(), "reverse_kl": batch.mean(divergence)}


def _to_reference(batch: terms.Terms, ref_logprobs: jax.Array | None) -> jax.Array:
  reference = batch.constant("ref_logprobs", ref_logprobs)
  if reference is None:
    raise ValueError("ref_logprobs: expected the reference's logprobs [B, T], got None")
  return batch.logprobs - reference
