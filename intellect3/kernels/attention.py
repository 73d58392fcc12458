"""Grouped-query attention over packed rows or a KV cache.

Place in the ring: inside the model, in training, prefill and decode alike. What a query may see is
said by positions and segment ids alone, so one interface serves all three.
"""

import chex
import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("plain",)


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  q_positions_BT: jax.Array,
  kv_positions_BS: jax.Array,
  q_segment_ids_BT: jax.Array,
  kv_segment_ids_BS: jax.Array,
  scale: float,
  implementation: str = "plain",
) -> jax.Array:
  """Softmax attention; a query sees the keys of its own segment at positions up to its own.

  Query head n reads key/value head n // (N / K) (GQA, arXiv 2305.13245).

  Args:
    q_BTNH: floating [B, T, N, H].
    k_BSKH: floating [B, S, K, H]; K divides N.
    v_BSKH: floating [B, S, K, H].
    q_positions_BT: integer [B, T], position of each query within its segment.
    kv_positions_BS: integer [B, S].
    q_segment_ids_BT: integer [B, T]; 0 is padding: such a query sees nothing and gets zeros.
    kv_segment_ids_BS: integer [B, S]; a key of segment 0 is seen by nobody.
    scale: factor of the scores, usually H ** -0.5.
    implementation: `plain` holds all scores [B, N, T, S] in float32.

  Returns:
    [B, T, N, H] in the dtype of the values.

  Raises:
    ValueError: for an unknown implementation or heads that do not divide.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
  chex.assert_rank([q_BTNH, k_BSKH, v_BSKH], 4)
  chex.assert_equal_shape([k_BSKH, v_BSKH])
  batch, queries, heads, head_dim = q_BTNH.shape
  keys, kv_heads = k_BSKH.shape[1:3]
  if heads % kv_heads:
    raise ValueError(f"num_heads: expected a multiple of {kv_heads} (kv heads), got {heads}")
  chex.assert_shape([q_positions_BT, q_segment_ids_BT], (batch, queries))
  chex.assert_shape([kv_positions_BS, kv_segment_ids_BS], (batch, keys))

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
