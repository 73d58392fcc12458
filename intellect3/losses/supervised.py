"""The loss of supervised fine-tuning.

Place in the ring: the warm-up before it; the same train step calls it on demonstrations.
"""

import jax

from intellect3.losses import aggregation


def negative_log_likelihood(
  logprobs: jax.Array,
  loss_mask: jax.Array,
  *,
  denominator: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean negative log-likelihood of the masked tokens.

    loss = - sum_t logprobs_t / denominator

  Args:
    logprobs: floating [B, T], the trainer's, in nats.
    loss_mask: bool [B, T]. What `logprobs` holds where it is False never matters, be it NaN.
    denominator: scalar, the masked tokens of the whole batch; None takes this call's own.

  Returns:
    The loss, scalar, and metrics: `negative_log_likelihood`, the same number.

  Raises:
    ValueError: where the logprobs are not floating or the mask is not bool.
  """
  aggregation.check_tokens(loss_mask, logprobs=logprobs)
  count = aggregation.token_count(loss_mask, denominator)
  loss = -aggregation.masked_mean(logprobs, loss_mask, count)
  return loss, {"negative_log_likelihood": jax.lax.stop_gradient(loss)}
