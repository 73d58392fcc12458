"""Packing, remat, statistics, initialisation and logical axes of the decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.models import presets, transformer
from tests.models import helpers

CONFIG = helpers.small()


def test_packed_rows_are_their_sequences_alone():
  """Two sequences and padding in a row, ids in any order, against each by itself."""
  params = helpers.random_params(CONFIG)
  tokens, _, _ = helpers.rows(CONFIG, 2, 16)
  lengths = [(7, 5), (3, 11)]
  positions, segment_ids = np.zeros((2, 16), np.int32), np.zeros((2, 16), np.int32)
  for row, (first, second) in enumerate(lengths):
    positions[row, : first + second] = [*range(first), *range(second)]
    segment_ids[row, : first + second] = [9] * first + [2] * second
  packed = helpers.forward(CONFIG, params, tokens, positions, segment_ids)
  load = np.zeros_like(packed.router.load_LE)
  for row, (first, second) in enumerate(lengths):
    for start, length in ((0, first), (first, second)):
      alone = np.zeros((2, 16), np.int32)
      alone[0, :length] = tokens[row, start : start + length]
      ids = np.zeros((2, 16), np.int32)
      ids[0, :length] = 1
      out = helpers.forward(
        CONFIG, params, alone, np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)), ids
      )
      np.testing.assert_allclose(
        packed.hidden_BTD[row, start : start + length], out.hidden_BTD[0, :length], atol=1e-5
      )
      load += out.router.load_LE
  np.testing.assert_array_equal(packed.router.load_LE, load)
  counted = sum(map(sum, lengths)) * CONFIG.num_experts_per_token
  np.testing.assert_array_equal(packed.router.load_LE.sum(axis=1), counted)


def test_the_future_and_padding_are_not_seen():
  params = helpers.random_params(CONFIG)
  tokens, positions, segment_ids = helpers.rows(CONFIG, 2, 16)
  segment_ids[:, 12:] = 0
  before = helpers.forward(CONFIG, params, tokens, positions, segment_ids).hidden_BTD
  changed = tokens.copy()
  changed[:, 8:] = (changed[:, 8:] + 1) % CONFIG.vocab_size
  after = helpers.forward(CONFIG, params, changed, positions, segment_ids).hidden_BTD
  np.testing.assert_array_equal(before[:, :8], after[:, :8])
  assert np.all(np.any(np.asarray(before[:, 8:12] != after[:, 8:12]), axis=-1))
  assert np.all(np.isfinite(before))


def test_remat_policies_change_memory_and_not_gradients():
  # Dense layers only, to compile fast; remat of MoE layers is held against torch elsewhere.
  batch = helpers.rows(CONFIG, 4, 64)
  gradients, memory = {}, {}
  for policy in ("none", "dots", "attention", "full"):
    config = dataclasses.replace(CONFIG, remat_policy=policy, num_layers=5, num_dense_layers=5)
    params = helpers.random_params(config)

    def loss(params, config=config):
      out = transformer.Transformer(config).apply({"params": params}, *batch)
      return jnp.mean(jnp.sin(out.hidden_BTD))

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    memory[policy] = compiled.memory_analysis().temp_size_in_bytes
    gradients[policy] = compiled(params)
  assert memory["full"] < memory["dots"] < memory["none"]
  assert memory["full"] < memory["attention"] < memory["none"]
  for policy in ("dots", "attention", "full"):
    for (path, given), expected in zip(
      jax.tree_util.tree_leaves_with_path(gradients[policy]),
      jax.tree.leaves(gradients["none"]),
      strict=True,
    ):
      scale = np.abs(expected).max()
      np.testing.assert_allclose(given, expected, atol=2e-5 * scale, err_msg=f"{policy} {path}")


def traced(config):
  return jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))


def test_unknown_policies_are_named():
  config = dataclasses.replace(CONFIG, remat_policy="everything")
  with pytest.raises(ValueError, match=r"remat_policy: expected one of \('none', 'full'.*everyth"):
    traced(config)
  config = dataclasses.replace(CONFIG, attention="flash")
  with pytest.raises(ValueError, match=r"attention: expected one of .*'flash'"):
    traced(config)
  config = dataclasses.replace(CONFIG, grouped_matmul="ragged")
  with pytest.raises(ValueError, match=r"grouped_matmul: expected one of .*'ragged'"):
    traced(config)


def test_depth_costs_no_program():
  """46 layers are the same program as 5, only with longer loops."""

  def operations(num_layers):
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    shapes, _ = transformer.abstract(config)
    batch = helpers.rows(config, 1, 4)
    gradient = jax.grad(
      lambda p: jnp.sum(transformer.Transformer(config).apply({"params": p}, *batch).hidden_BTD)
    )
    return jax.jit(gradient).lower(shapes).as_text().count("\n")

  assert operations(46) == operations(5)


def test_abstract_is_what_init_makes():
  params = jax.eval_shape(functools.partial(transformer.init, CONFIG), jax.random.key(0))
  shapes, axes = transformer.abstract(CONFIG)
  assert jax.tree.structure(shapes) == jax.tree.structure(params)
  allowed = {"vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "layers", None}

  def check(shape, leaf, names):
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert len(names) == leaf.ndim and set(names) <= allowed

  jax.tree.map(check, shapes, params, axes)
  assert axes["moe_layers"]["moe"]["experts"]["down"] == ("layers", "experts", "mlp", "embed")
  assert axes["dense_layers"]["attention"]["q"]["bias"] == ("layers", "heads", "head_dim")


def test_init_is_as_documented():
  config = presets.tiny(embed_dim=128, num_layers=4, expert_mlp_dim=64)
  params = transformer.init(config, jax.random.key(0))
  again = transformer.init(config, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, again)
  layer = params["moe_layers"]
  residual = 8**-0.5
  for leaf, deviation in (
    (params["embedding"], 0.1),
    (params["head"], 0.3 * 128**-0.5),
    (layer["attention"]["q"]["kernel"], 128**-0.5),
    (layer["attention"]["o"]["kernel"], residual * (4 * 16) ** -0.5),
    (layer["moe"]["experts"]["gate"], 128**-0.5),
    (layer["moe"]["experts"]["down"], residual * 64**-0.5),
    (layer["moe"]["shared"]["down"]["kernel"], residual * 64**-0.5),
  ):
    np.testing.assert_allclose(np.std(leaf), deviation, rtol=0.05)
  first, second = layer["moe"]["experts"]["gate"][:2]
  assert np.any(np.asarray(first != second))
  assert not np.any(layer["attention"]["q"]["bias"]) and np.all(layer["mlp_norm"]["scale"] == 1)


def test_compute_and_parameter_dtypes_are_separate():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  params = helpers.random_params(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  out = helpers.forward(config, params, *helpers.rows(config, 2, 16))
  assert out.hidden_BTD.dtype == jnp.bfloat16 and out.router.load_LE.dtype == jnp.float32
  exact = helpers.forward(CONFIG, params, *helpers.rows(config, 2, 16))
  error = np.abs(out.hidden_BTD.astype(jnp.float32) - exact.hidden_BTD)
  assert 0 < np.mean(error) < 0.05 * np.mean(np.abs(exact.hidden_BTD))
  half, _ = transformer.abstract(dataclasses.replace(config, param_dtype="bfloat16"))
  bias = half["moe_layers"]["moe"]["router"]["correction_bias"]
  assert half["embedding"].dtype == jnp.bfloat16 and bias.dtype == jnp.float32


def test_the_presets_have_the_published_sizes():
  def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(config)[0]))

  assert count(presets.tiny()) == 139_336
  air = presets.glm_4_5_air()
  assert count(air) == 106_852_251_264
  idle = (air.num_experts - air.num_experts_per_token) * 3 * air.embed_dim * air.expert_mlp_dim
  assert round((count(air) - air.num_moe_layers * idle) / 1e9) == 13  # 12B without the embedding
