"""The attention block: projections, rotary embedding, cache, output.

Place in the ring: the first half of every layer, the same in training, prefill and decode.
"""

from typing import NamedTuple

import flax.linen as nn
import jax

from intellect3.kernels.attention import attention, context_attention
from intellect3.kernels.paged_attention import paged_attention
from intellect3.models import cache as kv
from intellect3.models import layers
from intellect3.models.config import ModelConfig
from intellect3.models.parallel import ONE_DEVICE, Parallel


class Context(NamedTuple):
  """What every layer is told about the tokens.

  Attributes:
    positions_BT: int32, position within the segment (with a cache: the sequence).
    segment_ids_BT: int32, 0 is padding.
    angles_BTR: float32, rotary angles.
    tables_BW: the cache pages of each row's sequence; None without a cache.
    positions_BS: as positions_BT, of the whole rows; the same where no mesh axis divides them.
    segment_ids_BS: as segment_ids_BT, of the whole rows.
  """

  positions_BT: jax.Array
  segment_ids_BT: jax.Array
  angles_BTR: jax.Array
  tables_BW: jax.Array | None
  positions_BS: jax.Array
  segment_ids_BS: jax.Array

  @property
  def valid_BT(self) -> jax.Array:
    """bool: whether a token is one."""
    return self.segment_ids_BT != 0


class Attention(nn.Module):
  """Grouped-query attention with partial rotary embedding, over this device's heads.

  Where heads are divided the output is this device's share of a sum.
  """

  config: ModelConfig
  parallel: Parallel = ONE_DEVICE

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, cache: kv.KVCache | None, layer: jax.Array, context: Context
  ) -> tuple[jax.Array, kv.KVCache | None]:
    config, parallel = self.config, self.parallel
    bias, parts = config.attention_bias, parallel.parts(parallel.heads)
    queries = (config.num_heads // parts, config.head_dim)
    keys = (config.num_kv_heads // parts, config.head_dim)
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
    if parallel.length:
      out_BTNH = context_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        positions_BS=context.positions_BS,
        segment_ids_BS=context.segment_ids_BS,
        scale=scale,
        implementation=config.attention,
        axis_name=parallel.length,
      )
    elif cache is None:
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
      valid_BT = context.valid_BT
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
