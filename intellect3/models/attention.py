"""The attention block: projections, rotary embedding, cache, output.

Place in the ring: the first half of every layer, the same in training, prefill and decode.
"""

from typing import NamedTuple

import flax.linen as nn
import jax

from intellect3.kernels.attention import attention
from intellect3.kernels.paged_attention import paged_attention
from intellect3.models import cache as kv
from intellect3.models import layers
from intellect3.models.config import ModelConfig


class Context(NamedTuple):
  """What every layer is told about the tokens.

  Attributes:
    positions_BT: int32, position within the segment (with a cache: the sequence).
    segment_ids_BT: int32, 0 is padding.
    angles_BTR: float32, rotary angles.
    tables_BW: the cache pages of each row's sequence; None without a cache.
  """

  positions_BT: jax.Array
  segment_ids_BT: jax.Array
  angles_BTR: jax.Array
  tables_BW: jax.Array | None


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

    scale = config.head_dim**-0.5
    if cache is None:
      segment_ids_BT = context.segment_ids_BT
      out_BTNH = attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_positions_BT=context.positions_BT,
        kv_positions_BS=context.positions_BT,
        q_segment_ids_BT=segment_ids_BT,
        kv_segment_ids_BS=segment_ids_BT,
        scale=scale,
        implementation=config.attention,
      )
    else:
      assert context.tables_BW is not None
      valid_BT = context.segment_ids_BT != 0
      cache = kv.write(
        cache, layer, context.tables_BW, context.positions_BT, valid_BT, k_BTKH, v_BTKH
      )
      out_BTNH = paged_attention(
        q_BTNH,
        cache.k_LPKOH,
        cache.v_LPKOH,
        layer,
        context.tables_BW,
        positions_BT=context.positions_BT,
        valid_BT=valid_BT,
        scale=scale,
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
