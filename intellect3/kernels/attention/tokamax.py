"""Attention by the Mosaic kernels of the package tokamax, on NVIDIA GPUs from Hopper on.

Place in the ring: under `kernels.attention`. For packed rows only: what a query sees must be the
keys from its segment's first token to itself. The public function of tokamax cannot say that but by
a mask [T, S]; its `Mask` can, by the first key of each query. Of its kernels only Mosaic's backward
pass knows that argument: Triton's writes the mask out, quadratic in length.
"""

import jax
import jax.numpy as jnp
from absl import flags
from jax.extend import backend

_TILE = 256


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
  """`kernels.attention.attention` of packed rows: S = T, the same ids for queries and keys.

  Each segment lies in one piece, its positions rise by one; this cannot be checked while tracing.

  Raises:
    ValueError: for queries that are not the keys' tokens, a dtype of other than 16 bits, a GPU
      before Hopper, or a mesh of several devices outside `shard_map`.
  """
  if q_segment_ids_BT is not kv_segment_ids_BS or q_positions_BT is not kv_positions_BS:
    raise ValueError(
      "attention: tokamax expects packed rows, the same arrays as ids of queries and keys; got two"
    )
  if any(x.dtype not in (jnp.bfloat16, jnp.float16) for x in (q_BTNH, k_BSKH, v_BSKH)):
    raise ValueError(f"dtype: tokamax expects bfloat16 or float16, got {q_BTNH.dtype}")
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual:
    raise ValueError(f"attention: tokamax expects shard_map on several devices, got mesh {mesh}")
  device = backend.get_default_device()
  if float(getattr(device, "compute_capability", 0)) < 9:
    raise ValueError(f"attention: tokamax expects a Hopper GPU or newer, got {device}")
  from tokamax._src.ops.attention import base, pallas_mosaic_gpu

  if not flags.FLAGS.is_parsed():
    # Else tokamax parses sys.argv, and ends processes that are not absl's over flags of their own.
    flags.FLAGS.mark_as_parsed()
  length = q_BTNH.shape[1]
  starts_BT = jnp.pad(segment_starts(q_segment_ids_BT), [(0, 0), (0, -length % _TILE)])
  q, k, v = (
    jnp.pad(x, [(0, 0), (0, -length % _TILE), (0, 0), (0, 0)]) for x in (q_BTNH, k_BSKH, v_BSKH)
  )
  mask = base.Mask(k_start=starts_BT[:, None, :], is_causal=True)
  kernel = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
  out_BTNH = kernel(q, k, v, mask=mask, logits_scale=scale)[:, :length]
  return jnp.where((q_segment_ids_BT != 0)[:, :, None, None], out_BTNH, 0)


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
  """int32 [B, T]: the index of the first token of each token's segment; padding's own index."""
  index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
  before_BT = jnp.pad(segment_ids_BT[:, :-1], [(0, 0), (1, 0)])
  first_BT = (segment_ids_BT != before_BT) | (segment_ids_BT == 0)
  return jax.lax.cummax(jnp.where(first_BT, index_T, 0), axis=1)
