"""Every recorded exchange again, over an engine that samples what the real one sampled.

Answers must be the recorded ones to the letter, but for times, for ids that a server makes up, and
where `docs/inference.md` says that ours differs on purpose.
"""

import copy
import json

import pytest
from engine_http import GOLDENS, MODEL_A, exchanges
from scripted import ScriptedEngine, output_of, recorded_serving, replay

from intellect3.inference.engine import parse, sampling_params
from intellect3.inference.engine.openai import chat

EXCHANGES = exchanges()
TIMES = {
  "forward_entry_time",
  "prefill_finished_time",
  "queue_time",
  "e2e_latency",
  "request_received_ts",
  "first_token_latency",
  "api_server_dispatch_finish_ts",
  "request_finished_ts",
  "decode_throughput",
  "response_sent_to_client_ts",
  "created",
}
MADE_UP = {"id", "weight_version", "model_path", "served_model_name", "tokenizer_path"}
SAMPLED = [
  name
  for name, exchange in EXCHANGES.items()
  if exchange["request"]["path"] == "/generate" and exchange["status"] == 200
]
CHATS = ["chat", "chat_tools_random_text", "chat_tools_call", "chat_tool_result_turn"]
REFUSED = [
  name
  for name, exchange in EXCHANGES.items()
  if exchange["status"] in (400, 404) and "during" not in exchange
]
OURS_IN_OTHER_WORDS = {
  "bad_unknown_sampling_param",
  "bad_pause_mode",
  "chat_bad_no_messages",
  "update_weights_from_disk_missing_path",
  "update_weights_from_disk_no_weights",
  "update_weights_from_disk_no_model_path",
}
"""Refusals whose text SGLang's libraries make; ours names the same field."""


@pytest.fixture(scope="module")
def served():
  return recorded_serving(MODEL_A)


def last_events(answer):
  """The whole replies of an answer: of a stream, each generation's last event, by index."""
  replies = answer if isinstance(answer, list) else [answer]
  last = {}
  for reply in replies:
    if isinstance(reply, dict) and "meta_info" in reply:
      last[reply["meta_info"]["id"]] = reply
  return sorted(last.values(), key=lambda reply: reply.get("index", 0))


def joined(events):
  """The whole reply that an incremental stream tells piece by piece."""
  whole = copy.deepcopy(events[-2])
  for key, holder in (("output_ids", None), ("output_token_logprobs", "meta_info")):
    pieces = [event if holder is None else event[holder] for event in events[:-1]]
    rows = [row for piece in pieces for row in piece[key]]
    (whole if holder is None else whole[holder])[key] = rows
  return [whole]


def comparable(value):
  """Without times and made-up names; that they are there, and of which type, stays."""
  if isinstance(value, dict):
    return {
      key: type(item).__name__ if key in TIMES | MADE_UP else comparable(item)
      for key, item in value.items()
      if key != "embedding"
    }
  return [comparable(item) for item in value] if isinstance(value, list) else value


def asked(name):
  request = copy.deepcopy(EXCHANGES[name]["request"])
  return request["method"], request["path"], request["json"]


@pytest.mark.parametrize("name", SAMPLED)
def test_generations_are_told_as_recorded(name, served):
  theirs = EXCHANGES[name]["response"]
  replies = joined(theirs) if "incremental" in name else last_events(theirs)
  outputs = [output_of(reply) for reply in replies]
  incremental = ["--incremental-streaming-output"] if "incremental" in name else []
  serving = recorded_serving(MODEL_A, *incremental) if incremental else served
  [(status, ours)] = replay(serving, ScriptedEngine(outputs), asked(name))
  assert status == 200
  if "stream" not in name:
    assert comparable(ours) == comparable(theirs)
    return
  for index in {event.get("index") for event in theirs if isinstance(event, dict)}:
    mine, recorded = (
      [comparable(event) for event in events if event != "[DONE]" and event.get("index") == index]
      for events in (ours, theirs)
    )
    # The recorded client missed some events: every one it saw is among ours.
    assert [event for event in mine if event in recorded] == recorded
    assert len(mine) >= len(recorded)
  assert ours[-1] == theirs[-1] == "[DONE]"


def test_a_stream_ends_with_done_once_for_all(served):
  outputs = [output_of(r) for r in last_events(EXCHANGES["generate_stream_n2"]["response"])]
  [(_, events)] = replay(served, ScriptedEngine(outputs), asked("generate_stream_n2"))
  assert events.count("[DONE]") == 1


def chat_outputs(name):
  """The recorded tokens of a chat, as a generation."""
  answer = EXCHANGES[name]["response"]
  choice = answer["choices"][0]
  tokens = choice["response_token_ids"]
  rows = (choice["logprobs"] or {"content": []})["content"]
  finish = {"type": choice["finish_reason"]}
  if finish["type"] == "tool_calls":
    finish = {"type": "stop", "matched": tokens[-1]}
  elif finish["type"] == "length":
    finish["length"] = len(tokens)
  spans = answer["metadata"]["weight_versions"]
  return choice, {
    "output_ids": tokens,
    "output_logprobs": [row["logprob"] for row in rows],
    "finish": finish,
    "spans": [[span["version"], span["start"], span["end"]] for span in spans],
  }


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_rendered_and_told_as_recorded(name, served):
  choice, output = chat_outputs(name)

  def top(row):
    return [(t["logprob"], served.text.encode(t["token"], special=False)[0]) for t in row]

  output["output_top"] = [
    top(row["top_logprobs"])
    for row in (choice["logprobs"] or {"content": []})["content"]
    if row["top_logprobs"]
  ]
  method, path, body = asked(name)
  body.pop("regex", None)
  engine = ScriptedEngine([output], version="7")
  [(status, ours)] = replay(served, engine, (method, path, body))
  theirs = copy.deepcopy(EXCHANGES[name]["response"])
  assert status == 200
  for answer in (ours, theirs):
    for row in (answer["choices"][0]["logprobs"] or {"content": []})["content"]:
      for top in row["top_logprobs"]:  # half characters cannot be told by their text
        top.pop("token"), top.pop("bytes")
  assert comparable(ours) == comparable(theirs)
  if "tool_calls" in choice["message"]:
    assert ours["choices"][0]["message"]["tool_calls"][0]["id"].startswith("call_")


def merged(events):
  """A streamed chat as one: content, names and arguments of calls, keys of every kind of chunk."""
  content, calls, kinds, end = "", [], set(), events[-3]["choices"][0]
  for event in events[:-1]:
    kinds.add((*sorted(event), *sorted(event["choices"][0]["delta"] if event["choices"] else ())))
    for choice in event["choices"]:
      assert set(choice) == {"index", "delta", "logprobs", "finish_reason", "matched_stop"}
      content += choice["delta"].get("content") or ""
      for call in choice["delta"].get("tool_calls", ()):
        if call["id"] is not None:
          calls.append([call["function"]["name"], ""])
        calls[call["index"]][1] += call["function"]["arguments"]
  return content, calls, kinds, end["finish_reason"], end["matched_stop"]


def test_a_streamed_tool_call_is_told_as_recorded(served):
  _, output = chat_outputs("chat_tools_call")
  method, path, body = asked("chat_tools_call_stream")
  body.pop("regex")
  [(status, ours)] = replay(served, ScriptedEngine([output]), (method, path, body))
  theirs = EXCHANGES["chat_tools_call_stream"]["response"]
  assert status == 200 and ours[-1] == "[DONE]"
  assert merged(ours) == merged(theirs)
  assert comparable(ours[0]) == comparable(theirs[0])
  ours[-2]["usage"].update(completion_tokens=88, total_tokens=268)  # other tokens, same text
  assert comparable(ours[-2]) == comparable(theirs[-2])


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_worded_as_recorded(name):
  def missing(path):
    raise ValueError(f"{path} is no model")

  serving = recorded_serving(MODEL_A, prepare=missing)
  exchange = copy.deepcopy(EXCHANGES[name])
  calls = [asked(name)]
  if name == "bad_update_weights_from_distributed_no_group":
    calls = [("POST", "/begin_weight_update", {}), *calls]
  status, ours = replay(serving, ScriptedEngine([]), *calls)[-1]
  assert status == exchange["status"]
  if name in OURS_IN_OTHER_WORDS:
    for value in (ours, exchange["response"]):
      for key in ("message", "error"):
        if key in value:
          assert isinstance(value[key], str) and value[key]
          value[key] = ""
  assert ours == exchange["response"]


def test_an_unknown_sampling_parameter_is_named():
  [(_, ours)] = replay(
    recorded_serving(MODEL_A), ScriptedEngine([]), asked("bad_unknown_sampling_param")
  )
  theirs = EXCHANGES["bad_unknown_sampling_param"]["response"]["error"]
  assert ours["error"].startswith("unknown field `bogus`, expected one of `max_new_tokens`, ")
  known = {part.split("`")[1] for part in theirs.split(", ")[1:]}
  assert {part.split("`")[1] for part in ours["error"].split(", ")[1:]} == known


def test_a_stream_that_is_refused_is_a_stream(served):
  [(status, ours)] = replay(served, ScriptedEngine([]), asked("bad_stream_prompt_too_long"))
  assert (status, ours) == (200, EXCHANGES["bad_stream_prompt_too_long"]["response"])


@pytest.mark.parametrize("name", ["models", "model_info", "server_info", "health", "flush_cache"])
def test_what_only_tells_has_the_recorded_keys(name, served):
  [(status, ours)] = replay(served, ScriptedEngine([]), asked(name))
  theirs = EXCHANGES[name]["response"]
  assert status == 200
  if isinstance(theirs, str):
    assert ours == theirs
    return
  assert set(theirs) <= set(ours)
  for key in set(theirs) - {"internal_states"}:
    assert theirs[key] is None or isinstance(ours[key], type(theirs[key])), key


@pytest.mark.parametrize(
  "name",
  [
    "abort_unknown_rid",
    "begin_weight_update",
    "end_weight_update",
    "release_memory_occupation",
    "resume_memory_occupation",
    "update_weights_from_disk_ok",
    "health_after_continue",
  ],
)
def test_control_is_answered_as_recorded(name, served):
  calls = [asked(name)]
  if name == "end_weight_update":
    calls = [("POST", "/begin_weight_update", {}), *calls]
  status, ours = replay(served, ScriptedEngine([]), *calls)[-1]
  assert (status, ours) == (200, EXCHANGES[name]["response"])


def test_where_sglang_dies_or_hangs_ours_answers(served):
  name = "z_out_of_vocabulary_kills_server"
  status, ours = replay(served, ScriptedEngine([]), asked(name))[0]
  assert EXCHANGES[name]["status"] is None
  assert status == 400 and "100000 is outside the vocabulary" in ours["error"]["message"]
  assert EXCHANGES["health_while_paused"]["status"] == 503
  engine = ScriptedEngine([])
  engine.paused = True
  for name in ("health_while_paused", "z_health_after_out_of_vocabulary"):
    assert replay(served, engine, asked(name)) == [(200, "")]
  assert replay(served, engine, ("GET", "/health_generate")) == [(200, "")]
  assert not engine.requests


def test_no_recording_is_left_out():
  elsewhere = {
    "bad_stream_prompt_too_long",
    "chat_tools_call_stream",
    "health_while_paused",
    "z_health_after_out_of_vocabulary",
    "z_out_of_vocabulary_kills_server",
    "model_info_after_failed_update",
    "model_info_after_update",
  }
  told = {"models", "model_info", "server_info", "health", "flush_cache"}
  steered = {name for name in EXCHANGES if EXCHANGES[name]["status"] == 200} - told
  assert set(EXCHANGES) == {*SAMPLED, *CHATS, *REFUSED, *elsewhere, *told, *steered}


def test_every_field_that_sglang_knows_is_supported_or_refused():
  known = json.loads((GOLDENS / "fields.json").read_text())
  ours = {
    "GenerateReqInput": {*parse.SUPPORTED, *parse.UNSUPPORTED},
    "SamplingParams": {*sampling_params.SUPPORTED, *sampling_params.UNSUPPORTED},
    "ChatCompletionRequest": {*chat.SUPPORTED, *chat.UNSUPPORTED},
  }
  internal = {
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
    "ebnf_full_assistant",
  }
  for kind, fields in ours.items():
    assert set(known[kind]) - fields == (internal if kind == "SamplingParams" else set()), kind
