"""What a server samples, as the trainer's own forward sees it: logprobs and chosen experts."""

import base64

import numpy as np
import pytest

from tests.real_sglang import checkpoints
from tests.real_sglang.remote import PROMPT

COUNT = 200


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_hundred_sampled_tokens_have_the_trainers_logprobs(server, temperature):
  generation = server.run(
    lambda opened: opened.pool.generate(
      PROMPT,
      max_new_tokens=COUNT,
      temperature=temperature,
      stop_token_ids=[],
      seed=3,
      rid=f"parity-{temperature}",
    )
  )
  stopped = generation.finish_reason == "stop"
  assert len(generation.tokens) == COUNT or stopped
  tokens = [*PROMPT, *generation.tokens.tolist()]
  expected = checkpoints.trainer_logprobs(server.first.params, tokens, temperature=temperature)
  np.testing.assert_allclose(
    generation.inference_logprobs, expected[len(PROMPT) - 1 :], rtol=0, atol=1e-4
  )


def test_routed_experts_are_the_trainers_as_sets_at_every_position(server):
  reply = server.generate(
    PROMPT,
    sampling={"max_new_tokens": COUNT, "ignore_eos": True},
    return_logprob=True,
    return_routed_experts=True,
  )
  config = checkpoints.CONFIG
  tokens = [*PROMPT, *reply["output_ids"]]
  told = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), np.int32)
  told = told.reshape(len(tokens) - 1, config.num_layers, config.num_experts_per_token)
  expected = checkpoints.trainer_experts(server.first.params, tokens[:-1])
  assert not told[:, : config.num_dense_layers].any()
  np.testing.assert_array_equal(np.sort(told, axis=-1), np.sort(expected, axis=-1))
  assert len(np.unique(told[:, -1])) > 2  # more than one way to go
  logprobs = [row[0] for row in reply["meta_info"]["output_token_logprobs"]]
  scored = checkpoints.trainer_logprobs(server.first.params, tokens)[len(PROMPT) - 1 :]
  np.testing.assert_allclose(logprobs, scored, atol=1e-4)


def test_a_cached_prefix_changes_nothing(server):
  """The second request finds most of its prompt in the cache and scores as if it had not."""
  prompt = list(PROMPT) * 12
  sampling = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
  first = server.generate(prompt, sampling=sampling, return_logprob=True)
  again = server.generate(prompt, sampling=sampling, return_logprob=True)
  apart = server.generate(prompt, sampling=sampling, return_logprob=True, extra_key="apart")
  assert again["meta_info"]["cached_tokens"] > 0
  assert apart["meta_info"]["cached_tokens"] == 0
  assert first["output_ids"] == again["output_ids"] == apart["output_ids"]
  expected = checkpoints.trainer_logprobs(server.first.params, [*prompt, *again["output_ids"]])
  logprobs = [row[0] for row in again["meta_info"]["output_token_logprobs"]]
  np.testing.assert_allclose(logprobs, expected[len(prompt) - 1 :], atol=1e-4)
