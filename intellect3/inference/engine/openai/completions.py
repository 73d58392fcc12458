"""`/v1/completions`: a prompt of ids or text in; choices, or a stream of them, out."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from intellect3.inference.engine import asgi, parse
from intellect3.inference.engine.asgi import Answer, Wire
from intellect3.inference.engine.generate import House, off_loop
from intellect3.inference.engine.loop import Event
from intellect3.inference.engine.openai import wording
from intellect3.inference.engine.openai.wording import NOT_OURS
from intellect3.inference.engine.parse import Call, Wishes
from intellect3.inference.engine.request import Limits, RequestError
from intellect3.inference.engine.sampling_params import Sampling
from intellect3.inference.engine.sequence import Sequence as Generation
from intellect3.inference.engine.stream import Teller
from intellect3.inference.engine.text import Text

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  **NOT_OURS,
  "best_of": (None, 1),
  "suffix": (None, ""),
  "logit_bias": (None, {}),
  "json_schema": (None,),
  "regex": (None, ""),
  "ebnf": (None, ""),
  "stop_regex": (None, "", []),
  "response_format": (None, {"type": "text"}),
  "return_hidden_states": (None, False),
  "return_cached_tokens_details": (None, False),
  "return_spec_tokens_details": (None, False),
  "routed_experts_start_len": (None, 0),
}
"""Fields that SGLang knows and we refuse, with the values that mean "off"."""


class Completion(msgspec.Struct, kw_only=True):
  """The body, as SGLang names and defaults it. `user` changes nothing."""

  prompt: str | list[Any]
  model: str = "default"
  echo: bool = False
  frequency_penalty: float = 0.0
  logprobs: int | None = None
  max_tokens: int = 16
  n: int = 1
  presence_penalty: float = 0.0
  seed: int | None = None
  stop: str | list[str] | None = None
  stream: bool = False
  stream_options: dict[str, Any] | None = None
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = -1
  min_p: float = 0.0
  min_tokens: int = 0
  repetition_penalty: float = 1.0
  stop_token_ids: list[int] | None = None
  no_stop_trim: bool = False
  ignore_eos: bool = False
  skip_special_tokens: bool = True
  return_routed_experts: bool = False
  return_token_ids: bool = False
  rid: str | list[str] | None = None
  extra_key: str | None = None
  cache_salt: str | None = None
  user: str | None = None


SUPPORTED = frozenset(Completion.__struct_fields__)


def read(fields: dict[str, Any]) -> Completion:
  """Checks names and types; raises RequestError naming the field."""
  parse.check_fields("/v1/completions", fields, SUPPORTED, UNSUPPORTED)
  try:
    asked = msgspec.convert(fields, Completion)
  except msgspec.ValidationError as error:
    raise RequestError(str(error)) from None
  if asked.max_tokens <= 0:
    raise RequestError(f"max_tokens must be positive, got {asked.max_tokens}.")
  wording.include_usage(asked.stream_options)
  return asked


def plan(asked: Completion, limits: Limits, text: Text | None) -> Call:
  """The generations that are asked for; raises RequestError naming what is out of bounds."""
  if text is None:
    raise RequestError("prompt: the model directory has no tokenizer.json; use /generate.")
  prompts = _prompts(asked.prompt, text)
  rids = asked.rid if isinstance(asked.rid, list) else [None] * len(prompts)
  if len(rids) != len(prompts):
    raise RequestError(f"rid: expected one per prompt ({len(prompts)}), got {len(rids)}.")
  one = len(prompts) == 1 and isinstance(asked.rid, str)
  sampling = Sampling(
    max_new_tokens=asked.max_tokens,
    min_new_tokens=asked.min_tokens,
    temperature=asked.temperature,
    top_p=asked.top_p,
    top_k=asked.top_k,
    min_p=asked.min_p,
    frequency_penalty=asked.frequency_penalty,
    presence_penalty=asked.presence_penalty,
    repetition_penalty=asked.repetition_penalty,
    stop=asked.stop,
    stop_token_ids=list(asked.stop_token_ids or ()),
    n=asked.n,
    no_stop_trim=asked.no_stop_trim,
    ignore_eos=asked.ignore_eos,
    skip_special_tokens=asked.skip_special_tokens,
    sampling_seed=asked.seed,
  )
  salted = "" if asked.cache_salt is None else f"{asked.cache_salt}\0"
  plans = [
    (
      prompt,
      sampling,
      Wishes(
        rid=asked.rid if isinstance(asked.rid, str) and one else rid,
        return_logprob=asked.logprobs is not None,
        logprob_start_len=0 if asked.echo and asked.logprobs else -1,
        top_logprobs_num=asked.logprobs or 0,
        return_routed_experts=asked.return_routed_experts,
        extra_key=salted + (asked.extra_key or ""),
        stream=asked.stream,
      ),
    )
    for prompt, rid in zip(prompts, rids, strict=True)
  ]
  shared = asked.rid if isinstance(asked.rid, str) and not one else None
  return parse.plan_call(plans, limits, text, shared_rid=shared, stream=asked.stream)


def _prompts(prompt: str | list[Any], text: Text) -> list[list[int]]:
  strings = isinstance(prompt, str) or (prompt and isinstance(prompt[0], str))
  if strings:
    texts = parse.typed("prompt", [prompt] if isinstance(prompt, str) else prompt, list[str])
    prompts = [text.encode(string, special=True) for string in texts]
  elif prompt and isinstance(prompt[0], list):
    prompts = parse.typed("prompt", prompt, list[list[int]])
  else:
    prompts = [parse.typed("prompt", prompt, list[int])]
  if not all(prompts):
    raise RequestError("Prompt cannot be empty")
  return prompts


class CompletionsRoute:
  """The handler of `/v1/completions`."""

  def __init__(self, house: House):
    self._house = house

  async def __call__(self, body: bytes, wire: Wire) -> Answer | None:
    house = self._house
    asked = read(await off_loop(body, parse.parse_body, body))
    call = await off_loop(body, plan, asked, house.serving.limits, house.wording.text)
    created = int(time.time())
    if call.stream:
      await house.stream(call, wire, CompletionStream(house, asked, call, created))
      return None
    generations = await house.run(call, wire)
    return asgi.json_answer(self._answer(asked, generations, created))

  def _answer(
    self, asked: Completion, generations: Sequence[Generation], created: int
  ) -> dict[str, Any]:
    house, first = self._house, generations[0]
    text = house.wording.text
    assert text is not None
    choices = []
    for index, generation in enumerate(generations):
      finish = generation.finish or {}
      choice = {
        "index": index,
        "text": _echo(text, asked, generation) + house.wording.final_text(generation),
        "logprobs": _logprobs(text, asked, generation, 0, len(generation.output_ids)),
        "finish_reason": finish["type"],
        "matched_stop": finish.get("matched"),
      }
      if asked.return_token_ids:
        choice["token_ids"] = generation.output_ids
        choice["prompt_token_ids"] = generation.request.input_ids
      choices.append(choice)
    answer = {
      "id": first.request.rid,
      "object": "text_completion",
      "created": created,
      "model": asked.model,
      "choices": choices,
      "usage": _usage(asked, generations),
      "metadata": wording.metadata(first, house.version),
    }
    if asked.return_routed_experts:
      answer["sglext"] = {"routed_experts": house.wording.routed_experts(first)}
    return answer


class CompletionStream:
  """The events of a stream of completions."""

  def __init__(self, house: House, asked: Completion, call: Call, created: int):
    text = house.wording.text
    assert text is not None
    self._house, self._asked, self._call, self._text = house, asked, call, text
    self._head = {"object": "text_completion", "created": created, "model": asked.model}
    self._tellers: dict[int, Teller] = {}

  def event(self, index: int, event: Event) -> bytes:
    """What a generation's progress is told as."""
    generation, asked = event.sequence, self._asked
    first = index not in self._tellers
    teller = self._tellers.setdefault(index, Teller(self._house.wording, generation))
    since = teller.told
    further = teller.advance(event)
    finish = (generation.finish or {}) if event.finished else {}
    echo = _echo(self._text, asked, generation) if first else ""
    choice = {
      "index": index,
      "text": echo + further,
      "logprobs": _logprobs(self._text, asked, generation, since, event.length, echo=first),
      "finish_reason": finish.get("type"),
      "matched_stop": finish.get("matched"),
    }
    if asked.return_token_ids:
      choice["token_ids"] = generation.output_ids[since : event.length]
      if first:
        choice["prompt_token_ids"] = generation.request.input_ids
    return self._event(generation, [choice], {"usage": None})

  def end(self, generations: Sequence[Generation]) -> bytes:
    """What comes before the end of the stream."""
    told = b""
    if self._asked.return_routed_experts:
      experts = self._house.wording.routed_experts(generations[0])
      told += self._event(generations[0], [], {"sglext": {"routed_experts": experts}})
    if wording.include_usage(self._asked.stream_options):
      told += self._event(generations[0], [], {"usage": _usage(self._asked, generations)})
    return told

  def _event(self, generation: Generation, choices: list[Any], more: dict[str, Any]) -> bytes:
    return asgi.event({"id": generation.request.rid, **self._head, "choices": choices, **more})


def _echo(text: Text, asked: Completion, generation: Generation) -> str:
  return text.decode(generation.request.input_ids, True) if asked.echo else ""


def _logprobs(
  text: Text,
  asked: Completion,
  generation: Generation,
  since: int,
  until: int,
  *,
  echo: bool = True,
) -> dict[str, Any] | None:
  if asked.logprobs is None:
    return None
  with_prompt = echo and asked.echo and asked.logprobs > 0
  return wording.completion_logprobs(text, generation, since, until, echo=with_prompt)


def _usage(asked: Completion, generations: Sequence[Generation]) -> dict[str, Any]:
  return wording.usage(
    sum(len(generation.request.input_ids) for generation in generations[:: asked.n]),
    sum(len(generation.output_ids) for generation in generations),
  )
