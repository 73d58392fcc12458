"""The optimizers' states in fewer bits, against optax in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intellect3.models import presets, transformer
from intellect3.training import adam, optimizer

CONFIG = presets.tiny(embed_dim=8, head_dim=4, mlp_dim=12, expert_mlp_dim=6, vocab_size=32)
HALF = {"first_moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def params():
  return transformer.init(CONFIG, jax.random.key(0))


def size(state):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_without_dtypes_it_is_optax_own(params):
  ours = optimizer.adamw(learning_rate=0.1, weight_decay=0.2, clip_norm=None)
  grads = jax.tree.map(lambda x: jnp.cos(50 * x), params)
  optax_own = optax.adamw(0.1, weight_decay=0.2)

  @functools.partial(jax.jit, static_argnums=0)
  def step(made, tree, grads):
    return made.update(grads, made.init(tree), tree)[0]

  got = step(ours, params, grads)
  expected = step(optax_own, params["head"], grads["head"])
  np.testing.assert_allclose(got["head"], expected, rtol=1e-6)


@pytest.mark.parametrize("make", [optimizer.adamw, optimizer.muon])
def test_moments_are_kept_in_their_dtypes_at_half_the_bytes(params, make):
  def state(**options):
    return jax.eval_shape(make(learning_rate=0.1, **options).init, params)

  moments = {"adamw": 2, "muon": 1}[make.__name__]
  plain = state()
  assert size(state(first_moment_dtype="float32", second_moment_dtype="float32")) == size(plain)
  one = state(second_moment_dtype="bfloat16")
  both = state(**HALF)
  saved = size(plain) - size(one)
  counted = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    if optimizer.role(path) not in (("matrix", "frozen") if moments == 1 else ("frozen",))
  )
  assert saved == 2 * counted and size(plain) - size(both) == 4 * counted


@pytest.mark.parametrize(
  ("dtypes", "each", "mean"),
  [
    ({"first_moment_dtype": "bfloat16"}, 0.01, 0.0005),
    ({"second_moment_dtype": "bfloat16"}, 0.05, 0.002),
    (HALF, 0.05, 0.002),
  ],
)
def test_updates_are_near_to_those_in_float32(dtypes, each, mean):
  """Relative to the update's root mean square: the largest error, and the error on average."""
  shape, steps, betas = (64, 64), 200, {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
  low, full = adam.scale_by_adam(**betas, **dtypes), optax.scale_by_adam(**betas)

  def step(i, states):
    grad = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), shape)
    return tuple(
      made.update(grad, state)[1] for made, state in zip((low, full), states, strict=True)
    )

  zeros = jnp.zeros(shape)
  states = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, (low.init(zeros), full.init(zeros))))()
  grad = jax.random.normal(jax.random.key(2), shape)
  mine, exact = (
    np.float64(made.update(grad, state)[0]) for made, state in zip((low, full), states, strict=True)
  )
  scale = np.sqrt(np.mean(exact**2))
  assert 0 < np.max(np.abs(mine - exact)) < 8 * each * scale
  assert np.sqrt(np.mean((mine - exact) ** 2)) < each * scale
  assert abs(np.mean(np.abs(mine)) - np.mean(np.abs(exact))) < mean * scale


def test_a_second_moment_falls_with_its_gradients():
  """At b2 = 0.999, where rounding to the nearest would keep it where it is."""
  made = adam.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, second_moment_dtype="bfloat16")
  start = made.init(jnp.zeros(4096))._replace(nu=jnp.ones(4096, jnp.bfloat16))
  assert jnp.bfloat16(0.999 * 1.0) * jnp.bfloat16(1) == 1  # the nearest

  def step(_, state):
    return made.update(jnp.full(4096, 0.1), state)[1]

  state = jax.jit(lambda state: jax.lax.fori_loop(0, 2000, step, state))(start)
  expected = 0.01 + 0.99 * 0.999**2000
  assert np.isclose(np.mean(np.float64(state.nu)), expected, rtol=5e-3)
  assert state.nu.dtype == jnp.bfloat16


def test_rounding_at_random_takes_a_neighbour_and_is_exact_on_average():
  exact = np.float32(1 + 2**-7 * 0.3)  # between 1 and 1 + 2**-7
  rounded = adam.round_at_random(jnp.full(100_000, exact), jax.random.key(0))
  values, counts = np.unique(np.float32(rounded), return_counts=True)
  np.testing.assert_array_equal(values, np.float32([1, 1 + 2**-7]))
  assert np.isclose(counts[1] / 100_000, 0.3, atol=0.006)  # four deviations
  kept = jnp.asarray([0.0, 1.5, -3.0, 2.0**-130])
  np.testing.assert_array_equal(adam.round_at_random(kept, jax.random.key(1)), kept)


def test_each_step_and_parameter_rounds_in_its_own_way_and_always_in_the_same():
  made = optimizer.adamw(learning_rate=0.1, b2=0.0, clip_norm=None, **HALF)
  params = {"head": jnp.ones(512), "embedding": jnp.ones(512)}
  grads = jax.tree.map(lambda x: 1.003 * x, params)
  step = jax.jit(lambda state: made.update(grads, state, params)[1])
  first = step(made.init(params))
  second, again = step(first), step(first)
  jax.tree.map(np.testing.assert_array_equal, second, again)
  moments = [
    np.float32(leaf)
    for state in (first, second)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    if "nu" in jax.tree_util.keystr(path)
  ]
  assert len(moments) == 4
  up = [moment > np.min(moment) for moment in moments]
  assert all(0.05 < np.mean(x) < 0.95 for x in up)
  assert all(np.any(up[i] != up[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("field", ["first_moment_dtype", "second_moment_dtype"])
@pytest.mark.parametrize("make", [optimizer.adamw, optimizer.muon])
def test_another_dtype_is_named(make, field):
  with pytest.raises(ValueError, match=rf"{field}: expected None or one of .*, got 'float16'"):
    make(learning_rate=0.1, **{field: "float16"})
