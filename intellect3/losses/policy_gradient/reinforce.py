"""REINFORCE: the gradient estimator that all others correct."""

import jax

from intellect3.losses import aggregation
from intellect3.losses.policy_gradient import terms


def reinforce_loss(
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
) -> tuple[jax.Array, terms.Metrics]:
  """REINFORCE, without any correction for the behaviour policy.

    loss = aggregate(- A_t logprobs_t)

  Williams, 1992. Right on-policy; with stale or numerically different rollouts it is biased, and
  the metrics say by how much. The baseline is in the advantages.

  Args:
    The common arguments: see `terms.prepare`.

  Returns:
    The loss, scalar, and metrics, see `Terms.metrics`; nothing is ever dropped.

  Raises:
    ValueError: see `terms.prepare`.
  """
  batch = terms.prepare(
    logprobs, inference_logprobs, advantages, loss_mask, segment_ids, denominator, num_sequences,
    aggregate, axis_name,
  )  # fmt: skip
  return batch.total(-batch.advantages * batch.logprobs), batch.metrics()
