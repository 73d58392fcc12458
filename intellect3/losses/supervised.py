"""The loss of supervised fine-tuning.

Place in the ring: the warm-up before it; the same train step calls it on demonstrations. In
`components` it is the cross-entropy term.
"""

import jax

from intellect3.losses import aggregation, checks


def negative_log_likelihood(
  logprobs: jax.Array,
  loss_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  aggregate: aggregation.Aggregate = aggregation.token_mean,
  axis_name: aggregation.AxisName | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean negative log-likelihood of the masked tokens.

    loss = aggregate(- logprobs_t)

  Args:
    logprobs: floating [B, T], the trainer's, in nats.
    loss_mask: bool [B, T]. What `logprobs` holds where it is False never matters, be it NaN.
    segment_ids, denominator, num_sequences, aggregate, axis_name: as in the policy-gradient losses,
      see `policy_gradient.terms.prepare`.

  Returns:
    The loss, scalar, and metrics: `negative_log_likelihood`, the mean over the masked tokens in
    nats (the loss itself under the default aggregation).

  Raises:
    ValueError: wrong rank, shapes or dtypes.
  """
  checks.tokens(loss_mask, logprobs=logprobs)
  checks.function("aggregate", aggregate, "of losses.aggregation")
  trained, mask = aggregation.without_padding(logprobs, loss_mask, segment_ids)
  count = aggregation.token_count(mask, denominator, axis_name)
  nats = -trained
  loss = aggregate(
    nats,
    mask,
    segment_ids=segment_ids,
    denominator=denominator,
    num_sequences=num_sequences,
    axis_name=axis_name,
  )
  checks.scalar("aggregate", loss)
  mean = aggregation.token_mean(
    jax.lax.stop_gradient(nats), mask, denominator=count, axis_name=axis_name
  )
  return loss, {"negative_log_likelihood": mean}
