"""The key/value cache of incremental decoding, in pages.

Place in the ring: the engine makes one at start, passes it to every model call and gets it back; it
donates it to `jax.jit`, so that the update happens in place. It travels through the layers as an
explicit scan carry: as a scanned Linen collection it would be copied whole for every token.

A sequence owns pages, not a range: its page table says where each of its tokens lies, so sequences
that begin alike can share pages, and memory is taken as they grow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from intellect3.models.config import ModelConfig


class KVCache(NamedTuple):
  """Keys (rotated) and values of every layer and page.

  Attributes:
    k_LPKOH: [layers, pages, kv heads, tokens of a page, head dim], in the dtype of the computation:
      what one matrix product reads lies together.
    v_LPKOH: the same for the values.
  """

  k_LPKOH: jax.Array
  v_LPKOH: jax.Array


def init(config: ModelConfig, pages: int, page_size: int) -> KVCache:
  """An empty cache of `pages` pages of `page_size` tokens each."""
  if pages < 1 or page_size < 1:
    raise ValueError(f"cache: expected pages and page_size of at least 1, got {pages}, {page_size}")
  shape = (config.num_layers, pages, config.num_kv_heads, page_size, config.head_dim)
  return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def write(
  cache: KVCache,
  layer: jax.Array,
  tables_BW: jax.Array,
  positions_BT: jax.Array,
  valid_BT: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
) -> KVCache:
  """Writes one layer's keys and values; invalid tokens and those beyond the table write nothing.

  Values that are no finite numbers are written as 0; the keys beside them stay, so that whoever may
  see them still gets no number.

  Args:
    cache: the carry.
    layer: int scalar.
    tables_BW: int [B, W], the pages of each row's sequence, in order.
    positions_BT: int [B, T], >= 0, of the token in its sequence.
    valid_BT: bool [B, T].
    k_BTKH: [B, T, K, H].
    v_BTKH: [B, T, K, H].
  """
  pages, page_size = cache.k_LPKOH.shape[1], cache.k_LPKOH.shape[3]
  index_BT = positions_BT // page_size
  pages_BT = jnp.take_along_axis(tables_BW, index_BT, axis=1, mode="clip")
  pages_BT = jnp.where(valid_BT & (index_BT < tables_BW.shape[1]), pages_BT, pages)
  at = (layer, pages_BT, slice(None), positions_BT % page_size)
  # Attention multiplies values that a row may not see by 0: a page that broken weights once filled
  # must not spoil who has it next.
  v_BTKH = jnp.where(jnp.isfinite(v_BTKH), v_BTKH, 0)
  return KVCache(
    cache.k_LPKOH.at[at].set(k_BTKH.astype(cache.k_LPKOH.dtype), mode="drop"),
    cache.v_LPKOH.at[at].set(v_BTKH.astype(cache.v_LPKOH.dtype), mode="drop"),
  )
