"""The corrections that the lab compares, by name.

Place in the ring: in the lab. All but the reference are `intellect3.losses.policy_gradient`'s own
functions with their default hyperparameters, unless the name says otherwise. To compare another
one, add it here or pass it: the lab takes any function of the losses' signature.
"""

import functools

import jax
import jax.numpy as jnp

from intellect3.lab import training
from intellect3.losses import aggregation, importance, policy_gradient, segments


def trajectory_importance_loss(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate=aggregation.token_mean,
  axis_name=None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """REINFORCE weighted by the ratio of the whole trajectory: the reference without bias.

    loss = - sum_t sg(prod_u r_u) A_t logprobs_t / denominator, u over the trajectory's tokens

  Its expectation under any behaviour policy with full support is the policy gradient. It is no
  candidate: the variance of the product grows exponentially in the length.

  Args, Returns, Raises: as in `policy_gradient.reinforce_loss`, whose metrics it returns.
  """
  log_ratios = importance.log_ratio(jax.lax.stop_gradient(logprobs), inference_logprobs, loss_mask)
  weights = jnp.exp(segments.segment_sum(log_ratios, loss_mask, segment_ids))
  return policy_gradient.reinforce_loss(
    logprobs,
    inference_logprobs,
    weights * advantages,
    loss_mask,
    segment_ids=segment_ids,
    denominator=denominator,
    num_sequences=num_sequences,
    aggregate=aggregate,
    axis_name=axis_name,
  )


REFERENCE = "trajectory ratio (reference)"
ALL: dict[str, training.LossFn] = {
  "reinforce": policy_gradient.reinforce_loss,
  "masked_importance": policy_gradient.masked_importance_loss,
  "truncated_importance": policy_gradient.truncated_importance_loss,
  "cispo": policy_gradient.cispo_loss,
  "geometric_masked": policy_gradient.geometric_masked_loss,
  "clipped": policy_gradient.clipped_loss,
  "probability_difference": policy_gradient.probability_difference_loss,
  "sequence_ratio": policy_gradient.sequence_ratio_loss,
  "sequence_ratio, clip 0.2": functools.partial(
    policy_gradient.sequence_ratio_loss, clip_low=0.2, clip_high=0.2
  ),
  REFERENCE: trajectory_importance_loss,
}
