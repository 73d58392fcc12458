"""Grouped-query attention over a paged key/value cache.

Place in the ring: inside the model, in prefill and decode. The keys are read in spans of a few
pages with a running softmax (online normaliser: Milakov & Gimelshein, arXiv 1805.02867; as in
FlashAttention, arXiv 2205.14135), as far as the longest row reaches, so work follows what is in the
cache and not its size. A span beyond a row's own length changes none of the row's bits (it
multiplies by 1 and adds 0): results do not depend on how long the other rows are.
"""

import chex
import jax
import jax.numpy as jnp

SPAN_TOKENS = 64
"""Tokens of each row that are read at once."""


def paged_attention(
  q_BTNH: jax.Array,
  k_LPKOH: jax.Array,
  v_LPKOH: jax.Array,
  layer: jax.Array,
  tables_BW: jax.Array,
  *,
  positions_BT: jax.Array,
  valid_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """Softmax attention; a query sees its own sequence's keys at positions up to its own.

  Query head n reads key/value head n // (N / K) (GQA, arXiv 2305.13245).

  Args:
    q_BTNH: floating [B, T, N, H].
    k_LPKOH: floating [L, P, K, O, H], P pages of O tokens; K divides N.
    v_LPKOH: the same shape.
    layer: int scalar below L.
    tables_BW: integer [B, W], the pages of each row's sequence, in order; entries beyond its length
      may be any page.
    positions_BT: integer [B, T], below W * O.
    valid_BT: bool [B, T]; other queries get zeros.
    scale: factor of the scores, usually H ** -0.5.

  Returns:
    [B, T, N, H] in the dtype of the values; sums are float32.

  Raises:
    ValueError: where the heads do not divide.
  """
  chex.assert_rank([q_BTNH, k_LPKOH, tables_BW], [4, 5, 2])
  chex.assert_equal_shape([k_LPKOH, v_LPKOH])
  chex.assert_equal_shape([positions_BT, valid_BT])
  batch, queries, heads, head_dim = q_BTNH.shape
  kv_heads, page_size = k_LPKOH.shape[2:4]
  if heads % kv_heads:
    raise ValueError(f"num_heads: expected a multiple of {kv_heads} (kv heads), got {heads}")
  groups = heads // kv_heads
  width = max(1, min(SPAN_TOKENS // page_size, tables_BW.shape[1]))
  span = width * page_size
  tables_BW = jnp.pad(tables_BW, ((0, 0), (0, -tables_BW.shape[1] % width)))
  longest = jnp.max(jnp.where(valid_BT, positions_BT + 1, 0))
  # Queries of one kv head lie together: one matrix product per row, page and kv head.
  q_BKQH = (
    q_BTNH.reshape(batch, queries, kv_heads, groups, head_dim)
    .transpose(0, 2, 1, 3, 4)
    .reshape(batch, kv_heads, queries * groups, head_dim)
  )
  limits_BQ = jnp.repeat(jnp.where(valid_BT, positions_BT, -1), groups, axis=1)
  lowest = jnp.finfo(jnp.float32).min

  def attend(index, carry):
    highest_BKQ, total_BKQ, out_BKQH = carry
    table_BX = jax.lax.dynamic_slice_in_dim(tables_BW, index * width, width, axis=1)
    positions_XO = index * span + jnp.arange(span).reshape(width, page_size)
    visible_BXQO = limits_BQ[:, None, :, None] >= positions_XO[:, None, :]
    visible_BXKQO = visible_BXQO[:, :, None]
    scores_BXKQO = scale * jnp.einsum(
      "BKQH,BXKOH->BXKQO", q_BKQH, k_LPKOH[layer, table_BX], preferred_element_type=jnp.float32
    )
    scores_BXKQO = jnp.where(visible_BXKQO, scores_BXKQO, lowest)
    new_BKQ = jnp.maximum(highest_BKQ, jnp.max(scores_BXKQO, axis=(1, 4)))
    # Zero also for a query that has seen nothing yet, whose highest score is the lowest number.
    weights_BXKQO = jnp.exp(scores_BXKQO - new_BKQ[:, None, :, :, None])
    weights_BXKQO = jnp.where(visible_BXKQO, weights_BXKQO, 0)
    added_BXKQH = jnp.einsum(
      "BXKQO,BXKOH->BXKQH",
      weights_BXKQO.astype(v_LPKOH.dtype),
      v_LPKOH[layer, table_BX],
      preferred_element_type=jnp.float32,
    )
    keep_BKQ = jnp.exp(highest_BKQ - new_BKQ)
    return (
      new_BKQ,
      total_BKQ * keep_BKQ + jnp.sum(weights_BXKQO, axis=(1, 4)),
      out_BKQH * keep_BKQ[..., None] + jnp.sum(added_BXKQH, axis=1),
    )

  shape = q_BKQH.shape[:3]
  start = (
    jnp.full(shape, lowest, jnp.float32),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros((*shape, head_dim), jnp.float32),
  )
  _, total_BKQ, out_BKQH = jax.lax.fori_loop(0, (longest + span - 1) // span, attend, start)
  out_BKQH = out_BKQH / jnp.where(total_BKQ > 0, total_BKQ, 1)[..., None]
  return (
    out_BKQH.reshape(batch, kv_heads, queries, groups, head_dim)
    .transpose(0, 2, 1, 3, 4)
    .reshape(q_BTNH.shape)
    .astype(v_LPKOH.dtype)
  )
