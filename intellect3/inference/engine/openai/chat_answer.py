"""`/v1/chat/completions`, the way out: whole answers, and the events of a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from intellect3.inference.engine import asgi, parse
from intellect3.inference.engine.asgi import Answer, Wire
from intellect3.inference.engine.generate import House, off_loop
from intellect3.inference.engine.loop import Event
from intellect3.inference.engine.openai import chat, wording
from intellect3.inference.engine.openai.chat import MissingField, Plan
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.sequence import Sequence as Generation
from intellect3.inference.engine.stream import Teller
from intellect3.inference.engine.text import Text
from intellect3.rendering import glm45
from intellect3.rendering.glm45 import CallStream, Piece, ReasoningStream


def refuse(error: RequestError) -> Answer:
  """A refusal as this route words it."""
  if isinstance(error, MissingField):
    return asgi.bad_request(str(error))
  return wording.refuse(error)


class ChatRoute:
  """The handler of `/v1/chat/completions`."""

  def __init__(self, house: House):
    self._house = house

  async def __call__(self, body: bytes, wire: Wire) -> Answer | None:
    house = self._house
    asked = chat.read(await off_loop(body, parse.parse_body, body))
    plan = await off_loop(body, chat.plan, asked, house.serving)
    created = int(time.time())
    if asked.stream:
      await house.stream(plan.call, wire, ChatStream(house, plan, created))
      return None
    generations = await house.run(plan.call, wire)
    return asgi.json_answer(answer(house, plan, generations, created))


def answer(
  house: House, plan: Plan, generations: Sequence[Generation], created: int
) -> dict[str, Any]:
  """The answer for finished generations; `created` in seconds since 1970."""
  asked, first = plan.asked, generations[0]
  told = {
    "id": first.request.rid,
    "object": "chat.completion",
    "created": created,
    "model": asked.model,
    "choices": [
      _choice(house, plan, index, generation) for index, generation in enumerate(generations)
    ],
    "usage": _usage(house, plan, generations),
    "metadata": wording.metadata(first, house.version),
  }
  if asked.return_routed_experts and not asked.return_meta_info:
    told["sglext"] = {"routed_experts": house.wording.routed_experts(first)}
  return told


def _choice(house: House, plan: Plan, index: int, generation: Generation) -> dict[str, Any]:
  asked, finish = plan.asked, generation.finish
  assert finish is not None
  reasoning, content, calls = chat.parts(plan, house.wording.final_text(generation))
  reason, matched = finish["type"], finish.get("matched")
  if calls and reason == "stop":
    reason, matched = "tool_calls", None
  message: dict[str, Any] = {
    "role": "assistant",
    "content": content,
    "reasoning_content": reasoning or None,
  }
  if calls:
    message["tool_calls"] = [
      _tool_call(place, _call_id(), call.name, call.arguments) for place, call in enumerate(calls)
    ]
  told: dict[str, Any] = {
    "index": index,
    "message": message,
    "logprobs": None,
    "finish_reason": reason,
    "matched_stop": matched,
  }
  if asked.logprobs:
    text = house.wording.text
    assert text is not None
    told["logprobs"] = wording.chat_logprobs(text, generation, 0, len(generation.output_ids))
  if asked.return_token_ids or asked.return_prompt_token_ids:
    told["prompt_token_ids"] = generation.request.input_ids
  if asked.return_token_ids:
    told["response_token_ids"] = generation.output_ids
  if asked.return_meta_info:
    told["meta_info"] = house.wording.reply(
      generation,
      version=house.version,
      namer=house.wording.namer(plan.call.token_names),
      reasoning_tokens=_reasoning_tokens(house.wording.text, plan, generation),
    )["meta_info"]
  return told


class ChatStream:
  """The events of a streamed chat."""

  def __init__(self, house: House, plan: Plan, created: int):
    self._house, self._plan = house, plan
    self._head = {"object": "chat.completion.chunk", "created": created, "model": plan.asked.model}
    self._choices: dict[int, ChoiceStream] = {}

  def event(self, index: int, event: Event) -> bytes:
    """What a generation's progress is told as; maybe nothing."""
    told = b""
    if index not in self._choices:
      self._choices[index] = ChoiceStream(self._house, self._plan, event.sequence)
      opening = {"reasoning_content": None, "role": "assistant", "content": ""}
      told = self._chunk(event.sequence, index, {"delta": opening, "logprobs": None})
    choice = self._choices[index]
    since = choice.teller.told
    deltas = choice.advance(event)
    logprobs = None
    if self._plan.asked.logprobs and event.length > since:
      text = self._house.wording.text
      assert text is not None
      logprobs = wording.chat_logprobs(text, event.sequence, since, event.length)
      # Logprobs go with the first thing said; where nothing is, with an empty delta.
      deltas = deltas or [{"reasoning_content": None}]
    for delta in deltas:
      told += self._chunk(event.sequence, index, {"delta": delta, "logprobs": logprobs})
      logprobs = None
    return told

  def end(self, generations: Sequence[Generation]) -> bytes:
    """How each choice ended, and what else was asked for."""
    asked, told = self._plan.asked, b""
    for index, generation in enumerate(generations):
      finish = generation.finish
      assert finish is not None
      reason = finish["type"]
      if reason == "stop" and self._choices[index].called:
        reason = "tool_calls"
      choice = {"delta": {"reasoning_content": None}, "logprobs": None, "finish_reason": reason}
      told += self._chunk(generation, index, choice | {"matched_stop": finish.get("matched")})
    if asked.return_routed_experts:
      experts = self._house.wording.routed_experts(generations[0])
      told += self._event(generations[0], [], {"sglext": {"routed_experts": experts}})
    if wording.include_usage(asked.stream_options):
      usage = _usage(self._house, self._plan, generations)
      told += self._event(generations[0], [], {"usage": usage})
    return told

  def _chunk(self, generation: Generation, index: int, choice: dict[str, Any]) -> bytes:
    whole = {"index": index, "finish_reason": None, "matched_stop": None} | choice
    return self._event(generation, [whole], {"usage": None} if _is_call(choice) else {})

  def _event(self, generation: Generation, choices: list[Any], more: dict[str, Any]) -> bytes:
    return asgi.event({"id": generation.request.rid, **self._head, "choices": choices, **more})


class ChoiceStream:
  """One choice of a streamed chat: its text, taken apart as it comes."""

  def __init__(self, house: House, plan: Plan, generation: Generation):
    self.teller = Teller(house.wording, generation)
    self._reasoning = ReasoningStream(thinking=plan.thinking) if plan.split else None
    self._calls = CallStream(plan.tools) if plan.tools else None

  @property
  def called(self) -> bool:
    """Whether whole tool calls, and no half ones, were said."""
    return self._calls is not None and self._calls.whole_calls > 0 and self._calls.complete

  def advance(self, event: Event) -> list[dict[str, Any]]:
    """Goes on to an event's length; returns what the client gets to know."""
    reasoning, text = "", self.teller.advance(event)
    if self._reasoning is not None:
      reasoning, text = self._reasoning.feed(text)
      if event.finished:
        more_reasoning, more = self._reasoning.end()
        reasoning, text = reasoning + more_reasoning, text + more
    deltas: list[dict[str, Any]] = []
    if reasoning:
      deltas.append({"reasoning_content": reasoning})
    if self._calls is None:
      if text:
        deltas.append({"content": text, "reasoning_content": None})
      return deltas
    pieces = self._calls.feed(text)
    if event.finished:
      pieces += self._calls.end()
    return deltas + [_delta(piece) for piece in pieces]


def _delta(piece: Piece) -> dict[str, Any]:
  if piece.content:
    return {"role": None, "content": piece.content, "reasoning_content": None}
  call_id = None if piece.name is None else _call_id()
  call = _tool_call(piece.call, call_id, piece.name, piece.arguments)
  return {"role": None, "content": None, "reasoning_content": None, "tool_calls": [call]}


def _is_call(choice: dict[str, Any]) -> bool:
  return choice["delta"].get("role", "") is None


def _tool_call(index: int, call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
  function = {"name": name, "arguments": arguments}
  return {"id": call_id, "index": index, "type": "function", "function": function}


def _call_id() -> str:
  return f"call_{uuid.uuid4().hex[:24]}"


def _usage(house: House, plan: Plan, generations: Sequence[Generation]) -> dict[str, Any]:
  return wording.usage(
    len(generations[0].request.input_ids),
    sum(len(generation.output_ids) for generation in generations),
    sum(_reasoning_tokens(house.wording.text, plan, generation) for generation in generations),
  )


def _reasoning_tokens(text: Text | None, plan: Plan, generation: Generation) -> int:
  """Output tokens up to and with the end of the reasoning; all where it does not end."""
  if not plan.thinking or text is None:
    return 0
  end = text.encode(glm45.END_THINK, special=False)
  output = generation.output_ids
  for start in range(len(output) - len(end) + 1):
    if output[start : start + len(end)] == end:
      return start + len(end)
  return len(output)
