"""Attention by blocks of queries and keys, with a running softmax: memory linear in length.

Place in the ring: under `kernels.attention`, on every backend. Follows FlashAttention-2
(arXiv 2307.08691), its backward pass included: scores are computed again from the saved
log-sum-exp. Different: the loop over keys runs only between the first and the last visible block
(`blocks.visible`), so a packed row costs its segments' triangles; and the backward pass is one loop
over keys, in which the gradient of the queries is summed in place, in one fixed order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from intellect3.kernels.attention import blocks


class Plan(NamedTuple):
  """How the loops run.

  Attributes:
    q_block: most queries of a block.
    kv_block: most keys of a block.
    serial: whether rows and kv heads are computed one at a time, or all at once.
  """

  q_block: int
  kv_block: int
  serial: bool


def plan(platform: str, groups: int, *, sharded: bool) -> Plan:
  """The block sizes of a platform.

  A CPU works on one row and kv head at a time, in blocks that stay in its cache; anything else,
  and any mesh that may split rows and heads, on all of them at once.

  Args:
    platform: cpu, gpu or tpu.
    groups: query heads per kv head.
    sharded: whether the arrays may be split over devices.
  """
  if platform == "cpu":
    return Plan(q_block=max(128, 256 // groups), kv_block=128, serial=not sharded)
  return Plan(q_block=512, kv_block=512, serial=False)


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
  plan: Plan,
  pieces: int = 1,
) -> jax.Array:
  """`kernels.attention.attention` in blocks; any lengths, no multiples needed.

  Queries in equal pieces from several places of their rows are cut so that no block lies in two, if
  a piece is a multiple of 8: such a block would visit all keys between.

  The result and its log-sum-exp carry the checkpoint names `attention_out` and `attention_lse`: a
  remat policy that saves both spares the forward loop in the backward pass.
  """
  batch, length, _, width = q_BTNH.shape
  keys, kv_heads = k_BSKH.shape[1:3]
  q_block = blocks.block_size(length // pieces, plan.q_block)
  kv_block = blocks.block_size(keys, plan.kv_block)
  layout = blocks.Layout(plan.serial, batch, kv_heads)
  q_ids = tuple(x.astype(jnp.int32) for x in (q_segment_ids_BT, q_positions_BT))
  kv_ids = tuple(x.astype(jnp.int32) for x in (kv_segment_ids_BS, kv_positions_BS))
  visible_BIJ = blocks.visible(*q_ids, *kv_ids, q_block=q_block, kv_block=kv_block)
  tokens = _Tokens(
    q_ids=tuple(layout.tokens(x, q_block) for x in q_ids),
    kv_ids=tuple(layout.tokens(x, kv_block) for x in kv_ids),
    kv_spans=layout.spans(visible_BIJ),
    q_spans=layout.spans(visible_BIJ.swapaxes(1, 2)),
  )
  out = _attend(
    scale,
    layout.heads(q_BTNH.reshape(batch, length, kv_heads, -1, width), q_block),
    layout.heads(k_BSKH[:, :, :, None], kv_block)[..., 0, :, :],
    layout.heads(v_BSKH[:, :, :, None], kv_block)[..., 0, :, :],
    tokens,
  )
  return layout.back(out, length).reshape(q_BTNH.shape)


class _Tokens(NamedTuple):
  """Segment ids and positions in blocks, and which blocks each block has to do with.

  Attributes:
    q_ids: segment ids and positions, int32 [X, I, lanes, t] each.
    kv_ids: the same, int32 [X, J, lanes, s].
    kv_spans: int32 [X, I, 2], the keys' blocks from the first to before the second.
    q_spans: int32 [X, J, 2].
  """

  q_ids: tuple[jax.Array, ...]
  kv_ids: tuple[jax.Array, ...]
  kv_spans: jax.Array
  q_spans: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens) -> jax.Array:
  """From q [X, I, lanes, G, t, H] and k, v [X, J, lanes, s, H] to the shape of q."""
  return _forward(scale, q, k, v, tokens)[0]


def _forward(scale, q, k, v, tokens):
  """The result and the log-sum-exp of the scores, float32 [X, I, lanes, G, t]."""

  def one_block(_, inputs):
    x, span, q_gth, q_ids_t = inputs

    def add(j, state):
      top_gt, total_gt, out_gth = state
      visible_ts = _visible(q_ids_t, [_at(ids, x, j) for ids in tokens.kv_ids])[..., None, :, :]
      scores_gts = scale * _dot("...gth,...sh->...gts", q_gth, _at(k, x, j))
      scores_gts = jnp.where(visible_ts, scores_gts, -jnp.inf)
      new_top_gt = jnp.maximum(top_gt, jnp.max(scores_gts, axis=-1))
      weights_gts = jnp.exp(scores_gts - new_top_gt[..., None])
      keep_gt = jnp.exp(top_gt - new_top_gt)
      added_gth = _dot("...gts,...sh->...gth", weights_gts.astype(v.dtype), _at(v, x, j))
      return (
        new_top_gt,
        total_gt * keep_gt + jnp.sum(weights_gts, axis=-1),
        out_gth * keep_gt[..., None] + added_gth,
      )

    # A finite start: a query that sees nothing weighs every key exp(-inf - start) = 0.
    start_gt = jnp.full(q_gth.shape[:-1], -1e30, jnp.float32)
    state = (start_gt, jnp.zeros_like(start_gt), jnp.zeros(q_gth.shape, jnp.float32))
    top_gt, total_gt, out_gth = jax.lax.fori_loop(span[0], span[1], add, state)
    total_gt = jnp.where(total_gt > 0, total_gt, 1)
    return None, ((out_gth / total_gt[..., None]).astype(v.dtype), top_gt + jnp.log(total_gt))

  _, (out, lse) = _scan(one_block, None, (tokens.kv_spans, q, tokens.q_ids))
  return out, lse


def _attend_fwd(scale, q, k, v, tokens):
  out, lse = _forward(scale, q, k, v, tokens)
  out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
  return out, (q, k, v, tokens, out, lse)


def _attend_bwd(scale, saved, dout):
  q, k, v, tokens, out, lse = saved
  delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  # The G heads' queries are rows of one matrix. Scores stand transposed, [s, G * t]: so no product
  # reads its left side by columns, three times slower on a CPU. What is not a product keeps G and t
  # apart: merged, XLA's loops over them divide and do not vectorise.
  rows = (*q.shape[:-3], -1, q.shape[-1])
  q, dout = q.reshape(rows), dout.astype(v.dtype).reshape(rows)

  def one_block(dq, inputs):
    x, span, k_sh, v_sh, kv_ids_s = inputs

    def add(i, state):
      dq, dk_sh, dv_sh = state
      q_rh, dout_rh = _at(q, x, i), _at(dout, x, i)
      q_ids_t = [_at(ids, x, i) for ids in tokens.q_ids]
      visible_st = _visible(q_ids_t, kv_ids_s).swapaxes(-1, -2)[..., None, :]
      scores_sr = scale * _dot("...sh,...rh->...sr", k_sh, q_rh)
      merged = scores_sr.shape
      apart = (*merged[:-1], *lse.shape[-2:])
      scores_sgt = jnp.where(visible_st, scores_sr.reshape(apart), -jnp.inf)
      weights_sgt = jnp.exp(scores_sgt - _at(lse, x, i)[..., None, :, :])
      dv_sh += _dot("...sr,...rh->...sh", weights_sgt.reshape(merged).astype(v.dtype), dout_rh)
      dweights_sgt = _dot("...sh,...rh->...sr", v_sh, dout_rh).reshape(apart)
      dscores_sgt = scale * weights_sgt * (dweights_sgt - _at(delta, x, i)[..., None, :, :])
      dscores_sr = dscores_sgt.reshape(merged).astype(k.dtype)
      dk_sh += _dot("...sr,...rh->...sh", dscores_sr, q_rh)
      dq_hr = _at(dq, x, i) + _dot("...sh,...sr->...hr", k_sh, dscores_sr)
      return _put(dq, x, i, dq_hr), dk_sh, dv_sh

    zeros_sh = jnp.zeros(k_sh.shape, jnp.float32)
    dq, dk_sh, dv_sh = jax.lax.fori_loop(span[0], span[1], add, (dq, zeros_sh, zeros_sh))
    return dq, (dk_sh.astype(k.dtype), dv_sh.astype(v.dtype))

  dq = jnp.zeros((*rows[:-2], rows[-1], lse.shape[-2] * lse.shape[-1]), jnp.float32)
  dq, (dk, dv) = _scan(one_block, dq, (tokens.q_spans, k, v, tokens.kv_ids))
  dq = dq.swapaxes(-1, -2).reshape(out.shape).astype(q.dtype)
  return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _visible(q_ids_t: Any, kv_ids_s: Any) -> jax.Array:
  """bool [lanes, t, s]."""
  (q_segments, q_positions), (kv_segments, kv_positions) = q_ids_t, kv_ids_s
  return (
    (q_segments[..., :, None] == kv_segments[..., None, :])
    & (q_segments[..., :, None] != 0)
    & (q_positions[..., :, None] >= kv_positions[..., None, :])
  )


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _at(array: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
  """array[x, i] as a slice; indexing would gather."""
  start: list[Any] = [x, i, *[0] * (array.ndim - 2)]
  size = (1, 1, *array.shape[2:])
  return jax.lax.dynamic_slice(array, start, size, allow_negative_indices=False)[0, 0]


def _put(array: jax.Array, x: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
  """array with value at [x, i]: in place, where the array is a loop's."""
  start: list[Any] = [x, i, *[0] * value.ndim]
  return jax.lax.dynamic_update_slice(array, value[None, None], start, allow_negative_indices=False)


def _scan(body: Any, carry: Any, arrays: Any) -> Any:
  """`lax.scan` over the first two axes of all arrays as one; the body is also told the first."""
  first, second = arrays[0].shape[:2]
  x = jnp.repeat(jnp.arange(first, dtype=jnp.int32), second)
  flat = jax.tree.map(lambda y: y.reshape(first * second, *y.shape[2:]), arrays)
  carry, out = jax.lax.scan(body, carry, (x, *flat))
  return carry, jax.tree.map(lambda y: y.reshape(first, second, *y.shape[1:]), out)
