"""What tokamax's kernels are asked for, block by block: two stand-ins for them, in float32.

The kernels run on a GPU alone; how their results are put together does not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from intellect3.kernels.attention import tokamax
from tests.kernels import attention_cases as cases

SCALE = 0.6
LENGTHS = [[30, 3, 13, 8, 1, 30], [64, 21], [96]]


def scores(q, k, k_start_BT, k_end_BT):
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores_BNTS = SCALE * jnp.einsum("BTNH,BSNH->BNTS", q, k)
  index_S = jnp.arange(k.shape[1])
  seen = (index_S >= k_start_BT[..., None]) & (index_S < k_end_BT[..., None])
  return jnp.where(seen[:, None], scores_BNTS, -1e30)


def forward(q, k, v, k_start_BT, k_end_BT, scale):
  assert scale == SCALE
  scores_BNTS = scores(q, k, k_start_BT, k_end_BT)
  lse_BNT = jax.nn.logsumexp(scores_BNTS, axis=-1)
  v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
  return jnp.einsum("BNTS,BSNH->BTNH", jnp.exp(scores_BNTS - lse_BNT[..., None]), v), lse_BNT


def backward(q, k, v, out, lse_BNT, dout, k_start_BT, causal, scale, *, calls):
  """FlashAttention-2's, algorithm 2, of some keys."""
  assert scale == SCALE
  jax.debug.callback(lambda: calls.append(causal))
  keys = k.shape[1]
  ends = jnp.arange(1, keys + 1) if causal else jnp.full(q.shape[1], keys)
  weights_BNTS = jnp.exp(scores(q, k, k_start_BT, ends[None]) - lse_BNT[..., None])
  shape = (*k.shape[:3], -1, k.shape[3])
  v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
  dv = jnp.einsum("BNTS,BTNH->BSNH", weights_BNTS, dout)
  delta = jnp.sum(out * dout, axis=-1).swapaxes(1, 2)[..., None]
  ds = SCALE * weights_BNTS * (jnp.einsum("BTNH,BSNH->BNTS", dout, v) - delta)
  dq = jnp.einsum("BNTS,BSNH->BTNH", ds, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2))
  dk = jnp.einsum("BNTS,BTNH->BSNH", ds, q)
  return dq, dk.reshape(shape).sum(3), dv.reshape(shape).sum(3)


def value_and_gradients(arguments, dout, most, q_starts=None, calls=None):
  calls = [] if calls is None else calls
  kernels = forward, functools.partial(backward, calls=calls)

  @jax.jit
  def run(floats, dout, q_ids, kv_ids, q_starts):
    attend = functools.partial(
      tokamax.on_blocks,
      kernels,
      q_segment_ids_BT=q_ids,
      kv_segment_ids_BS=kv_ids,
      scale=SCALE,
      q_starts=q_starts,
      most=most,
    )
    out, pull = jax.vjp(attend, *floats)
    return out, *pull(dout)

  floats = [arguments[name] for name in cases.FLOATS]
  ids = arguments["q_segment_ids_BT"], arguments["kv_segment_ids_BS"]
  got = run(floats, dout, *ids, q_starts)
  jax.effects_barrier()
  return got


def check(got, expected):
  for name, mine, exact in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
    size = np.max(np.abs(exact))
    np.testing.assert_allclose(mine / size, exact / size, atol=3e-6, err_msg=name)


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(tokamax, "_TILE", 8)


def cotangent(arguments):
  shape = arguments["q_BTNH"].shape
  return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("tokens", "most"), [(96, 32), (101, 24), (96, 4096)])
def test_blocks_add_up_to_the_whole(small_tiles, tokens, most):
  arguments = cases.packed(LENGTHS, tokens, 4, 2, 8)
  dout = cotangent(arguments)
  check(value_and_gradients(arguments, dout, most), cases.oracle(arguments, SCALE, dout))


def test_pieces_of_rows_add_up_to_the_whole(small_tiles):
  arguments = cases.packed(LENGTHS, 96, 4, 2, 8)
  dout = cotangent(arguments)
  expected = cases.oracle(arguments, SCALE, dout)
  got = [np.zeros(x.shape) for x in expected]
  for starts in ((0, 72), (24, 48)):  # the pieces of two ranks
    index = np.concatenate([np.arange(start, start + 24) for start in starts])
    mine = {name: x[:, index] if name.startswith("q_") else x for name, x in arguments.items()}
    parts = value_and_gradients(mine, dout[:, index], 8, np.asarray(starts, np.int32))
    for total, part, place in zip(got, parts, (index, index, ..., ...), strict=True):
      total[(slice(None), place) if place is not ... else ...] += part
  check(got, expected)


@pytest.mark.parametrize(
  ("lengths", "expected"),
  [
    ([96], 6 * 7 // 2),
    ([16] * 6, 6),
    ([32, 64], 3 + 10),
    ([20, 12], 3),  # and four blocks of padding, each with itself
  ],
)
def test_only_blocks_that_see_each_other_are_visited(small_tiles, lengths, expected):
  arguments, calls = cases.packed([lengths], 96, 2, 1, 4), []
  value_and_gradients(arguments, cotangent(arguments), 16, calls=calls)
  padding = (96 - sum(lengths)) // 16
  assert len(calls) == expected + padding
  assert sum(calls) == 6  # each block with its own keys, the rest whole rectangles


def test_blocks_are_near_to_what_is_asked():
  size = tokamax._block_size
  assert [size(n, 4096) for n in (128, 6144, 4096, 65536)] == [128, 3072, 4096, 4096]
  assert size(128 * 97, 4096) == 128 * 97  # a prime: better three times too large than 32 too small


def test_tokamax_reads_a_mask_of_starts_and_ends_as_we_do():
  """Its own plain implementation, which runs here, against float64; what it says of the softmax."""
  base = pytest.importorskip("tokamax._src.ops.attention.base")
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  arguments = cases.packed([[6, 9], [3, 1]], 16, 4, 2, 8)
  q, k, v = (jnp.asarray(arguments[name]) for name in cases.FLOATS)
  starts = tokamax.segment_starts(jnp.asarray(arguments["q_segment_ids_BT"]))
  ends = jnp.broadcast_to(jnp.arange(1, 17), starts.shape)
  mask = base.Mask(k_start=starts[:, None], k_end=ends[:, None])
  out, (top, total) = base.DotProductAttention()(
    q, k, v, mask=mask, logits_scale=SCALE, return_residuals=True
  )
  expected_out, expected_lse = forward(q, k, v, starts, ends, SCALE)
  np.testing.assert_allclose(out, expected_out, atol=2e-6)
  np.testing.assert_allclose(top + jnp.log(total), expected_lse, atol=2e-6)
  out = np.where(arguments["q_segment_ids_BT"][..., None, None] != 0, out, 0)
  np.testing.assert_allclose(out, cases.oracle(arguments, SCALE)[0], atol=2e-6)


def test_what_tokamax_cannot_do_is_named():
  arguments = cases.packed([[4, 1, 3]], 8, 2, 1, 4)
  with pytest.raises(ValueError, match="dtype: tokamax expects bfloat16 or float16, got float32"):
    tokamax.attend(**arguments, scale=1.0)
  half = {
    name: jnp.asarray(array, jnp.bfloat16) if name in cases.FLOATS else array
    for name, array in arguments.items()
  }
  with pytest.raises(ValueError, match="expects a Hopper GPU or newer"):
    tokamax.attend(**half, scale=1.0)
  with pytest.raises(ValueError, match="the same arrays as ids of queries and keys"):
    tokamax.attend(**{**half, "kv_positions_BS": half["q_positions_BT"] + 1}, scale=1.0)
  with pytest.raises(ValueError, match="pieces of a multiple of 128 tokens, got 2 in 8 tokens"):
    tokamax.attend(**half, scale=1.0, q_starts=jnp.zeros(2, jnp.int32))
