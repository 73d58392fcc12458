"""Replies of a real server become Generations; hostile ones become ProtocolError."""

import copy
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.inference import protocol
from intellect3.inference.protocol import GenerateReply, GenerateRequest, ProtocolError

GOLDENS = pathlib.Path(__file__).parents[1] / "data" / "sglang_client"
VOCAB = 512
GENERATED = [
  "generate_logprobs_t1",
  "generate_stop_token_ids",
  "generate_length_finish",
  "generate_after_update",
  "generate_input_logprobs",
  "generate_context_full",
  "abort_mid_generation",
  "update_spanning_in_place",
  "update_spanning_retract",
]


def golden(name):
  return json.loads((GOLDENS / f"{name}.json").read_text())


def request_of(exchange):
  body, meta = exchange["request"]["json"], exchange["response"]["meta_info"]
  return GenerateRequest(
    input_ids=body["input_ids"][:1] * meta["prompt_tokens"]
    if len(body["input_ids"]) == 2
    else body["input_ids"],
    rid=meta["id"],
    sampling_params=protocol.SamplingParams(
      max_new_tokens=body["sampling_params"]["max_new_tokens"], temperature=1.0
    ),
  )


def numbered(response):
  """The same reply from a server that was started with a whole number as its version."""
  text = json.dumps(response).replace('"default"', '"0"')
  return text.encode()


def parse(body, request, vocab_size=VOCAB):
  reply = protocol.decode(body, GenerateReply)
  return protocol.parse_generation(reply, request, vocab_size=vocab_size, server="http://s")


@pytest.mark.parametrize("name", GENERATED)
def test_recorded_generations_parse(name):
  exchange = golden(name)
  generation = parse(numbered(exchange["response"]), request_of(exchange))
  response = exchange["response"]
  assert generation.tokens.dtype == np.int32
  assert generation.tokens.tolist() == response["output_ids"]
  rows = response["meta_info"]["output_token_logprobs"]
  np.testing.assert_allclose(generation.inference_logprobs, [row[0] for row in rows], rtol=1e-7)
  assert generation.inference_logprobs.dtype == np.float32
  assert generation.finish_reason == response["meta_info"]["finish_reason"]["type"]
  assert generation.server == "http://s"


@pytest.mark.parametrize(
  ("name", "old", "new", "switch"),
  [("update_spanning_in_place", 1, 2, 114), ("update_spanning_retract", 2, 3, 162)],
)
def test_versions_across_an_update_in_flight(name, old, new, switch):
  exchange = golden(name)
  versions = parse(json.dumps(exchange["response"]).encode(), request_of(exchange)).policy_versions
  assert versions.dtype == np.int32
  assert versions.tolist() == [old] * switch + [new] * (600 - switch)


@pytest.mark.parametrize("spans", [[("1", 0, 114), ("unchecked-2", 114, 600)], None])
def test_tokens_of_weights_that_were_a_mixture_are_cut_off_as_by_an_abort(spans):
  """Also where whole weights came later: what follows the mixture was made from its tokens."""
  exchange = golden("update_spanning_in_place")
  spans = spans or [("1", 0, 114), ("unchecked-2", 114, 120), ("2", 120, 600)]
  exchange["response"]["meta_info"]["weight_versions"] = [
    {"version": version, "start": start, "end": end} for version, start, end in spans
  ]
  generation = parse(json.dumps(exchange["response"]).encode(), request_of(exchange))
  assert generation.tokens.tolist() == exchange["response"]["output_ids"][:114]
  assert generation.inference_logprobs.shape == (114,)
  assert generation.policy_versions.tolist() == [1] * 114
  assert generation.finish_reason == "abort"


def test_a_version_that_is_no_number_is_refused():
  exchange = golden("generate_logprobs_t1")
  with pytest.raises(ProtocolError, match="default"):
    parse(json.dumps(exchange["response"]).encode(), request_of(exchange))


def test_recorded_scores_parse():
  exchange = golden("generate_score_only")
  request = request_of(exchange)
  scores = protocol.parse_scores(
    protocol.decode(numbered(exchange["response"]), GenerateReply), request
  )
  assert scores.dtype == np.float32 and scores[0] == 0.0
  assert scores[1:] == pytest.approx(
    [-8.084543, -6.906828, -9.920515, -5.370359, -8.094278, -8.02766]
  )


def test_requests_have_the_recorded_shape():
  body = protocol.encode(
    GenerateRequest(
      input_ids=[1, 2],
      rid="r",
      sampling_params=protocol.SamplingParams(max_new_tokens=3, temperature=0.5),
    )
  )
  assert json.loads(json.dumps(body)) == {
    "input_ids": [1, 2],
    "rid": "r",
    "sampling_params": {"max_new_tokens": 3, "temperature": 0.5, "stop_token_ids": []},
    "return_logprob": True,
    "logprob_start_len": -1,
    "stream": False,
  }
  allowed = golden("bad_unknown_sampling_param")["response"]["error"]
  for name in protocol.SamplingParams.__struct_fields__:
    assert f"`{name}`" in allowed


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("bad_empty_input_ids", "input_ids cannot be empty"),
    ("bad_unknown_sampling_param", "unknown field `bogus`"),
    ("bad_prompt_too_long", "longer than the model's context"),
    ("bad_pause_mode", "validation errors"),
  ],
)
def test_recorded_refusals_are_readable(name, says):
  assert says in protocol.error_message(json.dumps(golden(name)["response"]).encode())


def test_a_refusal_that_is_not_json_is_readable():
  assert protocol.error_message(b"Flush cache failed.\n") == "Flush cache failed."


@pytest.mark.parametrize(
  ("ids", "says"),
  [([], "non-empty"), ([1, 512], r"\[1\].*512"), ([-1], "-1"), ([1.0], "ints"), ([True], "ints")],
)
def test_ids_are_checked(ids, says):
  with pytest.raises(ValueError, match=says):
    protocol.check_ids(ids, VOCAB)


def good():
  return copy.deepcopy(golden("generate_after_update"))


def spans(*triples):
  def change(response):
    response["meta_info"]["weight_versions"] = [
      {"version": version, "start": start, "end": end} for version, start, end in triples
    ]

  return change


def meta(**fields):
  return lambda response: response["meta_info"].update(fields)


def logprob(value, token=None):
  def change(response):
    row = response["meta_info"]["output_token_logprobs"][2]
    row[0] = value
    row[1] = row[1] if token is None else token

  return change


HOSTILE = {
  "another request's answer": meta(id="other"),
  "another prompt's answer": meta(prompt_tokens=3),
  "count differs": meta(completion_tokens=5),
  "a token more than logprobs": lambda r: r["output_ids"].append(1),
  "a token changed": lambda r: r["output_ids"].__setitem__(0, 1),
  "id too large": lambda r: (
    r["output_ids"].__setitem__(2, 512),
    logprob(-1.0, 512)(r),
  ),
  "negative id": lambda r: (r["output_ids"].__setitem__(2, -1), logprob(-1.0, -1)(r)),
  "id is no int": lambda r: r["output_ids"].__setitem__(2, 1.5),
  "logprob NaN": logprob(float("nan")),
  "logprob -inf": logprob(float("-inf")),
  "logprob null": logprob(None),
  "logprob beyond float32": logprob(-1e300),
  "logprob above 0": logprob(0.5),
  "no logprobs": meta(output_token_logprobs=[]),
  "no versions": meta(weight_versions=[]),
  "versions missing": lambda r: r["meta_info"].pop("weight_versions"),
  "span with a gap": spans(("1", 0, 2), ("1", 3, 6)),
  "spans overlap": spans(("1", 0, 4), ("2", 3, 6)),
  "span too short": spans(("1", 0, 5)),
  "span too long": spans(("1", 0, 7)),
  "span backwards": spans(("1", 0, 6), ("1", 6, 5)),
  "version is text": spans(("v1", 0, 6)),
  "version negative": spans(("-1", 0, 6)),
  "version of other digits": spans(("\u0661", 0, 6)),
  "version huge": spans(("9" * 12, 0, 6)),
  "unknown finish": meta(finish_reason={"type": "done"}),
  "finish missing": meta(finish_reason=None),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_replies_are_refused(change):
  exchange = good()
  request = request_of(exchange)
  parse(json.dumps(exchange["response"]).encode(), request)
  change(exchange["response"])
  with pytest.raises(ProtocolError):
    parse(json.dumps(exchange["response"]).encode(), request)


def test_more_tokens_than_asked_are_refused():
  exchange = good()
  exchange["request"]["json"]["sampling_params"]["max_new_tokens"] = 5
  with pytest.raises(ProtocolError, match="at most 5"):
    parse(json.dumps(exchange["response"]).encode(), request_of(exchange))


def test_a_stop_without_a_token_is_refused():
  exchange = good()
  exchange["response"]["output_ids"] = []
  meta(
    completion_tokens=0,
    output_token_logprobs=[],
    weight_versions=[{"version": "1", "start": 0, "end": 0}],
    finish_reason={"type": "stop", "matched": None},
  )(exchange["response"])
  with pytest.raises(ProtocolError, match="stop token"):
    parse(json.dumps(exchange["response"]).encode(), request_of(exchange))


_VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=6,
)


@settings(max_examples=300)
@given(st.data())
def test_a_reply_with_any_field_replaced_is_sound_or_refused(data):
  exchange = good()
  request, response = request_of(exchange), exchange["response"]
  holder = data.draw(st.sampled_from([response, response["meta_info"]]))
  field = data.draw(st.sampled_from(sorted(holder)))
  holder[field] = data.draw(_VALUES)
  try:
    generation = parse(json.dumps(response).encode(), request)
  except ProtocolError:
    return
  length = generation.tokens.size
  assert length == generation.inference_logprobs.size == generation.policy_versions.size <= 6
  assert np.all((generation.tokens >= 0) & (generation.tokens < VOCAB))
  assert np.all(np.isfinite(generation.inference_logprobs))
  assert np.all(generation.policy_versions >= 0)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused(body):
  with pytest.raises(ProtocolError):
    protocol.decode(body, GenerateReply)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=6))
def test_spans_expand_to_their_lengths(runs):
  spans, end = [], 0
  for version, length in runs:
    spans.append(protocol.VersionSpan(str(version), end, end + length))
    end += length
  expected = [version for version, length in runs for _ in range(length)]
  assert protocol.expand_versions(spans, end).tolist() == expected
