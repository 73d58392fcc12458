"""Every family against transformers in float32, an independent witness, in unusual shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from intellect3.models import cache as kv  # noqa: E402
from intellect3.models import hf  # noqa: E402
from tests.models import helpers, parity  # noqa: E402

PAGE, PAGES, PREFILL = 4, 20, 8


@pytest.fixture(params=parity.CASES)
def name(request):
  return request.param


def test_every_family_has_its_shapes():
  configs = parity.CASES.values()
  for family in ("glm4_moe", "qwen3", "qwen3_moe"):
    assert sum(config.family == family for config in configs) >= 3
  for field in ("attention", "grouped_matmul"):
    assert len({getattr(config, field) for config in configs}) >= 2


def test_logprobs_and_routed_experts(name):
  config, model = parity.CASES[name], parity.theirs(name)
  params, alone, result = parity.ours(name)
  experts, counts = alone.take(result.experts, axis=1), np.zeros_like(result.load)
  for number, text in enumerate(parity.sequences(config)):
    with torch.no_grad():
      expected, chosen = parity.run_theirs(model, text)
    np.testing.assert_allclose(alone.take(result.logprobs)[number], expected, rtol=0, atol=2e-5)
    assert len(chosen) == config.num_moe_layers
    for layer, theirs in enumerate(chosen):
      np.testing.assert_array_equal(np.sort(experts[number][layer]), np.sort(theirs))
      counts[layer] += np.bincount(theirs.reshape(-1), minlength=config.num_experts)
  np.testing.assert_array_equal(result.load, counts)
  if config.num_moe_layers and config.router_bias:
    # The correction bias must have mattered, or the choice was not put to the test.
    unbiased = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * 0 if "correction_bias" in str(path) else leaf, params
    )
    assert np.any(np.asarray(parity.evaluate(config, unbiased, *alone[:3]).load) != counts)


def test_gradients_per_tensor(name):
  config, model = parity.CASES[name], parity.theirs(name)
  _, _, result = parity.ours(name)
  texts = parity.sequences(config)
  model.zero_grad()
  total = sum(len(text) - 1 for text in texts)
  for text in texts:
    logprobs, _ = parity.run_theirs(model, text)
    chosen = logprobs[:-1].gather(1, torch.tensor(text[1:, None], dtype=torch.long))
    (-chosen.sum() / total).backward()
  theirs = parity.gradients_by_name(config, model)
  ours = dict(hf.to_hf(config, result.gradients))
  biases = {name for name in ours if name.endswith("e_score_correction_bias")}
  assert len(biases) == (config.num_moe_layers if config.router_bias else 0)
  assert all(not np.any(ours[name]) for name in biases)
  assert set(ours) - biases == set(theirs)
  for tensor, expected in theirs.items():
    scale = np.abs(expected).max()
    assert scale > 0 or "experts" in tensor, tensor
    np.testing.assert_allclose(
      ours[tensor], expected, rtol=0, atol=1e-4 * scale + 1e-9, err_msg=tensor
    )


def test_packed_sequences_are_the_same_alone(name):
  config = parity.CASES[name]
  params, alone, apart = parity.ours(name)
  packed = parity.rows(parity.sequences(config), parity.PACKED)
  together = parity.evaluate(config, params, *packed[:3])
  for field, axis in (("logprobs", 0), ("experts", 1)):
    given = packed.take(getattr(together, field), axis)
    expected = alone.take(getattr(apart, field), axis)
    for ours, theirs in zip(given, expected, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=field)
  np.testing.assert_array_equal(together.load, apart.load)
  for (path, given), expected in zip(
    jax.tree_util.tree_leaves_with_path(together.gradients),
    jax.tree.leaves(apart.gradients),
    strict=True,
  ):
    bound = 2e-5 * max(float(jnp.abs(expected).max()), 1e-3)
    assert float(jnp.abs(given - expected).max()) <= bound, jax.tree_util.keystr(path)


def test_prefill_and_decode_are_the_full_forward(name):
  """Each sequence's first tokens in one call, the others token by token, all rows at once."""
  config = parity.CASES[name]
  params, alone, result = parity.ours(name)
  width = -(-max(parity.LENGTHS) // PAGE)
  tables = np.random.default_rng(0).permutation(PAGES)[: 3 * width].reshape(3, width)
  cache = kv.init(config, PAGES, PAGE)
  hidden, experts = [], []
  for start in (0, *range(PREFILL, max(parity.LENGTHS))):
    columns = slice(start, start + PREFILL if start == 0 else start + 1)
    given = [array[:, columns] for array in alone[:3]]
    given[1] = np.broadcast_to(np.arange(columns.start, columns.stop), given[0].shape)
    out = helpers.forward_cached(
      config, params, *(np.asarray(array, np.int32) for array in given), cache, np.int32(tables)
    )
    cache = out.cache
    hidden.append(out.hidden_BTD)
    experts.append(out.router.experts_LBTA)
  head = parity.transformer.head(params, config)
  logprobs = jax.nn.log_softmax(np.concatenate(hidden, axis=1) @ head)
  for given, expected in zip(alone.take(logprobs), alone.take(result.logprobs), strict=True):
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
  chosen = alone.take(np.concatenate(experts, axis=2), axis=1)
  for given, expected in zip(chosen, alone.take(result.experts, axis=1), strict=True):
    np.testing.assert_array_equal(given, expected)


def test_what_transformers_saves_is_what_it_was_given(name, tmp_path):
  """Round: ours -> our file -> transformers -> its file -> ours, without a bit changed."""
  config = parity.CASES[name]
  parity.theirs(name).save_pretrained(tmp_path)
  options = ("remat_policy", "attention", "grouped_matmul", "expert_block_size")
  loaded, params = hf.load(tmp_path, **{option: getattr(config, option) for option in options})
  assert loaded == config
  jax.tree.map(np.testing.assert_array_equal, params, parity.ours(name)[0])
