"""One trip of a buffer's rows between the devices of a group.

Place in the ring: under `experts`.
"""

import jax
import jax.numpy as jnp

from intellect3.kernels.expert_parallel.rounds import Round


def there(rows_MX: jax.Array, turn: Round, *, axis_name: str, ragged: bool) -> jax.Array:
  """Sends rows from where they are routed to where their experts are.

  Args:
    rows_MX: [M, ...], the sending buffer.
    turn: the round.
    axis_name: the mesh axis of the group.
    ragged: whether rows lie side by side, else in equal slots.

  Returns:
    [M, ...], the receiving buffer; rows that nobody sent hold anything.
  """
  return _trip(rows_MX, turn.sizes_SR, turn.sent_SR, turn.received_SR, axis_name, ragged)


def back(rows_MX: jax.Array, turn: Round, *, axis_name: str, ragged: bool) -> jax.Array:
  """Sends rows back into the places of the sending buffer that they came from."""
  sizes_RS, sent_RS, received_RS = turn.sizes_SR.T, turn.received_SR.T, turn.sent_SR.T
  return _trip(rows_MX, sizes_RS, sent_RS, received_RS, axis_name, ragged)


def _trip(
  rows_MX: jax.Array,
  sizes_SR: jax.Array,
  sent_SR: jax.Array,
  received_SR: jax.Array,
  axis_name: str,
  ragged: bool,
) -> jax.Array:
  if sizes_SR.shape[0] == 1:
    return rows_MX
  if not ragged:
    return jax.lax.all_to_all(rows_MX, axis_name, split_axis=0, concat_axis=0, tiled=True)
  me = jax.lax.axis_index(axis_name)
  return jax.lax.ragged_all_to_all(
    rows_MX,
    jnp.zeros_like(rows_MX),
    input_offsets=sent_SR[me],
    send_sizes=sizes_SR[me],
    output_offsets=received_SR[me],
    recv_sizes=sizes_SR[:, me],
    axis_name=axis_name,
  )
