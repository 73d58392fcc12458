"""Some tensors of a checkpoint put in the place of those that are held."""

import jax
import ml_dtypes
import numpy as np
import pytest

from intellect3.models import hf
from tests.models import helpers

CONFIG = helpers.small()


def leaves(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def assert_same(given, expected):
  assert given.keys() == expected.keys()
  for name, leaf in expected.items():
    assert given[name].dtype == leaf.dtype, name
    np.testing.assert_array_equal(given[name], leaf, err_msg=name)


@pytest.mark.parametrize(
  "changes",
  [{}, {"tie_embeddings": True, "qk_norm": True, "attention_bias": False, "num_shared_experts": 0}],
)
def test_bucket_after_bucket_gives_the_new_weights(changes):
  """In any order, a few tensors at a time; nothing of the old ones is touched."""
  config = helpers.small(**changes)
  old, new = (helpers.random_params(config, seed) for seed in (0, 1))
  kept = jax.tree.map(np.copy, old)
  tensors = list(hf.to_hf(config, new))
  np.random.default_rng(0).shuffle(tensors)
  merged = old
  for start in range(0, len(tensors), 5):
    merged = hf.merge(config, merged, dict(tensors[start : start + 5]))
  assert_same(leaves(merged), leaves(new))
  assert_same(leaves(old), leaves(kept))


def test_only_what_is_named_changes_and_the_rest_is_shared():
  old, new = (helpers.random_params(CONFIG, seed) for seed in (0, 1))
  name = "model.layers.2.mlp.experts.3.up_proj.weight"
  merged = leaves(hf.merge(CONFIG, old, {name: dict(hf.to_hf(CONFIG, new))[name]}))
  before, after = leaves(old), leaves(new)
  path = "moe_layers/moe/experts/up"
  for other in before.keys() - {path}:
    assert merged[other] is before[other]
  expected = before[path].copy()
  expected[1, 3] = after[path][1, 3]  # the third layer is the second MoE layer
  np.testing.assert_array_equal(merged[path], expected)
  assert not np.array_equal(expected, before[path])


def test_tensors_take_the_dtype_of_those_they_replace():
  old, new = (helpers.random_params(CONFIG, seed) for seed in (0, 1))
  half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in hf.to_hf(CONFIG, new)}
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(x.dtype), new)
  assert_same(leaves(hf.merge(CONFIG, old, half)), leaves(rounded))
  small = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), old)
  merged = hf.merge(CONFIG, small, dict(hf.to_hf(CONFIG, new)))
  assert_same(leaves(merged), leaves(jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), new)))


def test_tensors_that_the_held_dtype_cannot_hold_are_refused():
  held = jax.tree.map(lambda leaf: leaf.astype(np.float16), helpers.random_params(CONFIG))
  tensors = dict(hf.to_hf(CONFIG, helpers.random_params(CONFIG, 1)))
  tensors["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] = 7e4
  tensors["lm_head.weight"][0, 0] = -1e6
  with pytest.raises(ValueError, match="too small for 2:") as error:
    hf.merge(CONFIG, held, tensors)
  assert "model.layers.2.mlp.experts.3.up_proj.weight: float16 holds up to 65504" in str(
    error.value
  )


def test_held_arrays_may_be_read_only():
  held = jax.device_get(jax.tree.map(jax.numpy.asarray, helpers.random_params(CONFIG)))
  assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(held))
  new = helpers.random_params(CONFIG, 1)
  assert_same(leaves(hf.merge(CONFIG, held, dict(hf.to_hf(CONFIG, new)))), leaves(new))


def test_every_wrong_tensor_is_listed_and_nothing_changes():
  old = helpers.random_params(CONFIG)
  kept = jax.tree.map(np.copy, old)
  tensors = {
    "model.norm.weight": np.zeros(CONFIG.embed_dim + 1, np.float32),
    "lm_head.weight": np.zeros((CONFIG.embed_dim, CONFIG.vocab_size), np.float32),
    "model.layers.9.mlp.up_proj.weight": np.zeros((2, 2), np.float32),
    "model.embed_tokens.weight": np.zeros((CONFIG.vocab_size, CONFIG.embed_dim), np.float32),
    "who.knows": np.zeros(1, np.float32),
  }
  with pytest.raises(ValueError) as error:
    hf.merge(CONFIG, old, tensors)
  message = str(error.value)
  assert "misshapen: model.norm.weight: expected [32], got [33]" in message
  assert "misshapen: lm_head.weight: expected [97, 32], got [32, 97]" in message
  assert "unexpected: who.knows" in message and "embed_tokens" not in message
  assert_same(leaves(old), leaves(kept))


def test_what_a_load_ignores_is_ignored():
  tied = helpers.small(tie_embeddings=True)
  old = helpers.random_params(tied)
  head = {"lm_head.weight": np.zeros((tied.vocab_size, tied.embed_dim), np.float32)}
  assert_same(leaves(hf.merge(tied, old, head)), leaves(old))
