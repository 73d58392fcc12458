"""What the trainer's own forward pass says of a sequence that an engine has served."""

import numpy as np

from intellect3.models import transformer
from tests.models import helpers

LENGTH = 64
TOLERANCE = 1e-5


def log_softmax(logits):
  """Of float64 [.., V]."""
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Trainer:
  """The model over whole sequences of up to `LENGTH` tokens, without cache, on one device."""

  def __init__(self, config, params):
    self._config, self._params = config, params
    self._head_DV = np.asarray(transformer.head(params, config), np.float64)

  def logits(self, tokens):
    """float64 [T, V] and the experts, int32 [T, layers, A]."""
    given, count = [np.zeros((1, LENGTH), np.int32) for _ in range(3)], len(tokens)
    for array, row in zip(given, (tokens, np.arange(count), np.ones(count)), strict=True):
      array[0, :count] = row
    out = helpers.forward(self._config, self._params, *given)
    hidden_TD = np.asarray(out.hidden_BTD[0, :count], np.float64)
    experts_TLA = np.asarray(out.router.experts_LBTA[:, 0, :count]).swapaxes(0, 1)
    return hidden_TD @ self._head_DV, experts_TLA

  def check(self, who):
    """Greedy tokens, logprobs, alternatives, scores of the prompt and experts, of a sequence
    without penalties or bans."""
    request, prompt = who.request, len(who.request.input_ids)
    logits, experts = self.logits(who.tokens[:-1])
    logprobs = log_softmax(logits[prompt - 1 :] / (request.temperature or 1))
    if not request.temperature:
      assert who.output_ids == logprobs.argmax(axis=1).tolist()
    chosen = logprobs[np.arange(len(who.output_ids)), who.output_ids]
    np.testing.assert_allclose(who.output_logprobs, chosen, atol=TOLERANCE)
    np.testing.assert_array_equal(np.concatenate(who.experts), experts)
    if request.top_logprobs_num:
      _check_alternatives(who.output_top, logprobs)
    if who.first_scored is not None:
      scored = np.arange(who.first_scored, prompt)
      logprobs = log_softmax(logits[scored - 1])
      expected = logprobs[np.arange(len(scored)), request.input_ids[who.first_scored :]]
      np.testing.assert_allclose(who.input_logprobs, expected, atol=TOLERANCE)
      if request.top_logprobs_num:
        _check_alternatives(who.input_top, logprobs)


def _check_alternatives(told, logprobs):
  for row, expected in zip(told, logprobs, strict=True):
    best = np.argsort(-expected)[: len(row)]
    assert len(row) > 0 and [index for _, index in row] == best.tolist()
    np.testing.assert_allclose([logprob for logprob, _ in row], expected[best], atol=TOLERANCE)
