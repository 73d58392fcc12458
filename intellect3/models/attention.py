"""The attention block: projections, rotary embedding, cache, output.

Place in the ring: the first half of every layer, the same in training, prefill and decode.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from intellect3.kernels import attention as kernel
from intellect3.models import cache as kv
from intellect3.models import layers
from intellect3.models.config import ModelConfig


class Context(NamedTuple):
  """What every layer is told about the tokens.

  Attributes:
    positions_BT: int32, position within the segment (with a cache: within the slot).
    segment_ids_BT: int32, 0 is padding.
    angles_BTR: float32, rotary angles.
    slots_B: the cache slot of each row; None without a cache, or for row b in slot b.
  """

  positions_BT: jax.Array
  segment_ids_BT: jax.Array
  angles_BTR: jax.Array
  slots_B: jax.Array | None


class Attention(nn.Module):
  """Grouped-query attention with partial rotary embedding."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, cache: kv.KVCache | None, layer: jax.Array, context: Context
  ) -> tuple[jax.Array, kv.KVCache | None]:
    config = self.config
    bias = config.attention_bias
    queries, keys = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    q_BTNH = layers.Projection(config, queries, q_axes, use_bias=bias, name="q")(x_BTD)
    k_BTKH = layers.Projection(config, keys, kv_axes, use_bias=bias, name="k")(x_BTD)
    v_BTKH = layers.Projection(config, keys, kv_axes, use_bias=bias, name="v")(x_BTD)
    if config.qk_norm:
      q_BTNH = layers.RMSNorm(config, name="q_norm")(q_BTNH)
      k_BTKH = layers.RMSNorm(config, name="k_norm")(k_BTKH)
    q_BTNH = layers.rotate(q_BTNH, context.angles_BTR)
    k_BTKH = layers.rotate(k_BTKH, context.angles_BTR)

    if cache is None:
      k_BSKH, v_BSKH = k_BTKH, v_BTKH
      q_segments_BT = kv_segments_BS = context.segment_ids_BT
      kv_positions_BS = context.positions_BT
    else:
      # A slot holds one sequence, whole from position 0: what a query may see follows from
      # positions alone, and stale keys of an earlier tenant lie beyond its own position.
      valid_BT = context.segment_ids_BT != 0
      cache = kv.write(
        cache, layer, context.slots_B, context.positions_BT, valid_BT, k_BTKH, v_BTKH
      )
      k_BSKH, v_BSKH = kv.read(cache, layer, context.slots_B)
      q_segments_BT = valid_BT.astype(jnp.int32)
      kv_segments_BS = jnp.ones(k_BSKH.shape[:2], jnp.int32)
      kv_positions_BS = jnp.broadcast_to(jnp.arange(k_BSKH.shape[1]), k_BSKH.shape[:2])
    out_BTNH = kernel.attention(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      q_positions_BT=context.positions_BT,
      kv_positions_BS=kv_positions_BS,
      q_segment_ids_BT=q_segments_BT,
      kv_segment_ids_BS=kv_segments_BS,
      scale=config.head_dim**-0.5,
      implementation=config.attention,
    )
    output = layers.Projection(
      config,
      (config.embed_dim,),
      ("heads", "head_dim", "embed"),
      inputs=2,
      scale=layers.residual_scale(config),
      name="o",
    )
    return output(out_BTNH), cache
