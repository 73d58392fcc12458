"""Blockwise attention: values and gradients in any layout, which blocks it visits, its memory."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.kernels.attention import attention, blocks, blockwise, plain
from tests.kernels import attention_cases as cases

SCALE = 0.6
ROOT = pathlib.Path(__file__).resolve().parents[2]


def value_and_gradients(attend, arguments, dout):
  """(out, dq, dk, dv) for a cotangent of the result."""
  rest = {name: array for name, array in arguments.items() if name not in cases.FLOATS}

  @jax.jit
  def run(floats, rest, dout):
    out, pull = jax.vjp(lambda *floats: attend(*floats, **rest, scale=SCALE), *floats)
    return out, *pull(dout)

  return run([arguments[name] for name in cases.FLOATS], rest, dout)


def cotangent(arguments, seed=7):
  return np.random.default_rng(seed).standard_normal(arguments["q_BTNH"].shape).astype(np.float32)


def check(arguments, plan, tolerance=2e-6):
  dout = cotangent(arguments)
  attend = functools.partial(blockwise.attend, plan=plan)
  got = value_and_gradients(attend, arguments, dout)
  for name, mine, expected in zip(
    ("out", "dq", "dk", "dv"), got, cases.oracle(arguments, SCALE, dout), strict=True
  ):
    scale = max(np.max(np.abs(expected)), 1e-3)
    np.testing.assert_allclose(mine / scale, expected / scale, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("serial", [True, False])
def test_packed_rows_against_float64(serial):
  """Segments inside a block, over blocks, at block ends; padding; 3 queries heads to 1 key head."""
  lengths = [[3, 13, 8, 1, 30], [16, 16, 16], [61]]
  check(cases.packed(lengths, 61, 6, 2, 5), blockwise.Plan(16, 8, serial))


@pytest.mark.parametrize("serial", [True, False])
def test_unordered_rows_against_float64(serial):
  check(cases.scattered(2, 21, 34, 3, 3, 4), blockwise.Plan(8, 16, serial))


@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape_layout_and_blocks(data):
  draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
  batch, queries, keys = draw(1, 2), draw(1, 40), draw(1, 40)
  kv_heads, groups, width, seed = draw(1, 3), draw(1, 3), draw(1, 5), draw(0, 99)
  heads = (kv_heads * groups, kv_heads, width)
  if data.draw(st.booleans()):
    arguments = cases.scattered(batch, queries, keys, *heads, seed=seed, segments=draw(1, 4))
  else:
    lengths = [[draw(1, queries // 2 + 1) for _ in range(draw(0, 2))] for _ in range(batch)]
    lengths = [segments if sum(segments) <= queries else [] for segments in lengths]
    arguments = cases.packed(lengths, queries, *heads, seed=seed)
  plan = blockwise.Plan(8 * draw(1, 3), 8 * draw(1, 3), data.draw(st.booleans()))
  check(arguments, plan)


def test_what_sees_nothing_gets_zeros_and_gives_none():
  arguments = cases.packed([[5, 4], []], 20, 4, 2, 4)
  arguments["kv_segment_ids_BS"] = arguments["kv_segment_ids_BS"].copy()
  arguments["kv_segment_ids_BS"][0, :5] = 0
  attend = functools.partial(blockwise.attend, plan=blockwise.Plan(8, 8, True))
  out, dq, dk, dv = value_and_gradients(attend, arguments, cotangent(arguments))
  assert all(np.all(np.isfinite(array)) for array in (out, dq, dk, dv))
  assert np.any(out[0, 5:9]) and not np.any(out[0, :5]) and not np.any(out[0, 9:])
  assert not np.any(out[1]) and not np.any(dq[1]) and not np.any(dk[1]) and not np.any(dv[1])
  assert not np.any(dk[0, :5]) and np.any(dk[0, 5:9])


@pytest.mark.parametrize("size", [100, 1e-4])
def test_large_and_small_scores(size):
  arguments = cases.packed([[9, 20]], 30, 2, 1, 4)
  arguments["q_BTNH"] = arguments["q_BTNH"] * size
  check(arguments, blockwise.Plan(8, 8, True), tolerance=1e-4 if size > 1 else 2e-6)


def test_bfloat16_is_as_exact_as_plain():
  arguments = cases.packed([[40, 24]], 64, 4, 2, 16)
  dout = jnp.asarray(cotangent(arguments), jnp.bfloat16)
  for name in cases.FLOATS:
    arguments[name] = jnp.asarray(arguments[name], jnp.bfloat16)
  expected = cases.oracle(arguments, SCALE, np.asarray(dout))
  attend = functools.partial(blockwise.attend, plan=blockwise.Plan(16, 16, True))
  mine = value_and_gradients(attend, arguments, dout)
  theirs = value_and_gradients(plain.attend, arguments, dout)
  assert all(array.dtype == jnp.bfloat16 for array in mine)
  for name, one, other, exact in zip(
    ("out", "dq", "dk", "dv"), mine, theirs, expected, strict=True
  ):
    error, of_plain = (np.sqrt(np.mean((np.float64(x) - exact) ** 2)) for x in (one, other))
    # The row sums of dq and dk come from the rounded result, as in FlashAttention.
    assert error < (1.1 if name in ("out", "dv") else 2) * of_plain, name


def test_inside_vmap_remat_and_scan():
  arguments = cases.packed([[11, 6], [20]], 20, 2, 1, 4)
  ids = {name: array for name, array in arguments.items() if name not in cases.FLOATS}

  def loss(floats, attend):
    def layer(x, _):
      return jax.checkpoint(lambda x: attend(x, *floats[1:], **ids, scale=SCALE))(x), None

    out, _ = jax.lax.scan(layer, floats[0], None, length=2)
    return jnp.sum(out**2)

  floats = [jnp.stack([arguments[name], 0.5 * arguments[name]]) for name in cases.FLOATS]
  mine, expected = (
    jax.jit(jax.vmap(jax.grad(functools.partial(loss, attend=attend))))(floats)
    for attend in (
      functools.partial(blockwise.attend, plan=blockwise.Plan(8, 8, True)),
      plain.attend,
    )
  )
  for one, other in zip(mine, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=3e-6 * np.max(np.abs(other)))


def block_pairs(arguments, q_block, kv_block):
  """Brute force: bool [B, I, J], whether any token pair of two blocks is visible."""
  seen = cases.visible(arguments)
  batch, queries, keys = seen.shape
  seen = np.pad(seen, [(0, 0), (0, -queries % q_block), (0, -keys % kv_block)])
  shape = (batch, -(-queries // q_block), q_block, -(-keys // kv_block), kv_block)
  return np.any(seen.reshape(shape), axis=(2, 4))


def visible_blocks(arguments, q_block, kv_block):
  names = ("q_segment_ids_BT", "q_positions_BT", "kv_segment_ids_BS", "kv_positions_BS")
  ids = (jnp.asarray(arguments[name], jnp.int32) for name in names)
  return np.asarray(blocks.visible(*ids, q_block=q_block, kv_block=kv_block))


def test_a_packed_row_visits_exactly_the_blocks_it_sees():
  lengths = [[40, 3, 5, 50], [8, 8, 70], [98], [1] * 60, []]
  arguments = cases.packed(lengths, 100, 1, 1, 1)
  for q_block, kv_block in ((8, 8), (16, 8), (8, 32)):
    got = visible_blocks(arguments, q_block, kv_block)
    np.testing.assert_array_equal(got, block_pairs(arguments, q_block, kv_block))
    # Serial, so that the spans are each row's own: they hold no more than the visible blocks.
    spans = np.asarray(blocks.Layout(True, 5, 1).spans(jnp.asarray(got)))
    visited = np.maximum(spans[..., 1] - spans[..., 0], 0)
    np.testing.assert_array_equal(visited, np.sum(got, axis=-1))


@pytest.mark.parametrize("seed", range(5))
def test_no_visible_block_is_left_out_of_any_layout(seed):
  arguments = cases.scattered(4, 43, 51, 1, 1, 1, seed=seed, segments=2 + 4 * seed)
  got = visible_blocks(arguments, 8, 8)
  assert np.all(got >= block_pairs(arguments, 8, 8))
  for serial, rows in ((True, 4), (False, 1)):
    spans = np.asarray(blocks.Layout(serial, 4, 1).spans(jnp.asarray(got)))
    index = np.arange(got.shape[-1])
    visited = (index >= spans[..., :1]) & (index < spans[..., 1:])
    assert np.all(visited >= got) and len(spans) == rows


def test_temporaries_are_linear_in_length():
  def temporaries(tokens):
    shapes = {
      **{name: jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32) for name in cases.FLOATS},
    }
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(floats, segment_ids, positions):
      out = attention(
        **floats,
        q_positions_BT=positions,
        kv_positions_BS=positions,
        q_segment_ids_BT=segment_ids,
        kv_segment_ids_BS=segment_ids,
        scale=SCALE,
        implementation="blockwise",
      )
      return jnp.sum(out**2)

    compiled = jax.jit(jax.grad(loss)).lower(shapes, ids, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporaries(4096), temporaries(16384)
  assert long < 4.5 * short < 4.5 * 16 * 4096 * 2 * 8 * 4


SHARDED = """
import functools, json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from intellect3.kernels.attention import attention
from tests.kernels import attention_cases as cases

arguments = cases.packed([[17, 9], [30]], 32, 4, 2, 8)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
floats = [arguments.pop(name) for name in cases.FLOATS]


def gradients(floats, ids):
  attend = functools.partial(attention, **ids, scale=0.6, implementation="blockwise")
  out, pull = jax.vjp(attend, *floats)
  return out, *pull(out)


expected = jax.jit(gradients)(floats, arguments)
heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
rows = NamedSharding(mesh, PartitionSpec("data"))
with jax.set_mesh(mesh):
  compiled = jax.jit(gradients).lower(
    jax.device_put(floats, heads), jax.device_put(arguments, rows)
  ).compile()
got = compiled(jax.device_put(floats, heads), jax.device_put(arguments, rows))
errors = [float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in zip(got, expected)]
text = compiled.as_text()
print(json.dumps([errors, text.count("all-gather("), str(got[1].sharding.spec)]))
"""


def test_a_mesh_splits_rows_and_heads_without_gathering_them():
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
  }
  result = subprocess.run(
    [sys.executable, "-c", SHARDED], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr[-3000:]
  errors, gathers, spec = json.loads(result.stdout.splitlines()[-1])
  assert max(errors) < 1e-5
  assert not gathers
  assert "data" in spec and "tensor" in spec
