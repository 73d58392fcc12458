"""What every policy-gradient loss starts from and ends with.

A loss is a rule for one token's term; checking, masking, widening, counting and the metrics are the
same for all and stand here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from intellect3.losses import aggregation, checks, importance

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Terms:
  """A batch, checked, with zeros wherever no loss is taken.

  Attributes:
    logprobs: float32 [B, T] (float64 if the input is), differentiable.
    inference_logprobs: float32 [B, T], constant.
    log_ratios: float32 [B, T], `logprobs - inference_logprobs`, differentiable.
    advantages: float32 [B, T], constant.
    mask: bool [B, T], the loss mask without padding.
    segment_ids: integer [B, T], or None.
    count: scalar, what metrics are divided by.
    aggregate, denominator, num_sequences, axis_name: as given to the loss.
  """

  logprobs: jax.Array
  inference_logprobs: jax.Array
  log_ratios: jax.Array
  advantages: jax.Array
  mask: jax.Array
  segment_ids: jax.Array | None
  count: jax.Array
  aggregate: aggregation.Aggregate
  denominator: jax.typing.ArrayLike | None
  num_sequences: jax.typing.ArrayLike | None
  axis_name: aggregation.AxisName | None

  def total(self, values: jax.Array) -> jax.Array:
    """The loss of per-token values, by the aggregation that the caller chose."""
    loss = self.aggregate(
      values,
      self.mask,
      segment_ids=self.segment_ids,
      denominator=self.denominator,
      num_sequences=self.num_sequences,
      axis_name=self.axis_name,
    )
    checks.scalar("aggregate", loss)
    return loss

  def mean(self, values: jax.Array) -> jax.Array:
    """A metric: the mean of per-token values over the batch's loss-masked tokens."""
    wide = jax.lax.stop_gradient(values.astype(jnp.promote_types(values.dtype, jnp.float32)))
    return aggregation.token_mean(wide, self.mask, denominator=self.count, axis_name=self.axis_name)

  def constant(self, name: str, logprobs: jax.Array | None) -> jax.Array | None:
    """Further logprobs (`old_logprobs`, `ref_logprobs`): checked, masked, without gradient."""
    if logprobs is None:
      return None
    checks.tokens(self.mask, **{name: logprobs})
    return aggregation.masked(jax.lax.stop_gradient(logprobs), self.mask)

  def metrics(
    self, masked: jax.Array | None = None, sequence_masked: jax.Array | None = None
  ) -> Metrics:
    """What every loss says of the batch.

    Args:
      masked: bool [B, T], tokens whose gradient the loss removes one by one; None: it removes none.
      sequence_masked: bool [B, T], tokens of trajectories that it removes whole.

    Returns:
      Scalars without gradient, sums over loss-masked tokens divided by the global count:
      `importance_ratio`, `importance_ratio_squared` (the first squared over the second is the
      effective sample share), `mismatch_kl` (nats), `masked_share`, `sequence_masked_share`.
    """
    log_ratios = jax.lax.stop_gradient(self.log_ratios)
    ratios = importance.ratio(log_ratios)
    nothing = jnp.zeros((), jnp.float32)
    return {
      "importance_ratio": self.mean(ratios),
      "importance_ratio_squared": self.mean(jnp.square(ratios)),
      "mismatch_kl": self.mean(importance.mismatch_kl(log_ratios)),
      "masked_share": nothing if masked is None else self.mean(masked),
      "sequence_masked_share": nothing if sequence_masked is None else self.mean(sequence_masked),
    }


def prepare(
  logprobs: jax.Array,
  inference_logprobs: jax.Array,
  advantages: jax.Array,
  loss_mask: jax.Array,
  segment_ids: jax.Array | None,
  denominator: jax.typing.ArrayLike | None,
  num_sequences: jax.typing.ArrayLike | None,
  aggregate: aggregation.Aggregate,
  axis_name: aggregation.AxisName | None,
) -> Terms:
  """Checks and masks what the losses share; the meaning of their common arguments.

  Args:
    logprobs: floating [B, T], the trainer's, in nats, at the sampling temperature; the only
      argument that gets a gradient. bfloat16 is widened to float32.
    inference_logprobs: floating [B, T], the behaviour policy's, as the server recorded them.
    advantages: floating [B, T], the advantage of each token (that of its rollout, as a rule).
    loss_mask: bool [B, T], the tokens trained on. What the arrays hold where it is False never
      matters, be it NaN. A NaN where it is True is not dropped: it makes the loss NaN. Infinite
      logprobs there are as wrong, but show as NaN or inf in some losses only.
    segment_ids: integer [B, T], the trajectory of each token within its row, in [0, T] and in any
      order, 0 for padding, which is never trained on; None means one trajectory a row. An id
      outside [0, T] makes the loss NaN.
    denominator: scalar, the loss-masked tokens of the whole batch over all micro-batches and
      shards; None takes this call's own. Loss and metrics are divided by it and simply add up; 0 is
      taken for 1.
    num_sequences: scalar, the trajectories with a loss-masked token in the whole batch; only
      `aggregation.sequence_mean` reads it.
    aggregate: how tokens become the loss: of `aggregation`. Metrics are always token means.
    axis_name: mesh axes over which rows are split inside `shard_map`. Needed where no denominator
      is given; with one, leaving it out gives this shard's share, and shares add up. A gradient
      taken inside a `vmap` with an axis name, or a `shard_map` with `check_vma=False`, has to do
      without it: see `aggregation.token_mean`.

  Returns:
    The terms.

  Raises:
    ValueError: wrong rank, shapes or dtypes; inside `shard_map` neither `denominator` nor
      `axis_name`; `sequence_mean` with a denominator and without `num_sequences`.
  """
  checks.tokens(
    loss_mask, logprobs=logprobs, inference_logprobs=inference_logprobs, advantages=advantages
  )
  checks.function("aggregate", aggregate, "of losses.aggregation")
  trainer, mask = aggregation.without_padding(logprobs, loss_mask, segment_ids)
  behaviour = aggregation.masked(jax.lax.stop_gradient(inference_logprobs), mask)
  return Terms(
    logprobs=trainer,
    inference_logprobs=behaviour,
    log_ratios=trainer - behaviour,
    advantages=aggregation.masked(jax.lax.stop_gradient(advantages), mask),
    mask=mask,
    segment_ids=segment_ids,
    count=aggregation.token_count(mask, denominator, axis_name),
    aggregate=aggregate,
    denominator=denominator,
    num_sequences=num_sequences,
    axis_name=axis_name,
  )
