"""The key/value cache of incremental decoding.

Place in the ring: the engine makes one at start, passes it to every model call and gets it back; it
donates it to `jax.jit`, so that the update happens in place. It travels through the layers as an
explicit scan carry: as a scanned Linen collection it would be copied whole for every token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from intellect3.models.config import ModelConfig


class KVCache(NamedTuple):
  """Keys (rotated) and values of every layer, slot and position.

  Attributes:
    k_LBSKH: [layers, slots, positions, kv heads, head dim], in the dtype of the computation.
    v_LBSKH: the same for the values.
  """

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array


def init(config: ModelConfig, slots: int, length: int) -> KVCache:
  """An empty cache of `slots` sequences of at most `length` positions."""
  if slots < 1 or length < 1:
    raise ValueError(f"cache: expected slots and length of at least 1, got {slots}, {length}")
  shape = (config.num_layers, slots, length, config.num_kv_heads, config.head_dim)
  return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def write(
  cache: KVCache,
  layer: jax.Array,
  slots_B: jax.Array | None,
  positions_BT: jax.Array,
  valid_BT: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
) -> KVCache:
  """Writes one layer's keys and values; invalid tokens and those beyond the end write nothing.

  Args:
    cache: the carry.
    layer: int scalar.
    slots_B: the slot of each row; None means row b is slot b.
    positions_BT: int [B, T], >= 0.
    valid_BT: bool [B, T].
    k_BTKH: [B, T, K, H].
    v_BTKH: [B, T, K, H].
  """
  slots_B1 = _slots(cache, slots_B)[:, None]
  positions_BT = jnp.where(valid_BT, positions_BT, cache.k_LBSKH.shape[2])
  at = (layer, slots_B1, positions_BT)
  return KVCache(
    cache.k_LBSKH.at[at].set(k_BTKH.astype(cache.k_LBSKH.dtype), mode="drop"),
    cache.v_LBSKH.at[at].set(v_BTKH.astype(cache.v_LBSKH.dtype), mode="drop"),
  )


def read(
  cache: KVCache, layer: jax.Array, slots_B: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """One layer's keys and values of the rows' slots: k_BSKH, v_BSKH."""
  k_BSKH, v_BSKH = cache.k_LBSKH[layer], cache.v_LBSKH[layer]
  if slots_B is None:
    return k_BSKH, v_BSKH
  return k_BSKH[slots_B], v_BSKH[slots_B]


def _slots(cache: KVCache, slots_B: jax.Array | None) -> jax.Array:
  return jnp.arange(cache.k_LBSKH.shape[1]) if slots_B is None else slots_B
