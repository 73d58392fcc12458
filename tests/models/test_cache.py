"""Prefill and decode against the full forward pass, and the cache's place in memory."""

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
SLOTS, LENGTH, CHUNK = 4, 24, 8


def stale_cache(seed=3):
  """A cache full of an earlier tenant's numbers."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 3, x.shape), x.dtype), kv.init(CONFIG, SLOTS, LENGTH)
  )


def test_prefill_in_chunks_and_decode_are_the_full_forward():
  params = helpers.random_params(CONFIG)
  tokens, positions, segment_ids = helpers.rows(CONFIG, 2, LENGTH)
  full = helpers.forward(CONFIG, params, tokens, positions, segment_ids)
  prompts, slots = (13, 6), np.int32([3, 1])
  cache, load = stale_cache(), 0
  hidden = np.zeros_like(full.hidden_BTD)

  for start in range(0, max(prompts), CHUNK):
    window = slice(start, start + CHUNK)
    valid = positions[:, window] < np.array(prompts)[:, None]
    out = helpers.forward_cached(
      CONFIG,
      params,
      np.where(valid, tokens[:, window], 0),
      positions[:, window],
      valid.astype(np.int32),
      cache,
      slots,
    )
    hidden[:, window] = np.where(valid[..., None], out.hidden_BTD, hidden[:, window])
    cache, load = out.cache, load + out.router.load_LE

  # Decode takes all slots in order; the rows' slots are 3 and 1, the others idle.
  at = np.array([prompts[1], prompts[0]])
  while np.any(at < LENGTH):
    row_tokens, row_positions = np.zeros((SLOTS, 1), np.int32), np.zeros((SLOTS, 1), np.int32)
    valid = np.zeros((SLOTS, 1), np.int32)
    for slot, row, position in ((1, 1, at[0]), (3, 0, at[1])):
      if position < LENGTH:
        row_tokens[slot], row_positions[slot], valid[slot] = tokens[row, position], position, 1
    out = helpers.forward_cached(
      CONFIG, params, row_tokens, row_positions, valid, cache, None
    )  # fmt: skip
    for slot, row, position in ((1, 1, at[0]), (3, 0, at[1])):
      if position < LENGTH:
        hidden[row, position] = out.hidden_BTD[slot, 0]
    cache, load, at = out.cache, load + out.router.load_LE, at + 1
  np.testing.assert_allclose(hidden, full.hidden_BTD, atol=1e-5)
  np.testing.assert_array_equal(load, full.router.load_LE)


def test_only_valid_tokens_write_and_only_to_their_slot():
  params = helpers.random_params(CONFIG)
  tokens, positions, segment_ids = helpers.rows(CONFIG, 2, CHUNK)
  segment_ids[0, 5:] = 0
  positions = positions + np.int32([[2], [20]])  # the second row runs past the end of its slot
  before = stale_cache()
  out = helpers.forward_cached(
    CONFIG, params, tokens, positions, segment_ids, before, np.int32([2, 0])
  )
  for old, new in zip(before, out.cache, strict=True):
    changed = np.any(np.asarray(old != new), axis=(3, 4))
    expected = np.zeros((CONFIG.num_layers, SLOTS, LENGTH), bool)
    expected[:, 2, 2:7] = expected[:, 0, 20:24] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("slots", [None, "all"])
def test_decode_updates_the_donated_cache_in_place(slots):
  config = presets.tiny(num_layers=8, num_heads=4, num_kv_heads=4, head_dim=32)
  params, _ = transformer.abstract(config)
  cache = jax.eval_shape(lambda: kv.init(config, 8, 1024))
  size = sum(leaf.size * 4 for leaf in cache)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(params, cache, tokens, positions):
    rows = None if slots is None else jnp.arange(8)
    out = transformer.Transformer(config).apply(
      {"params": params}, tokens, positions, jnp.ones_like(tokens), cache, rows
    )
    return out.hidden_BTD, out.cache

  row = jax.ShapeDtypeStruct((8, 1), jnp.int32)
  memory = step.lower(params, cache, row, row).compile().memory_analysis()
  assert memory.alias_size_in_bytes == size
  # A layer's own keys and values may be copied, not the other layers'.
  assert memory.temp_size_in_bytes < size / 4


def test_the_cache_has_the_computation_dtype():
  cache = kv.init(dataclasses.replace(CONFIG, dtype="bfloat16"), 2, 8)
  assert cache.k_LBSKH.dtype == jnp.bfloat16 and cache.k_LBSKH.shape == (3, 2, 8, 2, 16)


def test_wrong_slots_are_named():
  shapes, _ = transformer.abstract(CONFIG)
  row = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  cache = jax.eval_shape(lambda: kv.init(CONFIG, 3, 8))

  def run(cache, slots):
    apply = transformer.Transformer(CONFIG).apply
    jax.eval_shape(apply, {"params": shapes}, row, row, row, cache, slots)

  with pytest.raises(ValueError, match=r"slots_B: expected one per row \(2\), got None"):
    run(cache, None)
  with pytest.raises(ValueError, match=r"slots_B: expected shape \[2\], got \[3\]"):
    run(cache, jax.ShapeDtypeStruct((3,), jnp.int32))
  with pytest.raises(ValueError, match="slots_B: expected None without a cache"):
    run(None, jax.ShapeDtypeStruct((2,), jnp.int32))
  with pytest.raises(ValueError, match="cache: expected slots and length of at least 1, got 0, 8"):
    kv.init(CONFIG, 0, 8)
