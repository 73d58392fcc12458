"""Attention against NumPy in float64, query by query, and what nobody may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.kernels.attention import attention, interface, tokamax
from intellect3.kernels.platform import traced_platform
from tests.kernels import attention_cases as cases

B, T, S, N, K, H = 2, 7, 9, 6, 2, 4


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(0, 3, (B, S)), axis=1)[:, ::-1]
  return {
    "q_BTNH": rng.standard_normal((B, T, N, H)).astype(np.float32),
    "k_BSKH": rng.standard_normal((B, S, K, H)).astype(np.float32),
    "v_BSKH": rng.standard_normal((B, S, K, H)).astype(np.float32),
    "q_positions_BT": rng.integers(0, 6, (B, T)),
    "kv_positions_BS": rng.integers(0, 6, (B, S)),
    "q_segment_ids_BT": rng.integers(0, 3, (B, T)),
    "kv_segment_ids_BS": segments,
  }


def oracle(q, k, v, q_positions, kv_positions, q_segments, kv_segments, scale):
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(B, T, N):
    seen = [
      s
      for s in range(S)
      if q_segments[b, t] != 0
      and kv_segments[b, s] == q_segments[b, t]
      and kv_positions[b, s] <= q_positions[b, t]
    ]
    if seen:
      head = n // (N // K)
      scores = np.array([scale * q[b, t, n].astype(np.float64) @ k[b, s, head] for s in seen])
      weights = np.exp(scores - scores.max())
      out[b, t, n] = (weights / weights.sum()) @ v[b, seen, head]
  return out


@pytest.mark.parametrize("seed", range(4))
def test_against_float64(seed):
  arrays = inputs(seed)
  expected = oracle(*arrays.values(), 0.7)
  assert np.any(np.all(expected == 0, axis=(2, 3))) and np.any(expected)
  np.testing.assert_allclose(attention(**arrays, scale=0.7), expected, atol=2e-6)


def test_queries_that_see_nothing_have_no_gradient_and_no_nan():
  arrays = inputs()
  arrays["q_segment_ids_BT"][0] = 0
  floats = {name: arrays.pop(name) for name in ("q_BTNH", "k_BSKH", "v_BSKH")}
  gradient = jax.grad(lambda x: jnp.sum(attention(**x, **arrays, scale=1.0) ** 2))(floats)
  assert all(np.all(np.isfinite(leaf)) for leaf in gradient.values())
  assert not np.any(gradient["q_BTNH"][0]) and np.any(gradient["q_BTNH"][1])


def test_bfloat16_in_bfloat16_out_summed_in_float32():
  arrays = inputs()
  half = {
    name: jnp.asarray(array, jnp.bfloat16) if array.dtype == np.float32 else array
    for name, array in arrays.items()
  }
  out = attention(**half, scale=0.7)
  rounded = [np.asarray(array, np.float64) for array in half.values()]
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(out), oracle(*rounded, 0.7), atol=0.03)


def test_wrong_arguments_are_named():
  arrays = inputs()
  with pytest.raises(ValueError, match=r"attention: expected one of .*'auto'\), got 'flash'"):
    attention(**arrays, scale=1.0, implementation="flash")
  with pytest.raises(ValueError, match="num_heads: expected a multiple of 2"):
    attention(**{**arrays, "q_BTNH": arrays["q_BTNH"][:, :, :5]}, scale=1.0)
  with pytest.raises(AssertionError):
    attention(**{**arrays, "kv_positions_BS": arrays["q_positions_BT"]}, scale=1.0)


@pytest.mark.parametrize(
  ("name", "platform", "dtype", "installed", "expected"),
  [
    ("auto", "cpu", "bfloat16", True, "blockwise"),
    ("auto", "tpu", "bfloat16", True, "blockwise"),
    ("auto", "gpu", "bfloat16", True, "tokamax"),
    ("auto", "gpu", "float32", True, "blockwise"),
    ("auto", "gpu", "bfloat16", False, "blockwise"),
    ("plain", "gpu", "bfloat16", True, "plain"),
    ("tokamax", "gpu", "float16", True, "tokamax"),
    ("tokamax", "gpu", "bfloat16", False, "'tokamax', which is not installed"),
    ("tokamax", "cpu", "bfloat16", True, "plain, blockwise or auto on cpu, got 'tokamax'"),
    ("flash", "cpu", "bfloat16", True, "got 'flash'"),
    ("auto", "cuda", "bfloat16", True, "platform: expected one of .* got 'cuda'"),
  ],
)
def test_names_resolve_by_platform(name, platform, dtype, installed, expected, monkeypatch):
  monkeypatch.setattr(
    interface.importlib.util, "find_spec", lambda package: package if installed else None
  )
  if " " in expected:
    with pytest.raises(ValueError, match=expected):
      interface.resolve(name, platform, dtype)
  else:
    assert interface.resolve(name, platform, dtype) == expected


def test_the_platform_is_that_of_the_mesh_traced_for():
  assert traced_platform() == "cpu"
  with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    assert traced_platform() == "cpu"
  with pytest.raises(ValueError, match="on cpu, got 'tokamax'"):
    attention(**inputs(), scale=1.0, implementation="tokamax")


def test_a_packed_rows_keys_run_from_its_segments_start():
  """What tokamax's mask is told, against token pairs."""
  arguments = cases.packed([[4, 1, 3], [7], []], 11, 1, 1, 1)
  starts_BT = np.asarray(tokamax.segment_starts(jnp.asarray(arguments["q_segment_ids_BT"])))
  index = np.arange(11)
  runs = (index >= starts_BT[:, :, None]) & (index <= index[:, None])
  real = arguments["q_segment_ids_BT"] != 0
  np.testing.assert_array_equal(runs[real], cases.visible(arguments)[real])
  np.testing.assert_array_equal(runs[~real].sum(-1), 1)
