"""What `/generate` takes and refuses."""

import json
import logging

import pytest
from engine_http import MODEL_A, exchanges
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON

from intellect3.inference.engine import parse, text
from intellect3.inference.engine.request import Limits, RequestError

LIMITS = Limits(vocab_size=512, context_length=1024, max_top_logprobs=5, routed_experts=True)
TEXT = text.load(MODEL_A, 512)
REFUSED = [
  name
  for name, exchange in exchanges().items()
  if exchange["request"]["path"] == "/generate" and exchange["status"] == 400
]


def call(limits=LIMITS, tokenizer=TEXT, **body):
  fields = parse.parse_body(json.dumps(body).encode())
  return parse.parse_generate(fields, limits, tokenizer)


def one(sampling=None, **more):
  made = call(input_ids=[1, 2, 3], sampling_params=sampling or {}, **more)
  assert not made.listed
  [request] = made.requests
  return request


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_word_for_word_as_recorded(name):
  exchange = exchanges()[name]
  with pytest.raises(RequestError) as refused:
    call(**exchange["request"]["json"])
  assert refused.value.status == exchange["status"]
  given_error, expected = refused.value.payload["error"], exchange["response"]["error"]
  if name == "bad_unknown_sampling_param":  # it goes on with a list of the names it knows
    given_error, expected = given_error[:40], expected[:40]
  assert given_error == expected


def test_defaults_are_sglangs():
  request = one()
  assert (request.max_new_tokens, request.temperature, request.ignore_eos) == (128, 1.0, False)
  assert (request.seed, request.logprob_start, request.return_logprob) == (None, None, False)
  assert not request.filters and not request.penalizes and request.stop_strings == ()
  assert request.rid and request.rid != one().rid


def test_sampling_parameters_arrive():
  request = one(
    {
      "temperature": 0.7,
      "top_p": 0.9,
      "top_k": 5,
      "min_p": 0.1,
      "frequency_penalty": 0.5,
      "presence_penalty": -0.5,
      "repetition_penalty": 1.2,
      "min_new_tokens": 2,
      "max_new_tokens": 9,
      "stop": ["x", "yz"],
      "stop_token_ids": [7, None, 8],
      "sampling_seed": -1,
      "no_stop_trim": True,
      "skip_special_tokens": False,
    }
  )
  assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.7, 0.9, 5, 0.1)
  penalties = (request.frequency_penalty, request.presence_penalty, request.repetition_penalty)
  assert penalties == (0.5, -0.5, 1.2)
  assert (request.min_new_tokens, request.max_new_tokens) == (2, 9)
  assert request.stop_strings == ("x", "yz") and request.stop_token_ids == {7, 8}
  assert request.seed == 2**64 - 1 and request.no_stop_trim and not request.skip_special_tokens


def test_very_low_temperatures_are_greedy():
  assert one({"temperature": 9e-7}).temperature == 0.0
  assert one({"temperature": 2e-6}).temperature == 2e-6


@pytest.mark.parametrize("off", [{"top_k": -1}, {"top_k": 1 << 30}, {"top_k": 512}, {"top_p": 1}])
def test_filters_that_leave_nothing_out_are_none(off):
  assert not one(off).filters


@pytest.mark.parametrize(
  ("sampling", "named"),
  [
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_new_tokens": 4, "max_new_tokens": 3}, "min_new_tokens"),
    ({"n": 0}, "n must be"),
    ({"n": 10**9}, "n must be"),
    ({"stop": ["x"] * 33}, "stop"),
    ({"stop": ["x", ""]}, "stop"),
    ({"sampling_seed": 2**63}, "sampling_seed"),
    ({"stream_interval": 0}, "stream_interval"),
    ({"regex": "a+"}, "regex"),
    ({"json_schema": "{}"}, "json_schema"),
    ({"logit_bias": {"1": 2}}, "logit_bias"),
    ({"beam_width": 2}, "beam_width"),
    ({"custom_params": {"a": 1}}, "custom_params"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"ignore_eos": 3}, "ignore_eos"),
    ({"bogus": None}, "bogus"),
  ],
)
def test_sampling_parameters_are_refused_by_name(sampling, named):
  with pytest.raises(RequestError, match=named) as refused:
    one(sampling)
  assert refused.value.status == 400


@pytest.mark.parametrize(
  "more",
  [{"lora_path": "x"}, {"image_data": "x"}, {"return_hidden_states": True}, {"priority": 3}],
)
def test_fields_that_are_not_supported_are_refused_unless_off(more):
  with pytest.raises(RequestError, match=next(iter(more))):
    one(**more)
  assert one(**dict.fromkeys(more))


@pytest.mark.parametrize(
  ("more", "named"),
  [
    ({"return_logprob": True, "top_logprobs_num": 6}, "top_logprobs_num"),
    ({"top_logprobs_num": -1}, "top_logprobs_num"),
    ({"stream": 1}, "stream"),
    ({"return_routed_experts": "yes"}, "return_routed_experts"),
    ({"return_routed_experts": True, "routed_experts_start_len": 2}, "routed_experts_start_len"),
    ({"return_routed_experts": True, "routed_experts_start_len": -1}, "routed_experts_start_len"),
    ({"rid": ["a"]}, "rid"),
    ({"text": "hello"}, "text"),
    ({"sampling_params": [3]}, "sampling_params"),
  ],
)
def test_wrong_fields_are_refused_by_name(more, named):
  with pytest.raises(RequestError, match=named):
    call(**({"input_ids": [1]} | more))


def test_values_that_change_nothing_are_taken():
  """SGLang searches with beams from a width of 2 on, and orders by priority only if told to."""
  assert one({"beam_width": 1, "custom_params": {}}, priority=0).max_new_tokens == 128


def test_what_the_server_was_not_started_for_is_refused():
  bare = Limits(vocab_size=512, context_length=1024)
  with pytest.raises(RequestError, match="--enable-return-routed-experts"):
    call(bare, input_ids=[1], return_routed_experts=True)
  with pytest.raises(RequestError, match="top_logprobs_num"):
    call(bare, input_ids=[1], return_logprob=True, top_logprobs_num=1)
  for more in ({"text": "x"}, {"input_ids": [1], "sampling_params": {"stop": "x"}}):
    with pytest.raises(RequestError, match="tokenizer"):
      call(LIMITS, None, **more)


@pytest.mark.parametrize("ids", [[512], [-1], [1, 100000, 2], [2**70], [1.5], [True], ["1"]])
def test_ids_outside_the_vocabulary_are_refused(ids):
  with pytest.raises(RequestError) as refused:
    call(input_ids=ids)
  assert refused.value.status == 400


def test_an_unknown_field_is_ignored_with_one_warning(caplog):
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      one(never_heard_of=1)
  assert sum("never_heard_of" in record.message for record in caplog.records) == 1


def test_a_batch_gives_each_prompt_its_own():
  made = call(
    input_ids=[[1, 2], [3]],
    rid=["a", "b"],
    sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
    return_logprob=True,
    extra_key=["x", "y"],
  )
  assert made.listed and [r.rid for r in made.requests] == ["a", "b"]
  assert [r.max_new_tokens for r in made.requests] == [1, 2]
  assert [r.extra_key for r in made.requests] == ["x", "y"]
  assert all(r.return_logprob for r in made.requests)
  with pytest.raises(RequestError, match="rid"):
    call(input_ids=[[1], [2]], rid=["a"])


def test_texts_are_prompts():
  assert call(text="hello world").requests[0].input_ids == TEXT.encode("hello world", special=True)
  made = call(text=["hello", "world"])
  assert made.listed and len(made.requests) == 2


def test_several_generations_of_a_prompt_have_names_and_seeds_of_their_own():
  made = call(
    input_ids=[1, 2], rid="r", sampling_params={"n": 3, "sampling_seed": 2**63 - 1}, stream=True
  )
  assert made.listed and made.stream and all(request.stream for request in made.requests)
  rids = [request.rid for request in made.requests]
  assert len(set(rids)) == 3 and list(made.names["r"]) == rids
  assert [request.seed for request in made.requests] == [2**63 - 1, 2**63, 2**63 + 1]
  made = call(input_ids=[[1], [2]], rid="r", sampling_params={"n": 2})
  assert list(made.names["r"]) == [request.rid for request in made.requests]
  assert len(made.requests) == 4


def test_caches_are_told_apart_by_salt_and_key():
  keys = {
    one(**more).extra_key
    for more in (
      {},
      {"extra_key": "ab"},
      {"cache_salt": "ab"},
      {"cache_salt": "a", "extra_key": "b"},
    )
  }
  assert len(keys) == 4


def test_context_is_cut_as_sglang_does():
  def cut(prompt, **sampling):
    return call(input_ids=[7] * prompt, sampling_params=sampling).requests[0].max_new_tokens

  assert cut(1010, max_new_tokens=14) == 12
  assert cut(1010) == 12
  assert cut(1010, max_new_tokens=None) == 12
  assert cut(10, max_new_tokens=None) == 1012
  assert cut(1023, max_new_tokens=1) == 1


def test_score_positions():
  assert one(return_logprob=True, logprob_start_len=-1).logprob_start is None
  assert one(return_logprob=True, logprob_start_len=2).logprob_start == 2
  assert one(logprob_start_len=0).logprob_start is None
  assert one(return_logprob=True, logprob_start_len=3).logprob_start is None
  with pytest.raises(RequestError, match="logprob_start_len"):
    one(return_logprob=True, logprob_start_len=4)


FIELDS = st.sampled_from([*sorted(parse.SUPPORTED), *sorted(parse.UNSUPPORTED), "x"])
SAMPLING = st.sampled_from(
  ["max_new_tokens", "temperature", "stop_token_ids", "stop", "top_k", "top_p", "n", "regex", "x"]
)


@settings(max_examples=300, deadline=None)
@given(
  st.dictionaries(FIELDS, JSON | st.dictionaries(SAMPLING, JSON, max_size=3), max_size=5),
  st.dictionaries(SAMPLING, JSON, max_size=3),
)
def test_any_body_is_parsed_or_refused(body, sampling):
  """Nothing that a client sends raises anything but RequestError."""
  for more in ({}, {"input_ids": [1, 2], "sampling_params": sampling}):
    try:
      made = call(**(body | more))
    except RequestError as refused:
      assert refused.status == 400
    else:
      assert all(0 <= t < 512 for request in made.requests for t in request.input_ids)


@given(st.binary(max_size=20) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_parsed_or_refused(body):
  try:
    fields = parse.parse_body(body)
  except RequestError as refused:
    assert refused.status == 400 and body
  else:
    assert isinstance(fields, dict)


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(), max_size=4))
def test_objects_arrive_as_they_are(fields):
  assert parse.parse_body(json.dumps(fields).encode()) == fields


def test_more_stop_ids_than_can_be_held_back_are_refused_only_where_they_must_be():
  many = {"max_new_tokens": 8, "stop_token_ids": list(range(33))}
  assert len(one(many).stop_token_ids) == 33
  with pytest.raises(RequestError, match=r"stop_token_ids: expected at most 32 .* got 33"):
    one({**many, "min_new_tokens": 2})
