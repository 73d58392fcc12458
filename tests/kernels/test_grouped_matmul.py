"""Routed experts: blocked against dense, dense against NumPy; the layout of the dispatch."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from intellect3.kernels import dispatch
from intellect3.kernels.grouped_matmul import expert_mlp, interface, resolve

T, D, F, E, A = 29, 6, 5, 7, 3
NAMES = ("x", "gate", "up", "down", "weights")


def inputs(routing="random", dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((T, D))
  gate, up = rng.standard_normal((2, E, D, F))
  down = rng.standard_normal((E, F, D))
  weights = rng.random((T, A))
  if routing == "random":
    experts = np.argsort(rng.random((T, E)), axis=1)[:, :A]
  else:  # every token to the same few experts; the others get none
    experts = np.broadcast_to([5, 0, 6], (T, A))
  floats = tuple(jnp.asarray(array, dtype) for array in (x, gate, up, down, weights))
  return floats, experts.astype(np.int32)


def run(x, gate, up, down, weights, experts, implementation, block_size):
  return expert_mlp(
    *(x, gate, up, down, experts, weights), implementation=implementation, block_size=block_size
  )


@functools.partial(jax.jit, static_argnames=("implementation", "block_size"))
def run_with_gradients(floats, experts, implementation, block_size):
  def loss(floats):
    out = run(*floats, experts, implementation, block_size)
    cotangent = jnp.sin(jnp.arange(out.shape[1]))
    return jnp.sum(out.astype(jnp.float32) * cotangent), out

  return jax.grad(loss, has_aux=True)(floats)


def test_dense_against_float64():
  floats, experts = inputs()
  x, gate, up, down, weights = (np.asarray(array, np.float64) for array in floats)
  expected = np.zeros((T, D))
  for t, a in np.ndindex(T, A):
    e = experts[t, a]
    g = x[t] @ gate[e]
    expected[t] += weights[t, a] * ((g / (1 + np.exp(-g)) * (x[t] @ up[e])) @ down[e])
  given = run(*floats, experts, "dense", 1)
  np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["random", "skewed"])
@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_blocked_is_dense_with_its_gradients(routing, block_size):
  floats, experts = inputs(routing)
  gradients, out = run_with_gradients(floats, experts, "blocked", block_size)
  expected_gradients, expected = run_with_gradients(floats, experts, "dense", 1)
  np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
  for name, given, want in zip(NAMES, gradients, expected_gradients, strict=True):
    assert np.any(want), name
    np.testing.assert_allclose(given, want, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_bfloat16_keeps_its_dtypes():
  floats, experts = inputs(dtype=jnp.bfloat16)
  gradients, out = run_with_gradients(floats, experts, "blocked", 8)
  assert out.dtype == jnp.bfloat16 and {g.dtype for g in gradients} == {jnp.dtype("bfloat16")}
  wide = tuple(array.astype(jnp.float32) for array in floats)
  expected_gradients, expected = run_with_gradients(wide, experts, "dense", 1)
  np.testing.assert_allclose(np.float32(out), expected, atol=0.03 * np.abs(expected).max())
  for name, given, want in zip(NAMES, gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(
      np.float32(given), want, atol=0.03 * np.abs(want).max(), err_msg=name
    )


def test_the_backward_pass_holds_one_gradient_of_the_experts():
  """Weight gradients are added in place, not as a full array per block."""
  experts, embed, mlp, tokens = 32, 64, 64, 256
  floats = [(tokens, embed), (experts, embed, mlp), (experts, embed, mlp), (experts, mlp, embed)]
  shapes = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in (*floats, (tokens, 2)))
  routed = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
  lowered = run_with_gradients.lower(shapes, routed, "blocked", 8)
  stacks = 3 * experts * embed * mlp * 4
  assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.5 * stacks


def test_memory_grows_with_the_pairs_not_with_the_experts_per_pair():
  """Twice the tokens need at most twice the temporaries, and no pair a copy of its expert."""

  def temporaries(tokens):
    experts, embed, mlp, choices = 16, 32, 32, 4
    floats = [(tokens, embed), (experts, embed, mlp), (experts, embed, mlp), (experts, mlp, embed)]
    shapes = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in (*floats, (tokens, choices)))
    routed = jax.ShapeDtypeStruct((tokens, choices), jnp.int32)
    compiled = run_with_gradients.lower(shapes, routed, "blocked", 64).compile()
    return compiled.memory_analysis().temp_size_in_bytes, tokens * choices

  (few, pairs), (many, _) = temporaries(2048), temporaries(4096)
  assert many < 2.1 * few
  # Per pair a row of x's width, two of the experts', and indices; a copy of the expert for every
  # block of 64 rows would add 48 numbers.
  assert few < pairs * 4 * (32 + 2 * 32 + 64)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  shape=st.sampled_from([(1, 1, 1), (1, 8, 8), (13, 1, 1), (13, 5, 1), (40, 16, 5)]),
  spread=st.sampled_from(["all to one", "few", "even"]),
  seed=st.integers(0, 1000),
)
def test_blocked_is_dense_for_any_shape_and_routing(shape, spread, seed):
  tokens, experts, choices = shape
  rng = np.random.default_rng(seed)
  slope = {"all to one": 100.0, "few": 3.0, "even": 0.0}[spread]
  keys = rng.random((tokens, experts)) + slope * np.arange(experts)
  chosen = np.argsort(keys, axis=1)[:, :choices].astype(np.int32)
  x = rng.standard_normal((tokens, 3))
  gate, up = rng.standard_normal((2, experts, 3, 2))
  down, weights = rng.standard_normal((experts, 2, 3)), rng.random((tokens, choices))
  floats = tuple(np.float32(array) for array in (x, gate, up, down, weights))
  gradients, out = run_with_gradients(floats, chosen, "blocked", 8)
  expected_gradients, expected = run_with_gradients(floats, chosen, "dense", 1)
  np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
  for name, given, want in zip(NAMES, gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(given, want, atol=2e-5 * np.abs(want).max() + 1e-7, err_msg=name)


def test_a_token_does_not_depend_on_the_others():
  floats, experts = inputs()
  alone = jax.jit(run, static_argnames=("implementation", "block_size"))
  out = alone(*floats, experts, "blocked", 8)
  x = floats[0].at[1:].set(floats[0][1:][::-1] * 2)
  others = np.concatenate([experts[:1], np.broadcast_to([4, 1, 2], (T - 1, A))]).astype(np.int32)
  np.testing.assert_array_equal(alone(x, *floats[1:], others, "blocked", 8)[0], out[0])


def without_experts(seed=1):
  """Pairs without experts among others, tokens with none whose rows are NaN; and the latter."""
  floats, experts = inputs()
  experts = np.where(np.random.default_rng(seed).random((T, A)) < 0.4, E, experts)
  experts[::4] = E
  none = np.all(experts == E, axis=1)
  x, gate, up, down, weights = floats
  x = jnp.where(none[:, None], jnp.nan, x)
  weights = jnp.where(experts == E, jnp.nan, weights)
  return (x, gate, up, down, weights), experts.astype(np.int32), none


def pull_back(floats, experts, none, implementation):
  """The output and its gradients under a cotangent that is NaN where there is no expert."""

  @jax.jit
  def both(floats):
    out, pull = jax.vjp(lambda f: run(*f, experts, implementation, 8), floats)
    return out, pull(jnp.where(none[:, None], jnp.nan, jnp.cos(jnp.arange(D))))[0]

  return both(floats)


def check_without_experts(implementation):
  floats, experts, none = without_experts()
  out, gradients = pull_back(floats, experts, none, implementation)
  # The witness has one expert more, of zeros, and no NaN.
  x, gate, up, down, weights = (np.nan_to_num(array) for array in floats)
  more = tuple(np.concatenate([stack, stack[:1] * 0]) for stack in (gate, up, down))
  want, pull = jax.vjp(lambda f: run(*f, experts, "dense", 1), (x, *more, weights))
  cotangent = jnp.where(none[:, None], 0, jnp.cos(jnp.arange(D)))
  wants = [g if len(g) != E + 1 else g[:E] for g in pull(jnp.broadcast_to(cotangent, (T, D)))[0]]
  np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
  assert not np.any(out[none]) and not np.any(gradients[4][experts == E])
  for name, given, wanted in zip(NAMES, gradients, wants, strict=True):
    np.testing.assert_allclose(given, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_pairs_without_experts_reach_nothing(implementation):
  check_without_experts(implementation)


def test_tokamax_multiplies_no_rows_beyond_its_groups(monkeypatch):
  """With a stand-in for its kernel that leaves NaN in rows beyond the sum of the groups' sizes."""
  pytest.importorskip("tokamax")

  def ragged_dot(x, stack, *, group_sizes, implementation):
    assert implementation == "triton"
    return stand_in(x, stack, group_sizes)

  monkeypatch.setattr("tokamax.ragged_dot", ragged_dot)
  monkeypatch.setattr(interface, "resolve", lambda name, platform: name)
  check_without_experts("tokamax")
  floats, experts = inputs()
  given = run(*floats, experts, "tokamax", 1)
  np.testing.assert_allclose(given, run(*floats, experts, "dense", 1), rtol=1e-4, atol=1e-5)


@jax.custom_vjp
def stand_in(x_PD, stack_EDF, sizes_E):
  group_P, beyond_P = _groups(x_PD, sizes_E)
  y_PF = jnp.einsum("PD,PDF->PF", x_PD, stack_EDF[group_P])
  return jnp.where(beyond_P[:, None], jnp.nan, y_PF)


def _groups(x_PD, sizes_E):
  ends_E = jnp.cumsum(sizes_E)
  row_P = jnp.arange(len(x_PD))
  group_P = jnp.sum(row_P[:, None] >= ends_E, axis=1)
  return jnp.minimum(group_P, len(sizes_E) - 1), row_P >= ends_E[-1]


def _stand_in_bwd(saved, dy_PF):
  x_PD, stack_EDF, sizes_E = saved
  group_P, beyond_P = _groups(x_PD, sizes_E)
  dx_PD = jnp.einsum("PF,PDF->PD", dy_PF, stack_EDF[group_P])
  x_PD, dy_PF = (jnp.where(beyond_P[:, None], 0, array) for array in (x_PD, dy_PF))
  one_PE = jax.nn.one_hot(group_P, len(sizes_E))
  dstack_EDF = jnp.einsum("PE,PD,PF->EDF", one_PE, x_PD, dy_PF)
  nothing = np.zeros(sizes_E.shape, jax.dtypes.float0)
  return jnp.where(beyond_P[:, None], jnp.nan, dx_PD), dstack_EDF, nothing


stand_in.defvjp(lambda *arrays: (stand_in(*arrays), arrays), _stand_in_bwd)


def test_a_name_is_resolved_by_platform(monkeypatch):
  found = "intellect3.kernels.grouped_matmul.interface.importlib.util.find_spec"
  monkeypatch.setattr(found, lambda name: None)
  assert [resolve("auto", platform) for platform in ("cpu", "gpu", "tpu")] == ["blocked"] * 3
  with pytest.raises(ValueError, match=r"grouped_matmul: .*'tokamax', which is not installed"):
    resolve("tokamax", "gpu")
  monkeypatch.setattr(found, lambda name: name)
  assert [resolve("auto", platform) for platform in ("cpu", "gpu", "tpu")] == [
    "blocked",
    "tokamax",
    "blocked",
  ]
  assert resolve("tokamax", "gpu") == "tokamax" and resolve("dense", "tpu") == "dense"
  with pytest.raises(ValueError, match="grouped_matmul: expected dense, blocked or auto on cpu"):
    resolve("tokamax", "cpu")
  with pytest.raises(ValueError, match=r"platform: expected one of .*, got 'metal'"):
    resolve("auto", "metal")


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 10_000), skew=st.floats(0, 5), block_size=st.sampled_from([4, 8])
)
def test_the_plan_gives_every_pair_its_row_among_its_experts_rows(seed, skew, block_size):
  rng = np.random.default_rng(seed)
  keys = rng.random((T, E)) + skew * np.arange(E) / E
  experts = np.argsort(keys, axis=1)[:, :A].astype(np.int32)
  if seed % 2:  # a token that chose an expert twice, as a replayed choice may
    experts[:, 1] = experts[:, 0]
  plan = make_plan(experts, block_size)
  rows, counts, starts = (np.asarray(a) for a in (plan.rows_TA, plan.counts_E, plan.starts_E))
  assert sorted(rows.flat) == list(range(T * A))
  np.testing.assert_array_equal(counts, np.bincount(experts.flat, minlength=E))
  np.testing.assert_array_equal(plan.blocks_E, -(-counts // block_size))
  assert np.all((starts[experts] <= rows) & (rows < (starts + counts)[experts]))
  tokens = np.asarray(plan.tokens_P)
  assert len(tokens) == T * A + block_size
  np.testing.assert_array_equal(tokens[rows], np.broadcast_to(np.arange(T)[:, None], (T, A)))
  used = np.flatnonzero(counts)
  np.testing.assert_array_equal(np.asarray(plan.used_E)[: plan.num_used], used)


@functools.partial(jax.jit, static_argnums=1)
def make_plan(experts, block_size):
  return dispatch.plan(experts, num_experts=E, block_size=block_size)


def test_wrong_arguments_are_named():
  floats, experts = inputs()
  with pytest.raises(ValueError, match=r"grouped_matmul: expected one of .*, got 'ragged'"):
    run(*floats, experts, "ragged", 8)
  with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
    run(*floats, experts, "blocked", 0)
  with pytest.raises(AssertionError):
    run(*floats, experts[:, :2], "blocked", 8)
