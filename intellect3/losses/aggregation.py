"""From per-token losses to one number: which tokens count how much.

Place in the ring: the last line of every loss, inside the train step. Each aggregation is a sum
over tokens divided by a global count that the caller knows, so micro-batches, shards and packing
orders of one batch add up to the same number (contract 5). All have one signature:

    aggregate(values, mask, *, segment_ids=None, denominator=None, num_sequences=None,
              axis_name=None) -> scalar

- `token_mean`: every loss-masked token of the batch counts alike (INTELLECT-3, DAPO).
- `sequence_mean`: every trajectory counts alike, whatever its length (GRPO, GSPO).
- `constant`: a sum over a constant (Dr. GRPO).
"""

from collections.abc import Hashable
from typing import Protocol

import jax
import jax.numpy as jnp

from intellect3.losses import checks, segments

AxisName = Hashable | tuple[Hashable, ...]
"""A mesh axis, or several, over which the rows are split inside `shard_map`."""


class Aggregate(Protocol):
  """How the tokens of a batch become one number; see the module's docstring."""

  def __call__(
    self,
    values: jax.Array,
    mask: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    denominator: jax.typing.ArrayLike | None = None,
    num_sequences: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
  ) -> jax.Array:
    """Returns the scalar."""
    ...


def token_mean(
  values: jax.Array,
  mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  axis_name: AxisName | None = None,
) -> jax.Array:
  """`sum(values where mask) / denominator`: every token of the batch counts alike.

  INTELLECT-3, arXiv 2512.16144; DAPO, arXiv 2503.14476, equation 8.

  Args:
    values: floating [B, T]; what stands where the mask is False never matters.
    mask: bool [B, T].
    segment_ids: not read.
    denominator: scalar, the masked tokens of the whole batch; None counts those of this call, over
      `axis_name` too. 0 is taken for 1.
    num_sequences: not read.
    axis_name: mesh axes over which rows are split inside `shard_map`: sums cross them. With a
      denominator it may be left out; the results are then this shard's share of the sum. Leave it
      out, and give the denominator, where the gradient itself is taken inside a `shard_map` with
      `check_vma=False` or a `vmap` with an axis name: jax transposes the sum over shards to a sum
      there, and the gradient would be too large by their number.

  Returns:
    Scalar, float32 or wider.

  Raises:
    ValueError: inside `shard_map` neither `denominator` nor `axis_name` is given.
  """
  del segment_ids, num_sequences
  checks.tokens(mask, values=values)
  return total(masked(values, mask), axis_name) / token_count(mask, denominator, axis_name)


def sequence_mean(
  values: jax.Array,
  mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  axis_name: AxisName | None = None,
) -> jax.Array:
  """Mean over trajectories of the token mean in each: `1/N sum_i 1/n_i sum_t values_it`.

  GRPO, arXiv 2402.03300, equation 3; GSPO, arXiv 2507.18071. A token of a long trajectory counts
  less than one of a short trajectory (Dr. GRPO, arXiv 2503.20783, names the bias). n_i counts the
  masked tokens of trajectory i, N the trajectories with one.

  Args:
    values, mask: as in `token_mean`.
    segment_ids: integer [B, T], each in [0, T]; None means one trajectory a row.
    denominator: only tells that the batch may be split; see Raises.
    num_sequences: scalar, N of the whole batch; None counts those of this call, over `axis_name`
      too.
    axis_name: as in `token_mean`.

  Returns:
    Scalar, float32 or wider.

  Raises:
    ValueError: a denominator is given and `num_sequences` is not: the call may then see a part of
      the batch, whose trajectories it cannot count; or as in `token_mean`.
  """
  if num_sequences is None and denominator is not None:
    raise ValueError(
      "num_sequences: expected the trajectories of the whole batch where denominator is given "
      "(sequence_mean cannot count those of other micro-batches and shards), got None"
    )
  checks.tokens(mask, values=values)
  lengths = jnp.maximum(segments.segment_count(mask, segment_ids), 1)
  if num_sequences is None:
    require_axis(mask, axis_name)
    shares = masked(jnp.ones(mask.shape, values.dtype), mask) / lengths
    num_sequences = total(shares, axis_name)
  else:
    checks.count("num_sequences", num_sequences)
  return total(masked(values, mask) / lengths, axis_name) / _or_one(num_sequences)


def constant(
  values: jax.Array,
  mask: jax.Array,
  *,
  divisor: float,
  segment_ids: jax.Array | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  num_sequences: jax.typing.ArrayLike | None = None,
  axis_name: AxisName | None = None,
) -> jax.Array:
  """`sum(values where mask) / divisor`, a constant of the run.

  Dr. GRPO, arXiv 2503.20783: the divisor is rollouts per batch times the largest length, so that
  no gradient depends on how long the other rollouts are.

  Args:
    values, mask, axis_name: as in `token_mean`.
    divisor: above 0.
    segment_ids, denominator, num_sequences: not read.

  Returns:
    Scalar, float32 or wider.

  Raises:
    ValueError: the divisor is not above 0; or nothing but `axis_name` could tell that this call
      is of one shard, and it is not given.
  """
  del segment_ids, num_sequences
  checks.tokens(mask, values=values)
  checks.at_least("divisor", divisor, 0.0, above=True)
  if denominator is None:
    require_axis(mask, axis_name)
  return total(masked(values, mask), axis_name) / divisor


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
  """`values` in float32 or wider, with 0 where the mask is False, whatever stood there.

  Applied to the inputs of a loss it keeps NaN and inf of unmasked tokens out of values and
  gradients alike; applied to results alone it would only keep them out of the values.
  """
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return jnp.where(mask, wide, 0)


def without_padding(
  logprobs: jax.Array, loss_mask: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Logprobs `masked` by the loss mask without padding, and that mask.

  Padding (segment id 0) is never trained on. At a token whose segment id is outside [0, T] the
  logprob becomes NaN, so that a mistake is seen in whatever loss it enters.
  """
  if segment_ids is None:
    return masked(logprobs, loss_mask), loss_mask
  checks.segment_ids(segment_ids, loss_mask)
  mask = loss_mask & (segment_ids != 0)
  known = segments.numbers(segment_ids) <= loss_mask.shape[1]
  return masked(jnp.where(known, logprobs, jnp.nan), mask), mask


def total(values: jax.Array, axis_name: AxisName | None) -> jax.Array:
  """Sum over all tokens, and over the shards of `axis_name`."""
  local = jnp.sum(values)
  return local if axis_name is None else jax.lax.psum(local, axis_name)


def token_count(
  mask: jax.Array,
  denominator: jax.typing.ArrayLike | None = None,
  axis_name: AxisName | None = None,
) -> jax.Array:
  """The given denominator, or the number of masked tokens, over `axis_name` too; 1 for 0.

  So that a batch, or a term, without tokens comes to 0 and not to 0 / 0.
  """
  if denominator is None:
    require_axis(mask, axis_name)
    return _or_one(total(mask.astype(jnp.float32), axis_name))
  checks.count("denominator", denominator)
  return _or_one(denominator)


def _or_one(count: jax.typing.ArrayLike) -> jax.Array:
  return jnp.where(jnp.equal(count, 0), 1, count)


def require_axis(mask: jax.Array, axis_name: AxisName | None) -> None:
  """Raises where a count would be that of one shard and nobody said so.

  Raises:
    ValueError: inside `shard_map`, without the mesh axes over which the mask is split.
  """
  named = set(axis_name) if isinstance(axis_name, tuple) else {axis_name} - {None}
  split = _varying(mask) - named
  if not split and not named:  # under check_vma=False nothing says what is split
    split = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
  if split:
    raise ValueError(
      "axis_name: expected the mesh axes over which rows are split inside shard_map "
      f"({sorted(map(str, split))}), or the global denominator, got {axis_name!r}"
    )


def _varying(array: jax.Array) -> frozenset[Hashable]:
  """The manual mesh axes over which an array is split, as its type says."""
  kind = jax.typeof(array)
  if hasattr(kind, "vma"):
    return frozenset(kind.vma)
  return frozenset(getattr(getattr(kind, "manual_axis_type", None), "varying", ()))
