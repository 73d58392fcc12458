"""Who sends how many rows to whom in which round: integers, the same on all devices of a group.

Place in the ring: under `experts`. Let n[s, d] be the rows that device s has for device d, in the
order of d's experts. In round k of K each pair sends the k-th of K nearly equal parts of its rows,
so every link is used in every round; parts differ by one row at most, the larger ones come first.
Since parts are contiguous, a round's rows belong to few experts. Which expert a row is for follows
from the counts, so no ids travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def nominal(pairs: int, rows: int) -> int:
  """Rounds of `rows` that `pairs` rows need."""
  return max(1, -(-pairs // rows))


def needed(counts_SR: jax.Array, *, rows: int, ragged: bool) -> jax.Array:
  """The fewest rounds in which no device sends or receives more than fits.

  With slots of its own (not `ragged`), a pair of devices needs its rows over its slots. Where rows
  lie side by side, the sums of the parts must fit: the first of a few round counts from the fullest
  device's rows over the buffer's is taken. If none of them fits, one that is known to: n rows in R
  parts send at most n/K + R (K-1)/K in a round, so K >= (n - R) / (rows - R); or the slots' count.

  Args:
    counts_SR: int32 [R, R], the rows from source s to destination r.
    rows: a multiple of R.
    ragged: whether rows lie side by side.

  Returns:
    int32 [].
  """
  devices = counts_SR.shape[0]
  by_slot = ceil(jnp.max(counts_SR), rows // devices)
  if not ragged:
    return by_slot
  fullest = _fullest(counts_SR)
  enough = by_slot
  if rows > devices:
    by_sum = ceil(jnp.maximum(fullest - devices, 0), rows - devices)
    enough = jnp.minimum(by_slot, by_sum)
  tried_K = jnp.maximum(ceil(fullest, rows), 1) + jnp.arange(_TRIED, dtype=jnp.int32)
  fits_K = jax.vmap(lambda k: _fullest(ceil(counts_SR, k)) <= rows)(tried_K)
  return jnp.where(jnp.any(fits_K), tried_K[jnp.argmax(fits_K)], enough)


_TRIED = 32


def _fullest(counts_SR: jax.Array) -> jax.Array:
  """The most rows that a device sends or receives."""
  return jnp.maximum(jnp.max(jnp.sum(counts_SR, axis=0)), jnp.max(jnp.sum(counts_SR, axis=1)))


def ceil(a: jax.Array, b: jax.Array | int) -> jax.Array:
  """a / b, rounded up."""
  return (a + b - 1) // b


class Round(NamedTuple):
  """One round of the exchange, for sources S and destinations R.

  Attributes:
    firsts_SR: int32, how many of the pair's rows earlier rounds sent.
    sizes_SR: int32, the rows sent in this one.
    sent_SR: int32, where in s's buffer the rows for r begin.
    received_SR: int32, where in r's buffer the rows from s begin.
  """

  firsts_SR: jax.Array
  sizes_SR: jax.Array
  sent_SR: jax.Array
  received_SR: jax.Array


def make_round(
  k: jax.Array, total: jax.Array, counts_SR: jax.Array, *, rows: int, ragged: bool
) -> Round:
  """Round k of `total`; see the module."""
  whole_SR, rest_SR = counts_SR // total, counts_SR % total
  sizes_SR = whole_SR + (k < rest_SR)
  firsts_SR = whole_SR * k + jnp.minimum(k, rest_SR)
  if ragged:
    sent_SR = jnp.cumsum(sizes_SR, axis=1) - sizes_SR
    received_SR = jnp.cumsum(sizes_SR, axis=0) - sizes_SR
  else:
    devices = counts_SR.shape[0]
    slots_R = jnp.arange(devices, dtype=jnp.int32) * (rows // devices)
    sent_SR = jnp.broadcast_to(slots_R, counts_SR.shape)
    received_SR = sent_SR.T
  return Round(firsts_SR, sizes_SR, sent_SR, received_SR)


class Slots(NamedTuple):
  """What stands in each row M of a buffer.

  Attributes:
    peer_M: int32, the device that the row goes to or comes from.
    rank_M: int32, its place among all rows of that pair of devices.
    used_M: bool, whether there is a row at all.
  """

  peer_M: jax.Array
  rank_M: jax.Array
  used_M: jax.Array


def slots(starts_R: jax.Array, sizes_R: jax.Array, firsts_R: jax.Array, *, rows: int) -> Slots:
  """The rows of one device's buffer, from its row or column of a `Round`."""
  row_M = jnp.arange(rows, dtype=jnp.int32)
  # Of blocks that begin at the same row all but the last are empty.
  peer_M = jnp.sum(row_M[:, None] >= starts_R, axis=1, dtype=jnp.int32) - 1
  place_M = row_M - starts_R[peer_M]
  return Slots(peer_M, firsts_R[peer_M] + place_M, place_M < sizes_R[peer_M])


def local_experts(slots: Slots, counts_SE: jax.Array) -> jax.Array:
  """The expert of each received row: int32 [M] in [0, E], E where there is no row.

  Args:
    slots: of the receiving buffer.
    counts_SE: int32 [R, E], how many rows each device has for each expert here.
  """
  until_ME = jnp.cumsum(counts_SE, axis=1)[slots.peer_M]
  experts_M = jnp.sum(until_ME <= slots.rank_M[:, None], axis=1, dtype=jnp.int32)
  return jnp.where(slots.used_M, experts_M, counts_SE.shape[1])
