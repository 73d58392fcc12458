"""Sums over the trajectories that are packed into rows.

Place in the ring: what is one number per trajectory (the geometric mean of its ratios, its length,
its smallest ratio) is made here and stands at every token of it.

A segment is the set of tokens of a row that share a segment id; ids lie in [0, T], 0 is padding
(itself a segment here), and their order in the row does not matter. An id outside gives NaN at its
tokens. A trajectory is never split over rows, so nothing here crosses shards as long as rows are
whole; a row of T tokens that is itself split over devices by hand cannot be summed here.

Sums over segments are a scatter and a gather, which cost more per token than all else in a loss.
Rows hold few trajectories beside their tokens, so blocks of tokens that lie in one segment are
taken as one; where a batch holds too many that do not, every token is taken by itself.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.losses import checks

BLOCKS = (64, 16)
"""Tokens that are taken as one where they lie in one segment: the most that a batch allows."""

MIXED = 8
"""One block in so many of a row may lie in several segments. A row of 65,536 tokens may hold 128
trajectories, or 512 with the smaller blocks, at that speed."""


def segment_sum(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Sum of the masked values over each token's own segment, at every token of it.

  Args:
    values: floating [B, T]; what stands where the mask is False never matters.
    mask: bool [B, T], the values that take part.
    segment_ids: integer [B, T], each in [0, T]; None means one segment a row.

  Returns:
    floating [B, T], float32 or wider; 0 in a segment without a masked value.

  Raises:
    ValueError: where shapes differ or the ids are not integers.
  """
  return _at_tokens(_sums(values, mask, segment_ids), values, segment_ids)


def segment_min(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Minimum of the masked values over each token's own segment, at every token of it.

  Args, Raises: as in `segment_sum`.

  Returns:
    [B, T] in the dtype of the values; +inf in a segment without a masked value.
  """
  table = _tabulate(values, mask, segment_ids, jnp.min, jax.ops.segment_min, jnp.inf)
  return _at_tokens(table, values, segment_ids)


def segment_mean(
  values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Mean of the masked values over each token's own segment, at every token of it.

  Args, Raises: as in `segment_sum`.

  Returns:
    floating [B, T], float32 or wider; 0 in a segment without a masked value.
  """
  means = _sums(values, mask, segment_ids) / jnp.maximum(_counts(mask, segment_ids), 1)
  return _at_tokens(means, values, segment_ids)


def segment_count(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Masked tokens of each token's own segment: float32 [B, T] (exact to 2^24 tokens)."""
  return _at_tokens(_counts(mask, segment_ids), mask, segment_ids)


def _sums(values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return _tabulate(wide, mask, segment_ids, jnp.sum, jax.ops.segment_sum, 0)


def _counts(mask: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  ones = jnp.ones(jnp.shape(mask), jnp.float32)
  return _tabulate(ones, mask, segment_ids, jnp.sum, jax.ops.segment_sum, 0)


class _Blocks(NamedTuple):
  """A row's tokens, K at a time.

  Attributes:
    numbers_BNK: unsigned, the ids.
    uniform_BN: bool, the blocks that lie in one segment.
    mixed_BM: int32, the first M of the others; N where there are fewer.
    fit: bool, whether there are no more than M in any row.
  """

  numbers_BNK: jax.Array
  uniform_BN: jax.Array
  mixed_BM: jax.Array
  fit: jax.Array


def numbers(segment_ids: jax.Array) -> jax.Array:
  """The ids, unsigned: one outside [0, T], a negative one too, lies behind every table."""
  checks.integers("segment_ids", segment_ids)
  if segment_ids.dtype.itemsize < 8:
    return segment_ids.astype(jnp.uint32)
  # In NumPy where they come from it: without 64 bits jax would cut them off first.
  xp = np if isinstance(segment_ids, np.ndarray) else jnp
  return xp.minimum(segment_ids.astype(xp.uint64), xp.uint64(2**32 - 1)).astype(xp.uint32)


def _blocks(numbers_BT: jax.Array, size: int) -> _Blocks:
  numbers_BNK = numbers_BT.reshape(len(numbers_BT), -1, size)
  uniform_BN = jnp.all(numbers_BNK == numbers_BNK[:, :, :1], axis=2)
  nowhere = uniform_BN.shape[1]
  most = nowhere // MIXED
  find = lambda uniform_N: jnp.nonzero(~uniform_N, size=most, fill_value=nowhere)[0]  # noqa: E731
  fit = jnp.all(jnp.sum(~uniform_BN, axis=1) <= most)
  return _Blocks(numbers_BNK, uniform_BN, jax.vmap(find)(uniform_BN), fit)


def _by_largest_blocks(
  numbers_BT: jax.Array,
  by_block: Callable[[_Blocks], jax.Array],
  by_token: Callable[[], jax.Array],
) -> jax.Array:
  """The way of the largest blocks of which no row has too many that lie in several segments."""
  way = by_token
  for size in sorted(BLOCKS):
    if numbers_BT.shape[1] >= size * MIXED:
      blocks = _blocks(numbers_BT, size)
      way = functools.partial(jax.lax.cond, blocks.fit, functools.partial(by_block, blocks), way)
  return way()


def _padded(array: jax.Array, fill: jax.typing.ArrayLike) -> jax.Array:
  """[B, T] made so long that it is whole blocks of every size."""
  rest = -array.shape[1] % max(BLOCKS)
  return jnp.pad(array, ((0, 0), (0, rest)), constant_values=fill) if rest else array


def _take(table: jax.Array, at: jax.Array, fill: jax.typing.ArrayLike) -> jax.Array:
  """Entries of each row's table, [B, ..]; `fill` where there is none."""
  return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=fill))(table, at)


def _tabulate(
  values: jax.Array,
  mask: jax.Array,
  segment_ids: jax.Array | None,
  over: Callable[..., jax.Array],
  over_segments: Callable[..., jax.Array],
  identity: float,
) -> jax.Array:
  """[B, T + 1], the reduction of each segment at its id; [B, 1] without ids."""
  checks.tokens(mask, values=values)
  if segment_ids is None:
    return over(jnp.where(mask, values, identity), axis=1, keepdims=True, initial=identity)
  checks.same_shape("segment_ids", segment_ids, values)
  rows, length = values.shape
  numbers_BT = _padded(numbers(segment_ids), length + 1)
  values, mask = _padded(values, identity), _padded(mask, False)
  scatter = jax.vmap(functools.partial(over_segments, num_segments=length + 1))

  # Masked inside of the ways, where it fuses with what they do.
  def by_token() -> jax.Array:
    return scatter(jnp.where(mask, values, identity), numbers_BT)

  def by_block(blocks: _Blocks) -> jax.Array:
    values_BNK = jnp.where(mask, values, identity).reshape(blocks.numbers_BNK.shape)
    whole_BN = jnp.where(blocks.uniform_BN, over(values_BNK, axis=2), identity)
    rest_BMK = _take(values_BNK, blocks.mixed_BM, identity)
    of_rest_BMK = _take(blocks.numbers_BNK, blocks.mixed_BM, length + 1)
    return scatter(
      jnp.concatenate([whole_BN, rest_BMK.reshape(rows, -1)], axis=1),
      jnp.concatenate([blocks.numbers_BNK[:, :, 0], of_rest_BMK.reshape(rows, -1)], axis=1),
    )

  return _by_largest_blocks(numbers_BT, by_block, by_token)


def _at_tokens(table: jax.Array, like: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """[B, T], each token's entry of what `_tabulate` made; NaN where its id is outside."""
  if segment_ids is None:
    return jnp.broadcast_to(table, like.shape)
  length = like.shape[1]
  numbers_BT = _padded(numbers(segment_ids), 0)

  def by_token() -> jax.Array:
    return _take(table, numbers_BT, jnp.nan)

  def by_block(blocks: _Blocks) -> jax.Array:
    whole_BN = _take(table, blocks.numbers_BNK[:, :, 0], jnp.nan)
    of_rest_BMK = _take(blocks.numbers_BNK, blocks.mixed_BM, 0)
    rest_BMK = _take(table, of_rest_BMK, jnp.nan)
    every_BNK = jnp.broadcast_to(whole_BN[:, :, None], blocks.numbers_BNK.shape)
    put = jax.vmap(lambda every, at, rest: every.at[at].set(rest, mode="drop"))
    return put(every_BNK, blocks.mixed_BM, rest_BMK).reshape(numbers_BT.shape)

  return _by_largest_blocks(numbers_BT, by_block, by_token)[:, :length]
