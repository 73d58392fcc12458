"""Packed rows cut into blocks: how they lie in memory, and which can see each other.

Place in the ring: under `blockwise`, which computes only the blocks named here. Any layout of
segments gives right spans; only packed rows (segments one after the other, positions rising) give
short ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_FIRST, _LAST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def block_size(length: int, most: int) -> int:
  """The smallest multiple of 8 that covers a length in as few blocks as `most` tokens allow."""
  number = -(-length // most)
  return -(-length // (8 * number)) * 8


class Layout(NamedTuple):
  """Arrays in blocks of tokens, [X, I, lanes, ...]: X and I are looped over, lanes are not.

  Serial: X counts rows and kv heads, B * K, and there are no lanes. Else X = 1 and the lanes are
  [B, K], apart, so that a mesh may split both.

  Attributes:
    serial: whether rows and kv heads are looped over.
    rows: B.
    kv_heads: K.
  """

  serial: bool
  rows: int
  kv_heads: int

  def heads(self, x_BTKGH: jax.Array, size: int) -> jax.Array:
    """Cuts [B, T, K, G, H] into blocks [X, I, lanes, G, size, H], padded with zeros."""
    kv_heads, groups, width = x_BTKGH.shape[2:]
    x = _pad(x_BTKGH, size).reshape(self.rows, -1, size, kv_heads, groups, width)
    if self.serial:
      return x.transpose(0, 3, 1, 4, 2, 5).reshape(self.rows * kv_heads, -1, groups, size, width)
    return x.transpose(1, 0, 3, 4, 2, 5)[None]

  def back(self, x: jax.Array, length: int) -> jax.Array:
    """The inverse of `heads`: [B, length, K, G, H]."""
    if self.serial:
      x = x.reshape(self.rows, self.kv_heads, *x.shape[1:]).transpose(0, 2, 4, 1, 3, 5)
    else:
      x = x[0].transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(self.rows, -1, *x.shape[3:])[:, :length]

  def tokens(self, ids_BT: jax.Array, size: int) -> jax.Array:
    """Cuts [B, T], the same for all heads, into [X, I, lanes, size]; the lanes are [B, 1]."""
    ids_BIt = _blocks(ids_BT, size)
    if self.serial:
      return jnp.repeat(ids_BIt, self.kv_heads, axis=0)
    return ids_BIt.swapaxes(0, 1)[None, :, :, None]

  def spans(self, visible_BIJ: jax.Array) -> jax.Array:
    """First and one past the last visible block of the last axis: int32 [X, I, 2].

    The first is not below the last where nothing is visible.
    """
    if self.serial:
      visible_XIJ = jnp.repeat(visible_BIJ, self.kv_heads, axis=0)
    else:
      visible_XIJ = jnp.any(visible_BIJ, axis=0, keepdims=True)
    number = visible_XIJ.shape[-1]
    index_J = jnp.arange(number, dtype=jnp.int32)
    first_XI = jnp.min(jnp.where(visible_XIJ, index_J, number), axis=-1)
    last_XI = jnp.max(jnp.where(visible_XIJ, index_J + 1, 0), axis=-1)
    return jnp.stack([first_XI, last_XI], axis=-1)


def _pad(x: jax.Array, size: int) -> jax.Array:
  missing = -x.shape[1] % size
  return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def visible(
  q_segment_ids_BT: jax.Array,
  q_positions_BT: jax.Array,
  kv_segment_ids_BS: jax.Array,
  kv_positions_BS: jax.Array,
  *,
  q_block: int,
  kv_block: int,
) -> jax.Array:
  """The pairs of blocks that may hold a visible pair of tokens.

  Tokens are compared as pairs (segment, position), in that order. Two blocks are left out where
  all queries come before all keys, where all queries' segments come after the keys', or where
  either block is all padding.

  Args:
    q_segment_ids_BT: int32, 0 is padding.
    q_positions_BT: int32.
    kv_segment_ids_BS: int32.
    kv_positions_BS: int32.
    q_block: queries of a block.
    kv_block: keys of a block.

  Returns:
    bool [B, ceil(T / q_block), ceil(S / kv_block)].
  """
  q_segments_BIt, q_positions_BIt = (
    _blocks(x, q_block) for x in (q_segment_ids_BT, q_positions_BT)
  )
  kv_segments_BJs, kv_positions_BJs = (
    _blocks(x, kv_block) for x in (kv_segment_ids_BS, kv_positions_BS)
  )
  # An empty block's ends are crossed (first after last), which no comparison lets through.
  q_first_BI = jnp.min(jnp.where(q_segments_BIt == 0, _LAST, q_segments_BIt), axis=-1)
  q_last_BI = jnp.max(jnp.where(q_segments_BIt == 0, _FIRST, q_segments_BIt), axis=-1)
  kv_first_BJ = jnp.min(jnp.where(kv_segments_BJs == 0, _LAST, kv_segments_BJs), axis=-1)
  kv_last_BJ = jnp.max(jnp.where(kv_segments_BJs == 0, _FIRST, kv_segments_BJs), axis=-1)
  q_end_BI = jnp.max(
    jnp.where(q_segments_BIt == q_last_BI[..., None], q_positions_BIt, _FIRST), axis=-1
  )
  kv_start_BJ = jnp.min(
    jnp.where(kv_segments_BJs == kv_first_BJ[..., None], kv_positions_BJs, _LAST), axis=-1
  )
  q_last_BI1, kv_first_B1J = q_last_BI[:, :, None], kv_first_BJ[:, None]
  at_or_after_BIJ = (q_last_BI1 > kv_first_B1J) | (
    (q_last_BI1 == kv_first_B1J) & (q_end_BI[:, :, None] >= kv_start_BJ[:, None])
  )
  return at_or_after_BIJ & (q_first_BI[:, :, None] <= kv_last_BJ[:, None])


def _blocks(ids_BT: jax.Array, size: int) -> jax.Array:
  return _pad(ids_BT, size).reshape(ids_BT.shape[0], -1, size)
