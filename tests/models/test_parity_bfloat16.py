"""bfloat16 loses no more in our model than in transformers', both measured from float32.

Where rounding turns a router's choice, its token and those after it are thrown far off, and which
tokens that befalls is chance in either implementation. So three things are bounded, over all seeds:
the mean error of all tokens, turned ones included; the greatest error of tokens before the first
turn in their sequence; how often sequences turn.
"""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from intellect3.models import hf, transformer  # noqa: E402
from tests.models import helpers, parity  # noqa: E402

SEEDS, FACTOR = range(6), 1.5
BATCH, LENGTH = 8, 16
FIRST = 1000
"""The first token's position: rounded angles would show."""


@pytest.mark.parametrize("name", ["glm_air", "qwen3_tied", "qwen3_moe_normalised"])
def test_the_error_is_at_most_one_and_a_half_of_transformers(name, tmp_path):
  config = parity.CASES[name]
  rounded = dataclasses.replace(config, dtype="bfloat16")
  errors, steady = ([], []), ([], [])
  for seed in SEEDS:
    params = _representable(helpers.random_params(config, seed))
    hf.save(tmp_path, config, params)
    model = parity.load_theirs(tmp_path)
    tokens, positions, segment_ids = helpers.rows(config, BATCH, LENGTH, seed)
    with torch.no_grad():
      exact, chosen = parity.run_theirs(model, tokens, FIRST)
      theirs = parity.run_theirs(_in_bfloat16(model), tokens, FIRST)
    out = helpers.forward(rounded, params, tokens, positions + FIRST, segment_ids)
    assert out.hidden_BTD.dtype == ml_dtypes.bfloat16
    logits = np.float32(out.hidden_BTD) @ transformer.head(params, config)
    ours = jax.nn.log_softmax(logits), list(np.asarray(out.router.experts_LBTA))
    for side, (logprobs, experts) in enumerate((ours, theirs)):
      errors[side].append(np.abs(np.asarray(logprobs) - exact.numpy()))
      steady[side].append(_before_the_first_turn(experts, chosen))
  errors, steady = np.array(errors), np.array(steady)
  means = errors.mean(axis=(1, 2, 3, 4))
  greatest = (errors.max(axis=-1) * (steady[0] & steady[1])).max(axis=(1, 2, 3))
  rates = (~steady[..., -1]).sum(axis=(1, 2)) / steady.sum(axis=(1, 2, 3))
  print(f"\n{name}, ours and transformers': {means=}, {greatest=}, {rates=}")
  assert means[0] <= FACTOR * means[1]
  assert greatest[0] <= FACTOR * greatest[1]
  assert rates[0] <= FACTOR * rates[1]
  assert (steady[0] & steady[1]).mean() > 0.5


def _before_the_first_turn(experts, exact):
  """Where neither a token's own experts nor those of one before it differ; bool [B, T]."""
  same = np.ones((BATCH, LENGTH), bool)
  for given, expected in zip(experts, exact, strict=True):
    same &= np.all(np.sort(given, axis=-1) == np.sort(expected, axis=-1), axis=-1)
  return np.logical_and.accumulate(same, axis=1)


def _representable(params):
  """Weights that bfloat16 holds exactly, so that both sides compute with the same ones."""

  def leaf(path, array):
    if path[-1].key == "correction_bias":  # float32 in every checkpoint
      return array
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, params)


def _in_bfloat16(model):
  """The model in bfloat16, but for the routers' biases."""
  biases = {
    name: buffer.clone()
    for name, buffer in model.named_buffers()
    if name.endswith("e_score_correction_bias")
  }
  model = model.to(torch.bfloat16)
  for name, buffer in model.named_buffers():
    if name in biases:
      buffer.data = biases[name]
  return model
