"""What `/generate` takes and refuses, against the recorded refusals."""

import contextlib
import json
import logging

import pytest
from engine_http import exchanges
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.inference.engine import request as requests
from intellect3.inference.engine.request import Limits, RequestError

LIMITS = Limits(vocab_size=512, context_length=1024)
EXCHANGES = exchanges()
REFUSED = [
  name
  for name, exchange in EXCHANGES.items()
  if exchange["request"]["path"] == "/generate" and exchange["status"] == 400
]


def parse(**body):
  return requests.parse_generate(json.dumps(body).encode(), LIMITS)


def one(sampling=None, **more):
  [request], batched = parse(input_ids=[1, 2, 3], sampling_params=sampling or {}, **more)
  assert not batched
  return request


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_word_for_word_as_recorded(name):
  exchange = EXCHANGES[name]
  with pytest.raises(RequestError) as refused:
    parse(**exchange["request"]["json"])
  assert refused.value.status == exchange["status"]
  given_error, expected = refused.value.payload["error"], exchange["response"]["error"]
  if name == "bad_unknown_sampling_param":  # it goes on with a list of the names it knows
    given_error, expected = given_error[:40], expected[:40]
  assert given_error == expected


def test_defaults_are_sglangs():
  request = one()
  assert (request.max_new_tokens, request.temperature, request.ignore_eos) == (128, 1.0, False)
  assert (request.seed, request.logprob_start, request.return_logprob) == (None, None, False)
  assert request.rid and request.rid != one().rid


@pytest.mark.parametrize(
  ("sampling", "named"),
  [
    ({"top_p": 0.9}, "top_p"),
    ({"top_k": 5}, "top_k"),
    ({"n": 2}, "n=2"),
    ({"stop": ["x"]}, "stop"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"min_new_tokens": 3}, "min_new_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"ignore_eos": 3}, "ignore_eos"),
    ({"bogus": None}, "bogus"),
  ],
)
def test_what_is_not_supported_is_refused_by_name(sampling, named):
  body = json.dumps({"input_ids": [1], "sampling_params": sampling})
  with pytest.raises(RequestError, match=named) as refused:
    requests.parse_generate(body.encode(), LIMITS)
  assert refused.value.status == 400


@pytest.mark.parametrize(
  "more", [{"stream": True}, {"text": "hi"}, {"return_routed_experts": True}, {"lora_path": "x"}]
)
def test_fields_that_sglang_knows_and_we_do_not_are_refused_unless_off(more):
  with pytest.raises(RequestError, match=next(iter(more))):
    one(**more)
  assert one(**dict.fromkeys(more)) and one(stream=False, top_logprobs_num=0, sampling={"top_p": 1})


@pytest.mark.parametrize("ids", [[512], [-1], [1, 100000, 2], [2**70]])
def test_ids_outside_the_vocabulary_are_refused(ids):
  with pytest.raises(RequestError) as refused:
    parse(input_ids=ids)
  assert refused.value.status == 400


def test_an_unknown_field_is_ignored_with_one_warning(caplog):
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      one(never_heard_of=1)
  assert sum("never_heard_of" in record.message for record in caplog.records) == 1


def test_a_batch_gives_each_prompt_its_own():
  received, batched = parse(
    input_ids=[[1, 2], [3]],
    rid=["a", "b"],
    sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
    return_logprob=True,
  )
  assert batched and [r.rid for r in received] == ["a", "b"]
  assert [r.max_new_tokens for r in received] == [1, 2] and all(r.return_logprob for r in received)
  with pytest.raises(RequestError, match="rid"):
    parse(input_ids=[[1], [2]], rid=["a"])


def test_context_is_cut_as_sglang_does():
  [request], _ = parse(input_ids=[7] * 1010, sampling_params={"max_new_tokens": 14})
  assert request.max_new_tokens == 12
  [request], _ = parse(input_ids=[7] * 1010)
  assert request.max_new_tokens == 12
  [request], _ = parse(input_ids=[7] * 1023, sampling_params={"max_new_tokens": 1})
  assert request.max_new_tokens == 1


def test_score_positions():
  assert one(return_logprob=True, logprob_start_len=-1).logprob_start is None
  assert one(return_logprob=True, logprob_start_len=2).logprob_start == 2
  assert one(logprob_start_len=0).logprob_start is None
  with pytest.raises(RequestError, match="logprob_start_len"):
    one(return_logprob=True, logprob_start_len=3)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=6,
)
FIELDS = st.sampled_from(
  ["input_ids", "rid", "sampling_params", "return_logprob", "logprob_start_len", "stream", "x"]
)
SAMPLING = st.sampled_from(
  ["max_new_tokens", "temperature", "stop_token_ids", "sampling_seed", "ignore_eos", "n", "x"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, JSON | st.dictionaries(SAMPLING, JSON, max_size=3), max_size=5))
def test_any_body_is_parsed_or_refused(body):
  """Nothing that a client sends raises anything but RequestError."""
  try:
    received, _ = requests.parse_generate(json.dumps(body).encode(), LIMITS)
  except RequestError as refused:
    assert refused.status == 400
  else:
    assert all(0 <= t < 512 for request in received for t in request.input_ids)


@given(st.binary(max_size=20))
def test_any_bytes_are_parsed_or_refused(body):
  with contextlib.suppress(RequestError):
    requests.parse_generate(body, LIMITS)
