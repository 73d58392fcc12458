"""Paged attention against NumPy in float64 and against the plain kernel; and what a row may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.kernels.attention import attention
from intellect3.kernels.paged_attention import SPAN_TOKENS, paged_attention

LAYERS, HEAD_DIM, SCALE = 2, 8, 0.6
compiled = jax.jit(functools.partial(paged_attention, scale=SCALE))


def inputs(
  *, rows=4, queries=1, heads=4, kv_heads=2, page=16, width=24, longest=None, dtype="f", seed=0
):
  """Rows of random length in random pages; the cache is full of other sequences' numbers."""
  rng = np.random.default_rng(seed)
  pages = rows * width + 3
  shape = (LAYERS, pages, kv_heads, page, HEAD_DIM)
  longest = width * page if longest is None else longest
  ends = np.sort(rng.integers(queries, longest + 1, rows))
  return {
    "q_BTNH": jnp.asarray(rng.normal(size=(rows, queries, heads, HEAD_DIM)), dtype),
    "k_LPKOH": jnp.asarray(rng.normal(size=shape), dtype),
    "v_LPKOH": jnp.asarray(rng.normal(size=shape), dtype),
    "layer": np.int32(1),
    "tables_BW": rng.permutation(pages)[: rows * width].reshape(rows, width).astype(np.int32),
    "positions_BT": (ends[:, None] - queries + np.arange(queries)).astype(np.int32),
    "valid_BT": np.ones((rows, queries), bool),
  }


def gathered(pages_LPKOH, layer, tables_BW):
  """[B, S, K, H]: each row's keys in order, without pages."""
  rows_BWKOH = np.asarray(pages_LPKOH, np.float64)[layer][tables_BW]
  batch, width, kv_heads, page, head_dim = rows_BWKOH.shape
  return rows_BWKOH.transpose(0, 1, 3, 2, 4).reshape(batch, width * page, kv_heads, head_dim)


def oracle(q_BTNH, k_LPKOH, v_LPKOH, layer, tables_BW, positions_BT, valid_BT):
  q = np.asarray(q_BTNH, np.float64)
  k, v = (gathered(pages, layer, tables_BW) for pages in (k_LPKOH, v_LPKOH))
  groups = q.shape[2] // k.shape[2]
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    if valid_BT[b, t]:
      seen = slice(positions_BT[b, t] + 1)
      scores = SCALE * k[b, seen, n // groups] @ q[b, t, n]
      weights = np.exp(scores - scores.max())
      out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // groups]
  return out


@pytest.mark.parametrize(
  ("queries", "heads", "kv_heads", "page", "width"),
  [
    (1, 4, 2, 16, 24),
    (1, 2, 2, SPAN_TOKENS, 3),
    (1, 4, 1, 2 * SPAN_TOKENS, 2),
    (7, 6, 2, 16, 13),
    (16, 4, 4, 48, 5),
    (5, 4, 2, 1, 33),
  ],
)
def test_against_float64_and_the_plain_kernel(queries, heads, kv_heads, page, width):
  """Several spans, spans that do not divide the table, pages longer than a span, rows of all
  lengths."""
  given = inputs(queries=queries, heads=heads, kv_heads=kv_heads, page=page, width=width)
  given["valid_BT"][2, queries // 2 :] = False
  out = np.asarray(compiled(**given))
  np.testing.assert_allclose(out, oracle(**given), atol=2e-6)
  assert not out[2, queries // 2 :].any() and out[0].any()

  k, v = (gathered(given[name], 1, given["tables_BW"]) for name in ("k_LPKOH", "v_LPKOH"))
  every = np.broadcast_to(np.arange(k.shape[1]), k.shape[:2])
  plain = attention(
    given["q_BTNH"],
    jnp.asarray(k, "f"),
    jnp.asarray(v, "f"),
    q_positions_BT=given["positions_BT"],
    kv_positions_BS=every,
    q_segment_ids_BT=given["valid_BT"].astype(np.int32),
    kv_segment_ids_BS=np.ones_like(every),
    scale=SCALE,
  )
  np.testing.assert_allclose(out, plain, atol=2e-6)


def test_bfloat16_in_bfloat16_out_summed_in_float32():
  given = inputs(queries=3, dtype="bfloat16", longest=384)
  out = compiled(**given)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(out), oracle(**given), atol=0.02)


@pytest.mark.parametrize("queries", [1, 4])
def test_a_rows_bits_do_not_depend_on_the_others_nor_on_where_its_pages_are(queries):
  given = inputs(queries=queries, longest=60, seed=1)
  alone = {**given, "valid_BT": given["valid_BT"] & (np.arange(4) == 0)[:, None]}
  crowded = {**given, "positions_BT": given["positions_BT"].copy()}
  crowded["positions_BT"][1:] += 300  # the others now reach several spans further
  moved = np.random.default_rng(2).permutation(given["k_LPKOH"].shape[1])
  elsewhere = {
    **given,
    "k_LPKOH": given["k_LPKOH"][:, moved],
    "v_LPKOH": given["v_LPKOH"][:, moved],
    "tables_BW": np.argsort(moved)[given["tables_BW"]].astype(np.int32),
  }
  first = np.asarray(compiled(**given))
  for other in (alone, crowded, elsewhere):
    np.testing.assert_array_equal(np.asarray(compiled(**other))[0], first[0])
  assert np.any(np.asarray(compiled(**crowded))[1] != first[1])


def test_rows_may_share_pages_and_tables_may_end_in_anything():
  given = inputs(queries=2, page=16, longest=100, seed=3)
  first = np.asarray(compiled(**given))
  tables = given["tables_BW"].copy()
  for row, last in enumerate(given["positions_BT"].max(axis=1) // 16):
    tables[row, last + 1 :] = tables[0, 0]
  np.testing.assert_array_equal(np.asarray(compiled(**{**given, "tables_BW": tables})), first)
  shared = {name: value.copy() for name, value in given.items()}
  shared["tables_BW"][1], shared["positions_BT"][1] = tables[0], given["positions_BT"][0]
  shared["q_BTNH"] = given["q_BTNH"].at[1].set(given["q_BTNH"][0])
  out = np.asarray(compiled(**shared))
  np.testing.assert_array_equal(out[1], out[0])
  np.testing.assert_array_equal(out[0], first[0])


def test_what_a_row_may_not_see_may_be_anything_as_long_as_values_are_finite():
  given = inputs(queries=2, longest=100, seed=4)
  expected = np.asarray(compiled(**given))
  for name, garbage in (("k_LPKOH", np.nan), ("v_LPKOH", np.finfo(np.float32).max)):
    pages = np.full(given[name].shape, garbage, np.float32)
    for table, last in zip(given["tables_BW"], given["positions_BT"][:, -1], strict=True):
      for place in range(last + 1):
        at = (slice(None), table[place // 16], slice(None), place % 16)
        pages[at] = np.asarray(given[name])[at]
    given[name] = jnp.asarray(pages)
  np.testing.assert_array_equal(np.asarray(compiled(**given)), expected)


def test_wrong_heads_are_named():
  with pytest.raises(ValueError, match="num_heads: expected a multiple of 2"):
    compiled(**inputs(heads=5))
