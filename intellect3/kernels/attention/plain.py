"""Attention with all scores in memory: the oracle of the others.

Place in the ring: under `kernels.attention`.
"""

import jax
import jax.numpy as jnp


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  q_positions_BT: jax.Array,
  kv_positions_BS: jax.Array,
  q_segment_ids_BT: jax.Array,
  kv_segment_ids_BS: jax.Array,
  scale: float,
) -> jax.Array:
  """`kernels.attention.attention` with scores [B, N, T, S] in float32."""
  batch, queries, heads, head_dim = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  visible_BTS = (
    (q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :])
    & (q_segment_ids_BT[:, :, None] != 0)
    & (q_positions_BT[:, :, None] >= kv_positions_BS[:, None, :])
  )
  visible_B11TS = visible_BTS[:, None, None]
  # G query heads share each of the K key/value heads.
  q_BTKGH = q_BTNH.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
  scores_BKGTS = scale * jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  scores_BKGTS = jnp.where(visible_B11TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
  probabilities_BKGTS = jnp.where(visible_B11TS, jax.nn.softmax(scores_BKGTS, axis=-1), 0)
  out_BTKGH = jnp.einsum(
    "BKGTS,BSKH->BTKGH",
    probabilities_BKGTS.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  return out_BTKGH.reshape(q_BTNH.shape).astype(v_BSKH.dtype)
