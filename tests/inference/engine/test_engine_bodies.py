"""How much a route reads of what a client sends, and what it does with half a body."""

import asyncio
import json

import pytest
from engine_http import MODEL_A
from scripted import ScriptedEngine, ask, recorded_serving

from intellect3.inference.engine.app import make_app
from intellect3.inference.engine.desk import Desk
from intellect3.inference.engine.request import Limits

GENERATE = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}
SAID = {"output_ids": [5, 6], "spans": [["default", 0, 2]], "finish": {"type": "length"}}
BODIES = {
  "/generate": GENERATE,
  "/v1/completions": {"prompt": [1, 2]},
  "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
  "/abort_request": {"rid": "x"},
}


@pytest.fixture(scope="module")
def served():
  return recorded_serving(MODEL_A, "--slots=2")


def send(served, path, *messages):
  """Sends ASGI messages to a route; returns (status, parsed answer), or None; and the engine."""

  async def scenario():
    engine = ScriptedEngine([SAID])
    desk = Desk(asyncio.get_running_loop(), slots=2, queue_limit=4)
    engine.on_events = desk.report
    app, inbox, sent = make_app(engine, desk, served), asyncio.Queue(), []
    for message in messages:
      inbox.put_nowait(message)

    async def take(message):
      sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    await asyncio.wait_for(app(scope, inbox.get, take), 30)
    if not sent:
      return None, engine
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return (sent[0]["status"], json.loads(text or b"null")), engine

  return asyncio.run(scenario())


def pieces(body, count):
  size = -(-len(body) // count)
  cut = [body[start : start + size] for start in range(0, len(body), size)]
  return [
    {"type": "http.request", "body": piece, "more_body": piece is not cut[-1]} for piece in cut
  ]


def padded(fields, size):
  return json.dumps(fields).encode().ljust(size)


def test_the_limit_takes_a_full_prompt_for_every_slot():
  limits = Limits(vocab_size=200_000, context_length=4096, slots=64)
  prompts = [[199_999] * 4095] * 64
  assert len(json.dumps({"input_ids": prompts})) < limits.max_body_bytes
  longer = Limits(vocab_size=200_000, context_length=8192, slots=64)
  assert longer.max_body_bytes - limits.max_body_bytes == 64 * 4096 * 16


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("path", BODIES)
def test_a_body_beyond_the_limit_is_refused(served, path, count):
  most = served.limits.max_body_bytes
  (status, answer), _ = send(served, path, *pieces(padded(BODIES[path], most), count))
  assert status == 200, answer
  (status, answer), engine = send(served, path, *pieces(padded(BODIES[path], most + 1), count))
  assert status == 413 and not engine.requests and not engine.aborted
  assert str(most) in json.dumps(answer) and "--slots" in json.dumps(answer)
  if path.startswith("/v1"):
    assert (answer["code"], answer["type"]) == (413, "PayloadTooLarge")


def test_the_rest_of_a_body_that_is_too_large_is_not_waited_for(served):
  body = padded(GENERATE, served.limits.max_body_bytes + 1)
  first = {"type": "http.request", "body": body, "more_body": True}
  (status, _), _ = send(served, "/generate", first)
  assert status == 413


def test_weights_may_be_of_any_size(served):
  body = padded({"serialized_named_tensors": ["x"]}, 2 * served.limits.max_body_bytes)
  (status, answer), _ = send(served, "/update_weights_from_tensor", *pieces(body, 3))
  assert status == 400 and "begin_weight_update" in answer["message"]


@pytest.mark.parametrize("path", BODIES)
def test_half_a_body_is_nothing(served, path):
  """Though what has come may be JSON of its own."""
  half = {"type": "http.request", "body": json.dumps(BODIES[path]).encode(), "more_body": True}
  answer, engine = send(served, path, half, {"type": "http.disconnect"})
  assert answer is None and not engine.requests and not engine.aborted


def test_a_refused_body_of_tensors_spoils_the_session(served):
  async def scenario():
    engine = ScriptedEngine([])
    desk = Desk(asyncio.get_running_loop(), slots=2, queue_limit=4)
    app = make_app(engine, desk, served)
    calls = (
      ("/begin_weight_update", {}),
      ("/update_weights_from_tensor", {"serialized_named_tensors": 3}),
      ("/end_weight_update", {}),
      ("/end_weight_update", {}),
    )
    return [await ask(app, "POST", *call) for call in calls], engine

  answers, engine = asyncio.run(scenario())
  assert [status for status, _ in answers] == [200, 400, 400, 400] and not engine.updates
  assert "serialized_named_tensors" in answers[2][1]["message"]
  assert "no weight-update session" in answers[3][1]["message"]
