"""Attention by the Mosaic kernels of the package tokamax, on NVIDIA GPUs from Hopper on.

Place in the ring: under `kernels.attention`. For packed rows only: what a query sees must be the
keys from its segment's first token to itself. The public function of tokamax cannot say that but by
a mask [T, S]; its `Mask` can, by the first key of each query and the one past the last. Of its
kernels only Mosaic's backward pass knows these arguments: Triton's writes the mask out, quadratic
in length.

The forward kernel visits only keys between the two. The backward kernels mask by them but visit
all keys, or those of a causal triangle that begins at token 0 of what they are given. So the
backward pass here calls them on blocks: each block of queries with each earlier block of keys that
it sees something of, and with its own, where the triangle is. Since scores are weighed by the saved
log-sum-exp of all keys, the blocks' gradients add up. Temporaries are of one pair of blocks, also
the gradients of keys and values, which the kernels write for every query head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.ad_checkpoint import checkpoint_name
from jax.extend import backend

from intellect3.kernels.attention import blocks

_TILE = 128
"""Rows that two of the kernels' warp groups take; blocks are multiples of it."""

_BLOCK = 4096
"""Tokens of a block of the backward pass: enough to fill a card, few enough to skip much."""


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
  q_starts: jax.Array | None = None,
) -> jax.Array:
  """`kernels.attention.attention` of packed rows: queries are the keys' tokens, or pieces of them.

  Each segment lies in one piece, its positions rise by one; this cannot be checked while tracing.
  The result and its log-sum-exp carry the checkpoint names `attention_out` and `attention_lse`.

  Raises:
    ValueError: for queries that are not the keys' tokens and have no `q_starts`, pieces that are no
      multiple of 128, a dtype of other than 16 bits, a GPU before Hopper, or a mesh of several
      devices outside `shard_map`.
  """
  same = q_segment_ids_BT is kv_segment_ids_BS and q_positions_BT is kv_positions_BS
  if q_starts is None and not same:
    raise ValueError(
      "attention: tokamax expects packed rows, the same arrays as ids of queries and keys; got two"
    )
  if any(x.dtype not in (jnp.bfloat16, jnp.float16) for x in (q_BTNH, k_BSKH, v_BSKH)):
    raise ValueError(f"dtype: tokamax expects bfloat16 or float16, got {q_BTNH.dtype}")
  if q_starts is not None and q_BTNH.shape[1] % (_TILE * q_starts.shape[0]):
    raise ValueError(
      f"row_length: tokamax expects pieces of a multiple of {_TILE} tokens, got "
      f"{q_starts.shape[0]} in {q_BTNH.shape[1]} tokens of a device"
    )
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual:
    raise ValueError(f"attention: tokamax expects shard_map on several devices, got mesh {mesh}")
  device = backend.get_default_device()
  if float(getattr(device, "compute_capability", 0)) < 9:
    raise ValueError(f"attention: tokamax expects a Hopper GPU or newer, got {device}")
  return on_blocks(
    _kernels(),
    q_BTNH,
    k_BSKH,
    v_BSKH,
    q_segment_ids_BT=q_segment_ids_BT,
    kv_segment_ids_BS=kv_segment_ids_BS,
    scale=scale,
    q_starts=q_starts,
    most=_BLOCK,
  )


def on_blocks(
  kernels: tuple[Any, Any],
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  q_segment_ids_BT: jax.Array,
  kv_segment_ids_BS: jax.Array,
  scale: float,
  q_starts: jax.Array | None,
  most: int,
) -> jax.Array:
  """`attend` with two functions in place of tokamax's kernels, and about `most` tokens in a block.

  Args:
    kernels: (q, k, v, k_start_BT, k_end_BT, scale) -> (out, lse_BNT), and (q, k, v, out, lse_BNT,
      dout, k_start_BT, causal, scale) -> (dq, dk, dv), as `_forward` and `_backward` have them.
    q_BTNH: as for `attend`, and so are the others.
    k_BSKH: .
    v_BSKH: .
    q_segment_ids_BT: .
    kv_segment_ids_BS: .
    scale: .
    q_starts: .
    most: tokens.
  """
  length = q_BTNH.shape[1]
  if q_starts is None:
    q_starts = jnp.zeros(1, jnp.int32)
    missing = -length % (_TILE * -(-length // most))
    q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS = (
      jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
      for x in (q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, kv_segment_ids_BS)
    )
  else:
    q_ids_BT, kv_ids_BS = q_segment_ids_BT, kv_segment_ids_BS
  piece = q_BTNH.shape[1] // q_starts.shape[0]
  size = _block_size(piece, most)
  index_T = (q_starts[:, None] + jnp.arange(piece, dtype=jnp.int32)).reshape(-1)
  starts_BT = segment_starts(kv_ids_BS)[:, index_T]
  own_I = index_T[::size] // size
  # In a packed row the segments' order is the tokens', and so is that within a segment.
  q_index_BT = jnp.broadcast_to(index_T, q_ids_BT.shape)
  kv_index_BS = jnp.broadcast_to(jnp.arange(k_BSKH.shape[1], dtype=jnp.int32), kv_ids_BS.shape)
  visible_BIJ = blocks.visible(
    q_ids_BT, q_index_BT, kv_ids_BS, kv_index_BS, q_block=size, kv_block=size
  )
  # Padding's blocks see nothing: none before their own.
  before_IJ = jnp.where(
    jnp.any(visible_BIJ, axis=0), jnp.arange(visible_BIJ.shape[2]), own_I[:, None]
  )
  first_I = jnp.min(before_IJ, axis=-1).astype(jnp.int32)
  tokens = _Tokens(q_ids_BT != 0, starts_BT, index_T, first_I, own_I)
  return _attend(kernels, scale, q_BTNH, k_BSKH, v_BSKH, tokens)[:, :length]


class _Tokens(NamedTuple):
  """What queries see, and what their blocks have to do with.

  Attributes:
    real_BT: whether a query is no padding.
    starts_BT: the first key that a query sees.
    index_T: the last one: its own place in the row.
    first_I: the first block of keys that a block of queries sees something of.
    own_I: the block of keys with its own tokens.
  """

  real_BT: jax.Array
  starts_BT: jax.Array
  index_T: jax.Array
  first_I: jax.Array
  own_I: jax.Array


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
  """int32 [B, T]: the index of the first token of each token's segment; padding's own index."""
  index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
  before_BT = jnp.pad(segment_ids_BT[:, :-1], [(0, 0), (1, 0)])
  first_BT = (segment_ids_BT != before_BT) | (segment_ids_BT == 0)
  return jax.lax.cummax(jnp.where(first_BT, index_T, 0), axis=1)


def _block_size(piece: int, most: int) -> int:
  """The divisor of a piece, a multiple of `_TILE`, that is nearest to `most` as a ratio."""
  tiles = piece // _TILE
  divisors = [n for n in range(1, tiles + 1) if tiles % n == 0]
  return _TILE * min(divisors, key=lambda n: max(n * _TILE / most, most / n / _TILE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, scale, q_BTNH, k_BSKH, v_BSKH, tokens):
  return _out_and_lse(kernels, scale, q_BTNH, k_BSKH, v_BSKH, tokens)[0]


def _out_and_lse(kernels, scale, q_BTNH, k_BSKH, v_BSKH, tokens):
  ends_BT = jnp.broadcast_to(tokens.index_T + 1, tokens.starts_BT.shape)
  out_BTNH, lse_BNT = kernels[0](q_BTNH, k_BSKH, v_BSKH, tokens.starts_BT, ends_BT, scale)
  return jnp.where(tokens.real_BT[:, :, None, None], out_BTNH, 0), lse_BNT


def _attend_fwd(kernels, scale, q_BTNH, k_BSKH, v_BSKH, tokens):
  out_BTNH, lse_BNT = _out_and_lse(kernels, scale, q_BTNH, k_BSKH, v_BSKH, tokens)
  out_BTNH = checkpoint_name(out_BTNH, "attention_out")
  lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, tokens, out_BTNH, lse_BNT)


def _attend_bwd(kernels, scale, saved, dout_BTNH):
  q_BTNH, k_BSKH, v_BSKH, tokens, out_BTNH, lse_BNT = saved
  count = tokens.own_I.shape[0]
  size = q_BTNH.shape[1] // count
  at = lambda x, i, axis=1: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)  # noqa: E731

  def add(total, part, i):
    return jax.lax.dynamic_update_slice_in_dim(
      total, at(total, i) + part.astype(total.dtype), i * size, 1
    )

  def one_block(gradients, inputs):
    dq_BTNH, dk_BSKH, dv_BSKH = gradients
    i, (first, own) = inputs
    dout_BtNH = jnp.where(at(tokens.real_BT, i)[:, :, None, None], at(dout_BTNH, i), 0)
    queries = at(q_BTNH, i), at(out_BTNH, i), at(lse_BNT, i, 2), dout_BtNH
    starts_Bt = at(tokens.starts_BT, i)

    def pair(j, gradients, *, causal):
      dq_BtNH, dk_BSKH, dv_BSKH = gradients
      q, out, lse, dout = queries
      k_start_Bt = jnp.clip(starts_Bt - j * size, 0, size)
      dq, dk, dv = kernels[1](
        q, at(k_BSKH, j), at(v_BSKH, j), out, lse, dout, k_start_Bt, causal, scale
      )
      return dq_BtNH + dq.astype(dq_BtNH.dtype), add(dk_BSKH, dk, j), add(dv_BSKH, dv, j)

    dq_BtNH = jnp.zeros(queries[0].shape, jnp.float32)
    inner = pair(own, (dq_BtNH, dk_BSKH, dv_BSKH), causal=True)
    earlier = functools.partial(pair, causal=False)
    dq_BtNH, dk_BSKH, dv_BSKH = jax.lax.fori_loop(first, own, earlier, inner)
    dq_BTNH = jax.lax.dynamic_update_slice_in_dim(
      dq_BTNH, dq_BtNH.astype(dq_BTNH.dtype), i * size, 1
    )
    return (dq_BTNH, dk_BSKH, dv_BSKH), None

  zeros = jnp.zeros_like(q_BTNH), *(jnp.zeros(x.shape, jnp.float32) for x in (k_BSKH, v_BSKH))
  spans = jnp.arange(count, dtype=jnp.int32), (tokens.first_I, tokens.own_I)
  (dq_BTNH, dk_BSKH, dv_BSKH), _ = jax.lax.scan(one_block, zeros, spans)
  return dq_BTNH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _kernels() -> tuple[Any, Any]:
  if not flags.FLAGS.is_parsed():
    # Else tokamax parses sys.argv, and ends processes that are not absl's over flags of their own.
    flags.FLAGS.mark_as_parsed()
  return _forward, _backward


def _forward(q, k, v, k_start_BT, k_end_BT, scale):
  from tokamax._src.ops.attention import base, pallas_mosaic_gpu

  mask = base.Mask(k_start=k_start_BT[:, None], k_end=k_end_BT[:, None])
  kernel = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
  out, (top_BNT, total_BNT) = kernel(q, k, v, mask=mask, logits_scale=scale, return_residuals=True)
  return out, top_BNT + jnp.log(total_BNT)


def _backward(q, k, v, out, lse_BNT, dout, k_start_BT, causal, scale):
  from tokamax._src.ops.attention import base, pallas_mosaic_gpu

  mask = base.Mask(k_start=k_start_BT[:, None], is_causal=causal)
  kernel = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
  bound = kernel.bind(q, k, v, mask=mask, logits_scale=scale)
  options = {name: x for name, x in bound.kwargs.items() if name != "return_residuals"}
  residuals = lse_BNT, jnp.ones_like(lse_BNT)
  gradients = kernel.vjp(residuals, out, dout, *bound.args, **options)
  return gradients["q"], gradients["k"], gradients["v"]
