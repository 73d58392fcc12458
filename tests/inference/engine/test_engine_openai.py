"""OpenAI's routes over a scripted engine: what is asked of it, and how its tokens are told."""

import dataclasses
import json
import math

import pytest
from engine_http import MODEL_A
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON
from scripted import ScriptedEngine, recorded_serving, replay

from intellect3.inference.engine import parse
from intellect3.inference.engine.openai import chat as chats
from intellect3.inference.engine.openai import completions
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.text import load

TEXT = load(MODEL_A, 512)
USER = TEXT.encode("<|user|>", special=False)[0]
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
FLAGS_OF_SAMPLING = {
  "max_tokens": 9,
  "min_tokens": 2,
  "temperature": 0.5,
  "top_p": 0.9,
  "top_k": 4,
  "min_p": 0.1,
  "frequency_penalty": 0.25,
  "presence_penalty": 0.5,
  "repetition_penalty": 1.5,
  "stop": ["x"],
  "stop_token_ids": [3],
  "seed": 7,
  "ignore_eos": True,
  "no_stop_trim": True,
  "rid": "mine",
  "extra_key": "v1",
}


@pytest.fixture(scope="module")
def served():
  return recorded_serving(MODEL_A)


def output(string, *, finish=None, top=0):
  """What a model says, ended by its user token."""
  ids = [*TEXT.encode(string, special=False), USER]
  return {
    "output_ids": ids,
    "output_logprobs": [-0.5] * len(ids),
    "output_top": [[(-0.1 * k, k) for k in range(1, top + 1)] for _ in ids] if top else [],
    "spans": [["default", 0, len(ids)]],
    "finish": finish or {"type": "stop", "matched": USER},
  }


def chat(serving, says, **body):
  engine = ScriptedEngine([output(string) for string in says])
  [(status, answer)] = replay(
    serving, engine, ("POST", "/v1/chat/completions", {"messages": MESSAGES} | body)
  )
  return status, answer, engine.requests


def complete(serving, outputs, **body):
  engine = ScriptedEngine(outputs)
  [(status, answer)] = replay(serving, engine, ("POST", "/v1/completions", body))
  return status, answer, engine.requests


def assert_sampling(request):
  assert (request.max_new_tokens, request.min_new_tokens, request.temperature) == (9, 2, 0.5)
  assert (request.top_p, request.top_k, request.min_p) == (0.9, 4, 0.1)
  penalties = (request.frequency_penalty, request.presence_penalty, request.repetition_penalty)
  assert penalties == (0.25, 0.5, 1.5)
  assert request.stop_strings == ("x",) and request.stop_token_ids == {3} and request.seed == 7
  assert request.ignore_eos and request.no_stop_trim
  assert (request.rid, request.extra_key) == ("mine", "v1")


def test_a_chats_parameters_arrive(served):
  status, _, [request] = chat(served, ["x"], **FLAGS_OF_SAMPLING)
  assert status == 200
  assert_sampling(request)
  _, _, [request] = chat(served, ["x"])
  assert request.max_new_tokens == 1024 - 2 - len(request.input_ids)
  assert (request.temperature, request.top_p, request.top_k) == (1.0, 1.0, 0)


def test_the_newer_name_of_a_chats_limit_goes_first_zero_too(served):
  for newer, expected in ((0, 0), (4, 4), (None, 9)):
    _, _, [request] = chat(served, ["x"], max_completion_tokens=newer, max_tokens=9)
    assert request.max_new_tokens == expected


def test_a_completions_parameters_arrive(served):
  status, _, [request] = complete(served, [output("x")], prompt=[1, 2], **FLAGS_OF_SAMPLING)
  assert status == 200 and request.input_ids == [1, 2]
  assert_sampling(request)
  _, _, [request] = complete(served, [output("x")], prompt="hello")
  assert request.max_new_tokens == 16 and request.input_ids == TEXT.encode("hello", special=True)


def test_chats_take_sampling_defaults_of_the_model(served, tmp_path):
  for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
    (tmp_path / name).write_bytes((MODEL_A / name).read_bytes())
  (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}')
  serving = recorded_serving(tmp_path)
  _, _, [request] = chat(serving, ["x"], top_p=0.5)
  assert (request.temperature, request.top_p) == (0.6, 0.5)


def test_a_prompt_of_ids_is_not_rendered(served):
  status, answer, [request] = chat(
    served, ["x"], input_ids=[5, 6, 7], return_token_ids=True, return_meta_info=True
  )
  assert status == 200 and request.input_ids == [5, 6, 7]
  choice = answer["choices"][0]
  assert choice["prompt_token_ids"] == [5, 6, 7]
  assert choice["response_token_ids"] == [*TEXT.encode("x", special=False), USER]
  assert choice["meta_info"]["completion_tokens"] == len(choice["response_token_ids"])
  assert choice["meta_info"]["reasoning_tokens"] == answer["usage"]["reasoning_tokens"] > 0


def test_reasoning_is_told_apart(served):
  says = "<think>because</think>answer"
  _, answer, _ = chat(served, [says])
  message = answer["choices"][0]["message"]
  assert (message["reasoning_content"], message["content"]) == ("because", "answer")
  counted = answer["usage"]["reasoning_tokens"]
  assert counted == len(TEXT.encode("<think>because</think>", special=False))
  for more in ({"separate_reasoning": False}, {}):
    serving = served if more else recorded_without_parsers()
    _, answer, _ = chat(serving, [says], **more)
    message = answer["choices"][0]["message"]
    assert message["content"] == says and message["reasoning_content"] is None


def recorded_without_parsers():
  return dataclasses.replace(
    recorded_serving(MODEL_A), tool_call_parser=None, reasoning_parser=None
  )


def test_several_choices(served):
  _, answer, requests = chat(
    served, ["one</think>1", "two</think>22"], n=2, seed=5, return_token_ids=True
  )
  assert [choice["message"]["content"] for choice in answer["choices"]] == ["1", "22"]
  assert [choice["index"] for choice in answer["choices"]] == [0, 1]
  assert [request.seed for request in requests] == [5, 6]
  assert answer["usage"]["prompt_tokens"] == len(requests[0].input_ids)
  told = sum(len(choice["response_token_ids"]) for choice in answer["choices"])
  assert answer["usage"]["completion_tokens"] == told


def test_a_final_message_is_continued(served):
  messages = [*MESSAGES, {"role": "assistant", "content": "I was"}]
  status, _, [request] = chat(served, ["x"], messages=messages, continue_final_message=True)
  assert status == 200
  tail = TEXT.encode("I was", special=False)
  _, _, [plain] = chat(served, ["x"])
  assert request.input_ids == plain.input_ids + tail
  status, answer, _ = chat(served, ["x"], messages=messages)
  assert status == 400 and "continue_final_message" in answer["message"]


def test_content_parts_are_text(served, tmp_path):
  parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
  _, _, [request] = chat(served, ["x"], messages=[{"role": "user", "content": parts}])
  _, _, [plain] = chat(served, ["x"], messages=[{"role": "user", "content": "h i"}])
  assert request.input_ids == plain.input_ids
  template = "{% for part in messages[0].content %}<{{ part.text }}>{% endfor %}"
  (tmp_path / "parts.jinja").write_text(template)
  serving = recorded_serving(MODEL_A, "--chat-template", str(tmp_path / "parts.jinja"))
  _, _, [request] = chat(serving, ["x"], messages=[{"role": "user", "content": parts}])
  assert request.input_ids == TEXT.encode("<h><i>", special=False)


@pytest.mark.parametrize(
  ("body", "named"),
  [
    ({"messages": []}, "Messages"),
    ({"messages": [{"role": "poet", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ({"messages": [{"role": "assistant", "tool_calls": [3]}, *MESSAGES]}, "tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"regex": "a"}, "regex"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 100}, "top_logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"stream": True, "return_meta_info": True}, "return_meta_info"),
    ({"stream": True, "temperature": -1}, "temperature"),
    ({"stream_options": {"continuous_usage_stats": True}}, "continuous_usage_stats"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
    ({"chat_template_kwargs": {"messages": 1}}, "got messages"),
    ({"chat_template_kwargs": {"self": 1, "tools": []}}, "got self, tools"),
    ({"custom_params": {"a": 1}}, "custom_params"),
    ({"priority": 1}, "priority"),
    ({"max_completion_tokens": -1, "max_tokens": 3}, "max_new_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"n": 0}, "n must be"),
  ],
)
def test_chats_are_refused_by_name(served, body, named):
  status, answer, requests = chat(served, [], **body)
  assert status == 400 and named in answer["message"] and answer["object"] == "error"
  assert answer["code"] == 400 and not requests


@pytest.mark.parametrize(
  ("body", "named"),
  [
    ({}, "prompt"),
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "empty"),
    ({"prompt": [[1], []]}, "empty"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [100000]}, "vocabulary"),
    ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
    ({"prompt": [1], "best_of": 3}, "best_of"),
    ({"prompt": [1], "custom_params": {"a": 1}}, "custom_params"),
    ({"prompt": [1], "logprobs": 100}, "top_logprobs_num"),
    ({"prompt": [[1], [2]], "rid": ["a"]}, "rid"),
  ],
)
def test_completions_are_refused_by_name(served, body, named):
  status, answer, requests = complete(served, [], **body)
  assert status == 400 and named in answer["message"] and not requests


def events_of(answer):
  assert answer[-1] == "[DONE]"
  return answer[:-1]


def test_a_streamed_chat_says_what_a_whole_one_says(served):
  says = "<think>be\ncause</think>Hello! <tool_call>now\n</tool_call>"
  body = {"tools": [TOOL], "logprobs": True, "top_logprobs": 2}
  _, whole, _ = chat(served, [says], **body)
  _, answer, _ = chat(served, [says], stream=True, stream_options={"include_usage": True}, **body)
  *events, ending, usage = events_of(answer)
  deltas = [event["choices"][0]["delta"] for event in events]
  message = whole["choices"][0]["message"]
  assert "".join(d.get("reasoning_content") or "" for d in deltas) == message["reasoning_content"]
  assert "".join(d.get("content") or "" for d in deltas).strip() == message["content"]
  calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
  assert calls[0]["function"]["name"] == "now" and calls[0]["id"].startswith("call_")
  assert "".join(call["function"]["arguments"] for call in calls) == "{}"
  rows = [
    row
    for event in events
    for row in (event["choices"][0]["logprobs"] or {"content": []})["content"]
  ]
  assert rows == whole["choices"][0]["logprobs"]["content"]
  assert ending["choices"][0]["finish_reason"] == "tool_calls"
  assert usage["choices"] == [] and usage["usage"] == whole["usage"]


def test_a_call_that_the_length_ends_is_told_with_its_length(served):
  finish = {"type": "length", "length": 9}
  said = output("</think><tool_call>now\n</tool_call>", finish=finish)
  for stream in (False, True):
    body = {"messages": MESSAGES, "tools": [TOOL], "stream": stream}
    exchange = ("POST", "/v1/chat/completions", body)
    [(_, answer)] = replay(served, ScriptedEngine([said]), exchange)
    choice = (events_of(answer)[-1] if stream else answer)["choices"][0]
    assert stream or choice["message"]["tool_calls"][0]["function"]["name"] == "now"
    assert choice["finish_reason"] == "length"


def test_logprobs_of_several_things_said_at_once_are_told_once(served):
  """One event of many tokens: reasoning, content and a call."""
  said = output("why</think>so <tool_call>now\n</tool_call>")
  engine = ScriptedEngine([said], at_once=True)
  body = {"messages": MESSAGES, "tools": [TOOL], "stream": True, "logprobs": True}
  [(_, answer)] = replay(served, engine, ("POST", "/v1/chat/completions", body))
  chunks = [event["choices"][0] for event in events_of(answer)]
  deltas = [chunk["delta"] for chunk in chunks]
  assert [delta.get("content") for delta in deltas if delta.get("content")] == ["so "]
  told = [len(chunk["logprobs"]["content"]) for chunk in chunks if chunk["logprobs"]]
  assert told == [len(said["output_ids"])]


def test_streamed_choices_are_told_apart(served):
  _, answer, _ = chat(served, ["a</think>one", "b</think>two"], n=2, stream=True)
  content = {0: "", 1: ""}
  for event in events_of(answer):
    for choice in event["choices"]:
      content[choice["index"]] += choice["delta"].get("content") or ""
  assert content == {0: "one", 1: "two"}


def test_completions_of_several_prompts(served):
  outputs = [output(string) for string in ("a", "b", "c", "d")]
  _, answer, requests = complete(
    served, outputs, prompt=["x", "yz"], n=2, return_token_ids=True, rid="all"
  )
  assert [choice["text"] for choice in answer["choices"]] == ["a", "b", "c", "d"]
  assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
  expected = [TEXT.encode(prompt, special=True) for prompt in ("x", "x", "yz", "yz")]
  assert [choice["prompt_token_ids"] for choice in answer["choices"]] == expected
  assert answer["usage"]["prompt_tokens"] == len(expected[0]) + len(expected[2])
  assert answer["object"] == "text_completion" and set(answer["metadata"]) == {
    "weight_version",
    "weight_versions",
  }
  assert len({request.rid for request in requests}) == 4


@pytest.mark.parametrize("count", [0, 2])
def test_logprobs_of_completions(served, count):
  ids = TEXT.encode("hello", special=True)
  said = output("ab", top=count) | {
    "input_logprobs": [-1.0] * (len(ids) - 1),
    "input_top": [[(-1.0, 5), (-2.0, 129)]] * (len(ids) - 1),
  }
  _, answer, [request] = complete(served, [said], prompt="hello", logprobs=count, echo=True)
  assert (request.logprob_start, request.top_logprobs_num) == (0 if count else None, count)
  [choice] = answer["choices"]
  assert choice["text"] == "helloab"
  told = choice["logprobs"]
  prompt = len(ids) if count else 0
  assert told["tokens"][prompt:] == [TEXT.name(index) for index in said["output_ids"]]
  assert len(told["token_logprobs"]) == len(told["tokens"]) == len(told["text_offset"])
  if count:
    assert told["token_logprobs"][:2] == [None, -1.0] and told["top_logprobs"][0] is None
    half = TEXT.bytes_of(129).decode("latin-1")
    assert told["top_logprobs"][1] == {TEXT.name(5): -1.0, half: -2.0}
    assert len(told["top_logprobs"]) == len(told["tokens"])
  else:
    assert told["top_logprobs"] == []


def test_a_streamed_completion_says_what_a_whole_one_says(served):
  said = output("some words", top=1)
  body = {"prompt": [1, 2], "logprobs": 1, "echo": True, "return_token_ids": True}
  _, whole, _ = complete(served, [said], **body)
  _, answer, _ = complete(
    served, [said], stream=True, stream_options={"include_usage": True}, **body
  )
  *events, usage = events_of(answer)
  choices = [event["choices"][0] for event in events]
  [expected] = whole["choices"]
  assert len(choices) > 2
  assert "".join(choice["text"] for choice in choices) == expected["text"]
  assert [i for choice in choices for i in choice["token_ids"]] == expected["token_ids"]
  assert choices[0]["prompt_token_ids"] == [1, 2] and "prompt_token_ids" not in choices[1]
  told = [lp for choice in choices for lp in choice["logprobs"]["token_logprobs"]]
  assert told == expected["logprobs"]["token_logprobs"]
  assert choices[-1]["finish_reason"] == "stop" and choices[0]["finish_reason"] is None
  assert usage["usage"] == whole["usage"] and not math.isnan(told[-1])


KEYS = ("role", "content", "tool_calls", "function", "name", "arguments", "type", "text")
PARTS = st.recursive(
  st.sampled_from(["user", "assistant", "tool", "text", "x", '{"a": 1}', "[", None, 3, {}]),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
  ),
  max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
  st.lists(st.dictionaries(st.sampled_from(KEYS), PARTS, max_size=4), min_size=1, max_size=3),
  st.dictionaries(st.sampled_from(sorted(chats.SUPPORTED)), JSON | PARTS, max_size=3),
)
def test_any_chat_is_planned_or_refused(served, messages, more):
  """Nothing that a client sends raises anything but RequestError."""
  for body in ({"messages": messages} | more, {"messages": messages, "tools": messages}):
    try:
      fields = parse.parse_body(json.dumps(body).encode())
      plan = chats.plan(chats.read(fields), served)
    except RequestError as refused:
      assert refused.status == 400
    else:
      assert plan.call.requests


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(completions.SUPPORTED)), JSON, max_size=4))
def test_any_completion_is_planned_or_refused(served, body):
  for fields in (body, body | {"prompt": [1, 2]}):
    try:
      fields = parse.parse_body(json.dumps(fields).encode())
      call = completions.plan(completions.read(fields), served.limits, served.text)
    except RequestError as refused:
      assert refused.status == 400
    else:
      assert call.requests
