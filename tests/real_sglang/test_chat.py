"""Chat completions: template, thoughts, a tool call, ids in and out, and the same as a stream.

The scripted checkpoint says one tool call after whatever the prompt ends with.
"""

import json

import pytest

from intellect3.rendering import bytes as byte_vocabulary
from tests.real_sglang import checkpoints

TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "get_weather",
      "description": "Weather of a city",
      "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
      },
    },
  }
]
QUESTION = [{"role": "user", "content": "how warm is it?"}]
SCRIPT_IDS = [checkpoints.token_of(piece) for piece in checkpoints.SCRIPT]


@pytest.fixture
def scripted(server):
  server.run(lambda opened: opened.restore(server.scripted, 5))
  return server


def body(**more):
  common = {"model": "any", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
  return {**common, **more}


def test_a_tool_call_is_told_from_thoughts_and_text(scripted):
  status, reply = scripted.post(
    "/v1/chat/completions", **body(tools=TOOLS, return_token_ids=True, logprobs=True)
  )
  assert status == 200, reply
  (choice,) = reply["choices"]
  message = choice["message"]
  assert choice["finish_reason"] == "tool_calls"
  assert message["reasoning_content"] == "Let me look."
  assert not message["content"]
  (call,) = message["tool_calls"]
  assert call["type"] == "function" and call["id"]
  assert call["function"]["name"] == "get_weather"
  assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
  assert choice["response_token_ids"] == SCRIPT_IDS
  assert len(choice["logprobs"]["content"]) == len(SCRIPT_IDS)
  assert all(item["logprob"] > -1e-3 for item in choice["logprobs"]["content"])
  assert reply["usage"]["completion_tokens"] == len(SCRIPT_IDS)
  assert reply["usage"]["prompt_tokens"] == len(choice["prompt_token_ids"])


def test_the_prompt_is_the_template_in_ids(scripted):
  status, reply = scripted.post("/v1/chat/completions", **body(return_token_ids=True))
  assert status == 200, reply
  expected = [byte_vocabulary.USER, *b"how warm is it?", byte_vocabulary.ASSISTANT]
  assert reply["choices"][0]["prompt_token_ids"] == expected


def test_a_turn_with_a_tools_result(scripted):
  call = {"name": "get_weather", "arguments": json.dumps({"city": "Paris"})}
  messages = [
    *QUESTION,
    {
      "role": "assistant",
      "content": None,
      "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
  ]
  status, reply = scripted.post(
    "/v1/chat/completions", **body(messages=messages, return_token_ids=True)
  )
  assert status == 200, reply
  ids = reply["choices"][0]["prompt_token_ids"]
  named = [checkpoints.token_of(piece) for piece in ("<tool_call>", "get_weather\n", "<arg_key>")]
  start = ids.index(named[0])
  assert ids[start : start + 3] == named
  observed = ids.index(byte_vocabulary.OBSERVATION)
  assert bytes(i for i in ids[observed:] if i < 256).endswith(b"sunny</tool_response>")
  assert ids[-1] == byte_vocabulary.ASSISTANT


def test_ids_in_place_of_messages(scripted):
  ids = [byte_vocabulary.USER, *b"hi", byte_vocabulary.ASSISTANT]
  status, reply = scripted.post(
    "/v1/chat/completions",
    **body(input_ids=ids, return_token_ids=True, return_meta_info=True, tools=TOOLS),
  )
  assert status == 200, reply
  (choice,) = reply["choices"]
  assert choice["prompt_token_ids"] == ids
  assert choice["response_token_ids"] == SCRIPT_IDS
  assert choice["meta_info"]["weight_version"] == "5"
  # SGLang writes the chat's reason over the generation's own, our engine keeps the two apart.
  reason = {"sglang": "tool_calls", "engine": "stop"}[scripted.kind]
  assert choice["meta_info"]["finish_reason"]["type"] == reason


def test_a_stream_of_a_tool_call_adds_up(scripted):
  async def collect(opened):
    return [event async for event in opened.stream("/v1/chat/completions", body(tools=TOOLS))]

  events = scripted.run(collect)
  thoughts = arguments = ""
  names, reasons = [], []
  for event in events:
    assert event["object"] == "chat.completion.chunk"
    for choice in event["choices"]:
      delta = choice["delta"]
      thoughts += delta.get("reasoning_content") or ""
      for call in delta.get("tool_calls") or []:
        if call["function"].get("name"):
          names.append(call["function"]["name"])
        arguments += call["function"].get("arguments") or ""
      if choice.get("finish_reason"):
        reasons.append(choice["finish_reason"])
  assert thoughts == "Let me look."
  assert names == ["get_weather"]
  assert json.loads(arguments) == {"city": "Paris"}
  assert reasons == ["tool_calls"]


def test_without_tools_the_text_stays_text(scripted):
  status, reply = scripted.post("/v1/chat/completions", **body())
  assert status == 200, reply
  (choice,) = reply["choices"]
  assert choice["finish_reason"] == "stop"
  assert not choice["message"].get("tool_calls")
  assert choice["message"]["content"].startswith("<tool_call>get_weather")


def test_a_chat_without_messages_is_refused(scripted):
  status, answer = scripted.post("/v1/chat/completions", model="any")
  assert status == 400 and "messages" in json.dumps(answer)
