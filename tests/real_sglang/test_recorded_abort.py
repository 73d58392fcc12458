"""What SGLang 0.5.23 answers to a request that was aborted in its queue, as recorded."""

import copy

import msgspec
import pytest

from intellect3.inference import protocol

RECORDED = {
  "text": "",
  "output_ids": [],
  "meta_info": {
    "id": "queued",
    "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
    "weight_version": "0",
    "e2e_latency": 0.3174667279999994,
    "weight_versions": [{"version": "0", "start": 0, "end": 0}],
    "input_token_logprobs": [],
    "output_token_logprobs": [],
    "output_token_logprobs_length": 0,
    "completion_tokens": 0,
    "response_sent_to_client_ts": 1795323611.8070188,
  },
}
REQUEST = protocol.GenerateRequest(
  input_ids=[72, 101],
  rid="queued",
  sampling_params=protocol.SamplingParams(max_new_tokens=7, temperature=1.0),
)


def parse(reply):
  decoded = protocol.decode(msgspec.json.encode(reply), protocol.GenerateReply)
  return protocol.parse_generation(decoded, REQUEST, vocab_size=512, server="http://a")


def test_it_is_an_abort_without_tokens():
  generation = parse(RECORDED)
  assert generation.finish_reason == "abort" and len(generation.tokens) == 0


def test_one_that_was_retracted_into_the_queue_keeps_its_tokens():
  reply = copy.deepcopy(RECORDED)
  reply["output_ids"] = [5, 6]
  reply["meta_info"] |= {
    "completion_tokens": 2,
    "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
    "weight_versions": [{"version": "0", "start": 0, "end": 2}],
  }
  assert parse(reply).tokens.tolist() == [5, 6]


@pytest.mark.parametrize("kind", ["length", "stop"])
def test_only_an_abort_may_leave_the_prompts_length_out(kind):
  reply = copy.deepcopy(RECORDED)
  reply["meta_info"]["finish_reason"] = {"type": kind}
  with pytest.raises(protocol.ProtocolError, match="prompt_tokens: expected 2, got None"):
    parse(reply)
