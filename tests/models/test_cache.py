"""Prefill and decode through pages against the full forward, and the cache's place in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.models import cache as kv
from intellect3.models import presets, transformer
from tests.models import helpers

CONFIG = helpers.small()
PAGES, PAGE, WIDTH, CHUNK = 14, 4, 6, 8
LENGTH = PAGE * WIDTH
# Rows of any order of pages; both begin in the same two.
TABLES = np.array([[9, 2, 13, 0, 5, 7], [9, 2, 1, 11, 4, 12]], np.int32)


def stale_cache(config=CONFIG, seed=3):
  """A cache full of earlier tenants' numbers."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 3, x.shape), x.dtype), kv.init(config, PAGES, PAGE)
  )


def full_rows():
  """Two rows of one segment each that share their first two pages' tokens."""
  tokens, positions, segment_ids = helpers.rows(CONFIG, 2, LENGTH)
  tokens[1, : 2 * PAGE] = tokens[0, : 2 * PAGE]
  return tokens, positions, segment_ids


def test_prefill_in_chunks_and_decode_are_the_full_forward():
  """One call holds chunks of both rows, several of one, and reads what it writes; the second row
  reads its first pages from the first's."""
  params = helpers.random_params(CONFIG)
  tokens, positions, segment_ids = full_rows()
  full = helpers.forward(CONFIG, params, tokens, positions, segment_ids)
  # (row, start, end) of every row of each call; the second row's shared beginning is not computed.
  calls = [[(1, 8, 14), (0, 0, 8)], [(0, 16, 19), (0, 8, 16)]]
  cache, load = stale_cache(), 0
  hidden = np.full_like(full.hidden_BTD, np.nan)
  experts = np.full_like(full.router.experts_LBTA, -1)

  def run(call, width):
    nonlocal cache, load
    shape = (len(call), width)
    given = [np.zeros(shape, np.int32) for _ in range(3)]
    tables = np.full((len(call), WIDTH), 3, np.int32)
    for index, chunk in enumerate(call):
      if chunk is not None:
        row, start, end = chunk
        for array, source in zip(given, (tokens, positions, segment_ids), strict=True):
          array[index, : end - start] = source[row, start:end]
        tables[index] = TABLES[row]
    out = helpers.forward_cached(CONFIG, params, *given, cache, tables)
    for index, chunk in enumerate(call):
      if chunk is not None:
        row, start, end = chunk
        hidden[row, start:end] = out.hidden_BTD[index, : end - start]
        experts[:, row, start:end] = out.router.experts_LBTA[:, index, : end - start]
    cache, load = out.cache, load + out.router.load_LE

  for call in calls:
    run(call, CHUNK)
  for step in range(max(LENGTH - 19, LENGTH - 14)):
    at = (19 + step, 14 + step)
    call = [(row, at[row], at[row] + 1) if at[row] < LENGTH else None for row in (1, 0)]
    run(call, 1)
  np.testing.assert_allclose(hidden[0], full.hidden_BTD[0], atol=1e-5)
  np.testing.assert_allclose(hidden[1, 8:], full.hidden_BTD[1, 8:], atol=1e-5)
  np.testing.assert_array_equal(experts[:, 0], full.router.experts_LBTA[:, 0])
  np.testing.assert_array_equal(experts[:, 1, 8:], full.router.experts_LBTA[:, 1, 8:])
  shared = experts[:, 0, : 2 * PAGE, :, None] == np.arange(CONFIG.num_experts)
  np.testing.assert_array_equal(load + shared.sum(axis=(1, 2)), full.router.load_LE)


def test_only_valid_tokens_write_and_only_to_their_pages():
  params = helpers.random_params(CONFIG)
  tokens, positions, segment_ids = helpers.rows(CONFIG, 2, CHUNK)
  segment_ids[0, 5:] = 0
  positions = positions + np.int32([[2], [22]])  # the second row runs past the end of its table
  before = stale_cache()
  tables = np.array([[3, 6, 6, 6, 6, 6], [8, 8, 8, 8, 8, 10]], np.int32)
  out = helpers.forward_cached(CONFIG, params, tokens, positions, segment_ids, before, tables)
  for old, new in zip(before, out.cache, strict=True):
    changed = np.any(np.asarray(old != new), axis=(2, 4))
    expected = np.zeros((CONFIG.num_layers, PAGES, PAGE), bool)
    expected[:, 3, 2:] = expected[:, 6, :3] = expected[:, 10, 2:] = True
    np.testing.assert_array_equal(changed, expected)


def test_broken_weights_leave_nothing_behind():
  """What they computed is no number; who gets their pages next is as well off as anybody."""
  params = helpers.random_params(CONFIG)
  broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
  rows = full_rows()
  expected = helpers.forward(CONFIG, params, *rows).hidden_BTD
  first = [array[:, :CHUNK] for array in rows]
  spoilt = helpers.forward_cached(CONFIG, broken, *first, stale_cache(), TABLES)
  assert np.isnan(np.asarray(spoilt.hidden_BTD)).all()
  first[2] = first[2] * (first[1] < 5)
  out = helpers.forward_cached(CONFIG, params, *first, spoilt.cache, TABLES)
  np.testing.assert_allclose(out.hidden_BTD[:, :5], expected[:, :5], atol=1e-5)


def test_decode_updates_the_donated_cache_in_place():
  config = presets.tiny(num_layers=8, num_heads=4, num_kv_heads=4, head_dim=32)
  params, _ = transformer.abstract(config)
  cache = jax.eval_shape(lambda: kv.init(config, 8 * 16, 64))
  size = sum(leaf.size * 4 for leaf in cache)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(params, cache, tokens, positions, tables):
    out = transformer.Transformer(config).apply(
      {"params": params}, tokens, positions, jnp.ones_like(tokens), cache, tables
    )
    return out.hidden_BTD, out.cache

  row, tables = (jax.ShapeDtypeStruct((8, width), jnp.int32) for width in (1, 16))
  memory = step.lower(params, cache, row, row, tables).compile().memory_analysis()
  assert memory.alias_size_in_bytes == size
  # A layer's own keys and values may be copied, not the other layers'.
  assert memory.temp_size_in_bytes < size / 4


def test_the_cache_has_the_computation_dtype():
  cache = kv.init(dataclasses.replace(CONFIG, dtype="bfloat16"), 2, 8)
  assert cache.v_LPKOH.dtype == jnp.bfloat16 and cache.k_LPKOH.shape == (3, 2, 2, 8, 16)


def test_wrong_tables_are_named():
  shapes, _ = transformer.abstract(CONFIG)
  row = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  cache = jax.eval_shape(lambda: kv.init(CONFIG, 3, 8))

  def run(cache, tables):
    apply = transformer.Transformer(CONFIG).apply
    jax.eval_shape(apply, {"params": shapes}, row, row, row, cache, tables)

  with pytest.raises(ValueError, match="tables_BW: expected one to go with cache, got None"):
    run(cache, None)
  with pytest.raises(ValueError, match="cache: expected one to go with tables_BW, got None"):
    run(None, jax.ShapeDtypeStruct((2, 3), jnp.int32))
  with pytest.raises(ValueError, match=r"tables_BW: expected \[2, pages\], got \[3, 1\]"):
    run(cache, jax.ShapeDtypeStruct((3, 1), jnp.int32))
  for pages, page_size in ((0, 8), (8, 0)):
    with pytest.raises(ValueError, match=f"at least 1, got {pages}, {page_size}"):
      kv.init(CONFIG, pages, page_size)
