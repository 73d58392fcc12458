"""Which parameter gets which update, and the updates against NumPy and plain optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from intellect3.models import presets, transformer
from intellect3.training import muon, optimizer, schedule

CONFIG = presets.tiny(embed_dim=8, head_dim=4, mlp_dim=12, expert_mlp_dim=6, vocab_size=32)


def _path(key_path):
  return "/".join(key.key for key in key_path)


@pytest.fixture(scope="module")
def params():
  return transformer.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def grads(params):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)


def _apply(made, params, grads, steps=1):
  @jax.jit  # one program instead of hundreds of small ones
  def run(params, grads):
    state = made.init(params)
    for _ in range(steps):
      updates, state = made.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  return run(params, grads)


@pytest.mark.parametrize(
  "config",
  [CONFIG, presets.tiny(qk_norm=True), presets.glm_4_5_air(), presets.tiny(tie_embeddings=True)],
)
def test_roles_agree_with_the_logical_axes(config):
  # The witness: the model's own axis names, which the optimizer does not read.
  shapes, axes = transformer.abstract(config)
  paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
  names = jax.tree.structure(shapes).flatten_up_to(axes)
  for (path, shape), axis_names in zip(paths, names, strict=True):
    inner = [axis for axis in axis_names if axis not in ("layers", "experts")]
    if path[-1].key == "correction_bias":
      expected = "frozen"
    elif "vocab" in inner:
      expected = "table"
    elif "router" in _path(path):
      expected = "router"
    elif "embed" in inner and {"mlp", "heads", "kv_heads"} & set(inner):
      expected = "matrix"
    else:
      expected = "vector"
    assert optimizer.role(path) == expected, _path(path)
    if expected == "matrix":
      matrix = muon.MATRICES[path[-2].key, path[-1].key]
      assert muon.logical_axes(matrix, len(shape.shape)) == axis_names
      assert ("embed",) in (matrix.inputs, matrix.outputs)


def test_an_unknown_name_is_an_error():
  with pytest.raises(ValueError, match="surprise/kernel"):
    optimizer.adamw(learning_rate=1.0).init({"surprise": {"kernel": jnp.ones((2, 2))}})


def test_adamw_is_the_papers_in_numpy(params, grads):
  rate, b1, b2, eps, decay, steps = 0.01, 0.8, 0.9, 1e-6, 0.1, 3
  made = optimizer.adamw(
    learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=None
  )
  after = _apply(made, params, grads, steps)

  def oracle(path, value, gradient):
    value, gradient = np.float64(value), np.float64(gradient)
    kind = optimizer.role(path)
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step in range(1, steps + 1):
      first = b1 * first + (1 - b1) * gradient
      second = b2 * second + (1 - b2) * gradient**2
      update = first / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + eps)
      update += decay * value * (kind in ("matrix", "table", "router"))
      value = value - rate * update * (kind != "frozen")
    return value

  expected = jax.tree_util.tree_map_with_path(oracle, params, grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * rate + 1e-6), after, expected
  )


def test_the_frozen_bias_never_moves_and_is_not_in_the_norm(params, grads):
  loud = jax.tree_util.tree_map_with_path(
    lambda path, g: g * np.float32(1e6 if path[-1].key == "correction_bias" else 1), grads
  )
  for make in (optimizer.adamw, optimizer.muon):
    made = make(learning_rate=0.1, weight_decay=0.5, clip_norm=0.1)
    shifted = jax.tree.map(lambda x: np.asarray(x) + np.float32(1.0), params)
    quiet, noisy = _apply(made, shifted, grads), _apply(made, shifted, loud)
    jax.tree.map(np.testing.assert_array_equal, quiet, noisy)
    bias = noisy["moe_layers"]["moe"]["router"]["correction_bias"]
    np.testing.assert_array_equal(bias, shifted["moe_layers"]["moe"]["router"]["correction_bias"])


def test_clipping_bounds_the_global_norm(params, grads):
  made = optimizer.adamw(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e9, clip_norm=0.5)
  # With an eps this large the update is the clipped gradient over eps.
  after = _apply(made, jax.tree.map(np.zeros_like, params), grads)
  norm = np.sqrt(sum(float((np.float64(leaf) ** 2).sum()) for leaf in jax.tree.leaves(after)))
  assert np.isclose(norm * 1e9, 0.5, rtol=1e-3)


def _orthogonalised(matrix):
  """Five quintic Newton-Schulz steps in float64 (Jordan et al., 2024)."""
  tall = matrix.shape[0] > matrix.shape[1]
  x = matrix.T if tall else matrix
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if tall else x


def test_muon_orthogonalises_each_matrix_of_a_stack(params, grads):
  rate, decay = 0.01, 0.3
  made = optimizer.muon(learning_rate=rate, weight_decay=decay, clip_norm=None)
  after = _apply(made, params, grads)
  adam = _apply(
    optimizer.adamw(learning_rate=rate, weight_decay=decay, clip_norm=None), params, grads
  )

  def expected(path, value, gradient, plain):
    if optimizer.role(path) != "matrix":
      return np.float64(plain)
    value, name = np.float64(value), _path(path)
    split = 2 if any(part in name for part in ("/q/", "/k/", "/v/")) else 1
    outputs = int(np.prod(value.shape[-split:]))
    inputs = CONFIG.num_heads * CONFIG.head_dim if "/o/" in name else value.shape[-split - 1]
    # The first Nesterov step is a multiple of the gradient, which the norm removes.
    stack = np.float64(gradient).reshape(-1, inputs, outputs)
    turned = np.stack([_orthogonalised(matrix) for matrix in stack]).reshape(value.shape)
    scale = 0.2 * np.sqrt(max(inputs, outputs))
    return value - rate * (scale * turned + decay * value)

  wanted = jax.tree_util.tree_map_with_path(expected, params, grads, adam)
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(a, b, atol=2e-5, err_msg=_path(path)),
    after,
    wanted,
  )


def test_the_learning_rate_is_told_and_followed(params, grads):
  rate = schedule.linear(0.1, steps=4)
  made = optimizer.adamw(learning_rate=rate, b1=0.0, b2=0.0, eps=1e-12, clip_norm=None)
  state, sizes, update = made.init(params), [], jax.jit(made.update)
  for step in range(4):
    updates, state = update(grads, state, params)
    sizes.append(float(jnp.abs(updates["head"]).mean()))
    assert np.isclose(sizes[-1], float(made.learning_rate(step)), rtol=1e-4)
  assert sizes[0] > sizes[3] > 0


@pytest.mark.parametrize("make", [optimizer.adamw, optimizer.muon])
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("learning_rate", 0.0),
    ("b1", 1.0),
    ("b2", -0.1),
    ("eps", 0.0),
    ("weight_decay", -1.0),
    ("clip_norm", 0.0),
  ],
)
def test_bad_values_are_named(make, field, value):
  with pytest.raises(ValueError, match=field):
    make(**{"learning_rate": 0.1, field: value})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("momentum", 1.0),
    ("newton_schulz_steps", 0),
    ("newton_schulz_dtype", "float16"),
    ("momentum_dtype", "int8"),
    ("consistent_rms", 0.0),
    ("adam_learning_rate", -1.0),
  ],
)
def test_bad_values_of_muon_are_named(field, value):
  with pytest.raises(ValueError, match=field):
    optimizer.muon(**{"learning_rate": 0.1, field: value})
