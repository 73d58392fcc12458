"""Attention over rows that the devices of a mesh axis share: context parallelism.

Place in the ring: inside the model's `shard_map`, over the axis `context` of c devices. A row of T
tokens is cut into 2c equal blocks and rank i has the blocks i and 2c - 1 - i: under a causal mask
an early block sees little and a late one much, and each such pair sees the same. Keys and values
are gathered over the axis (grouped queries keep them small), so every rank attends with its queries
over whole rows, with any implementation; the gradients of keys and values are summed back to their
owners. Llama 3 (arXiv 2407.21783, section 3.3.2) divides rows so; there is no ring.

Everything is called inside `shard_map(..., check_vma=False)`. On an axis of one device nothing is
sent and nothing moves.
"""

import chex
import jax
import jax.numpy as jnp

from intellect3.kernels.attention.interface import attention

PIECES = 2
"""Contiguous pieces of a row that a rank has, in a context of several."""


def piece_starts(length: int, axis_name: str) -> jax.Array:
  """Where this rank's pieces of a row begin.

  Args:
    length: T, tokens of a whole row.
    axis_name: mesh axis of c devices.

  Returns:
    int32 [2], rising; [1], zero, where c = 1.

  Raises:
    ValueError: for a row that 2c does not divide.
  """
  count = jax.lax.axis_size(axis_name)
  if count == 1:
    return jnp.zeros(1, jnp.int32)
  rank = jax.lax.axis_index(axis_name)
  first_and_last = jnp.stack([rank, 2 * count - 1 - rank])
  return (first_and_last * _block(length, count, axis_name)).astype(jnp.int32)


def local_part(x_BT: jax.Array, axis_name: str) -> jax.Array:
  """This rank's tokens of whole rows.

  Its transpose puts a cotangent at these tokens and zeros at all others.

  Args:
    x_BT: any dtype, [B, T, ...], the same on all ranks.
    axis_name: mesh axis of c devices.

  Returns:
    [B, T / c, ...]: the rank's two blocks, the earlier one first.

  Raises:
    ValueError: for a row that 2c does not divide.
  """
  count = jax.lax.axis_size(axis_name)
  if count == 1:
    return x_BT
  length = x_BT.shape[1]
  starts = piece_starts(length, axis_name)
  size = _block(length, count, axis_name)
  pieces = [jax.lax.dynamic_slice_in_dim(x_BT, start, size, axis=1) for start in starts]
  return jnp.concatenate(pieces, axis=1)


def whole(x_Bt: jax.Array, axis_name: str) -> jax.Array:
  """Whole rows from every rank's part, in natural order: the inverse of `local_part`.

  Travels in the dtype it has. Its transpose sums what the ranks' cotangents say of a token, in that
  dtype too, and leaves it with the token's owner (a reduce-scatter).

  Args:
    x_Bt: [B, T / c, ...], laid out as `local_part` gives it.
    axis_name: mesh axis of c devices.

  Returns:
    [B, T, ...], the same on all ranks.

  Raises:
    ValueError: for a part that is not two blocks.
  """
  count = jax.lax.axis_size(axis_name)
  if count == 1:
    return x_Bt
  batch, part, *rest = x_Bt.shape
  size = _block(part * count, count, axis_name)
  parts = jax.lax.all_gather(x_Bt, axis_name).reshape(count, batch, PIECES, size, *rest)
  # The first pieces rise with the rank, the second ones fall.
  blocks = jnp.concatenate([parts[:, :, 0], parts[::-1, :, 1]])
  return jnp.moveaxis(blocks, 0, 1).reshape(batch, part * count, *rest)


def context_attention(
  q_BtNH: jax.Array,
  k_BtKH: jax.Array,
  v_BtKH: jax.Array,
  *,
  positions_BS: jax.Array,
  segment_ids_BS: jax.Array,
  scale: float,
  implementation: str,
  axis_name: str,
) -> jax.Array:
  """`kernels.attention.attention` of packed rows whose tokens lie over an axis.

  Args:
    q_BtNH: floating [B, T / c, N, H], this rank's part of the rows.
    k_BtKH: floating [B, T / c, K, H], the same tokens.
    v_BtKH: floating [B, T / c, K, H].
    positions_BS: integer [B, T], of whole rows: the position of each token within its segment.
    segment_ids_BS: integer [B, T]; 0 is padding.
    scale: factor of the scores.
    implementation: as for `attention`.
    axis_name: mesh axis of c devices.

  Returns:
    [B, T / c, N, H] in the dtype of the values: this rank's part of the result. Keys and values
    travel in their own dtype, their gradients as well.

  Raises:
    ValueError: for rows that 2c does not divide, and what `attention` raises.
  """
  count = jax.lax.axis_size(axis_name)
  length = positions_BS.shape[1]
  starts = piece_starts(length, axis_name)
  part = (q_BtNH.shape[0], length // count)
  chex.assert_shape([q_BtNH, k_BtKH, v_BtKH], (*part, None, None))
  chex.assert_shape([positions_BS, segment_ids_BS], (part[0], length))
  ids = {"kv_positions_BS": positions_BS, "kv_segment_ids_BS": segment_ids_BS}
  return attention(
    q_BtNH,
    whole(k_BtKH, axis_name),
    whole(v_BtKH, axis_name),
    q_positions_BT=local_part(positions_BS, axis_name),
    q_segment_ids_BT=local_part(segment_ids_BS, axis_name),
    **ids,
    scale=scale,
    implementation=implementation,
    q_starts=None if count == 1 else starts,
  )


def _block(length: int, count: int, axis_name: str) -> int:
  if length % (PIECES * count):
    raise ValueError(
      f"row_length: expected a multiple of {PIECES * count} (two blocks for each of the {count} "
      f"devices of {axis_name}), got {length}"
    )
  return length // (PIECES * count)
