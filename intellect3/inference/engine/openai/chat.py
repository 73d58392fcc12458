"""`/v1/chat/completions`, the way in: messages to a prompt, fields to a call.

The prompt is rendered by the model directory's own template, or comes as `input_ids`. What SGLang
forces by a grammar (`tool_choice` required, `response_format`, `regex`) is refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from intellect3.inference.engine import parse
from intellect3.inference.engine.openai import wording
from intellect3.inference.engine.openai.wording import NOT_OURS
from intellect3.inference.engine.parse import Call, Wishes
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.sampling_params import Sampling
from intellect3.inference.engine.serving import Serving
from intellect3.rendering import glm45
from intellect3.rendering.chat_template import RESERVED

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  **NOT_OURS,
  "logit_bias": (None, {}),
  "response_format": (None, {"type": "text"}),
  "regex": (None, ""),
  "ebnf": (None, ""),
  "stop_regex": (None, "", []),
  "return_hidden_states": (None, False),
  "return_cached_tokens_details": (None, False),
  "return_spec_tokens_details": (None, False),
  "return_input_ids_in_sglext": (None, False),
  "return_output_ids_in_sglext": (None, False),
  "return_sampling_mask": (None, False),
  "return_flat_raw_output_top_logprobs": (None, False),
  "sampling_logprobs_mode": (None,),
  "routed_experts_start_len": (None, 0),
  "stream_reasoning": (None, True),
  "task": (None,),
  "thinking": (None,),
  "return_flat_raw_top_logprobs_b64": (None, False, True),
}
"""Fields that SGLang knows and we refuse, with the values that mean "off"."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Chat(msgspec.Struct, kw_only=True):
  """The body, as SGLang names and defaults it. `user`, `parallel_tool_calls` change nothing."""

  messages: list[dict[str, Any]]
  model: str = "default"
  frequency_penalty: float = 0.0
  logprobs: bool = False
  top_logprobs: int | None = None
  max_tokens: int | None = None
  max_completion_tokens: int | None = None
  n: int = 1
  presence_penalty: float = 0.0
  seed: int | None = None
  stop: str | list[str] | None = None
  stream: bool = False
  stream_options: dict[str, Any] | None = None
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None
  min_p: float | None = None
  min_tokens: int = 0
  repetition_penalty: float | None = None
  stop_token_ids: list[int] | None = None
  tools: list[dict[str, Any]] | None = None
  tool_choice: str | dict[str, Any] | None = "auto"
  parallel_tool_calls: bool = True
  return_routed_experts: bool = False
  return_prompt_token_ids: bool = False
  return_token_ids: bool = False
  return_meta_info: bool = False
  reasoning_effort: str | None = None
  separate_reasoning: bool = True
  no_stop_trim: bool = False
  ignore_eos: bool = False
  continue_final_message: bool = False
  skip_special_tokens: bool = True
  chat_template_kwargs: dict[str, Any] | None = None
  input_ids: list[int] | None = None
  rid: str | None = None
  extra_key: str | None = None
  cache_salt: str | None = None
  user: str | None = None


SUPPORTED = frozenset(Chat.__struct_fields__)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
  """A chat that can be run.

  Attributes:
    asked: the body.
    call: its generations.
    tools: whose calls are looked for in the output; empty where they are not.
    thinking: whether the output is expected to begin with reasoning.
    split: whether reasoning is told apart from content.
  """

  asked: Chat
  call: Call
  tools: Sequence[Mapping[str, Any]]
  thinking: bool
  split: bool


class MissingField(RequestError):
  """A body that lacks what it must have; SGLang words it like its control routes do."""


def read(fields: dict[str, Any]) -> Chat:
  """Checks names and types; raises RequestError naming the field."""
  parse.check_fields("/v1/chat/completions", fields, SUPPORTED, UNSUPPORTED)
  try:
    asked = msgspec.convert(fields, Chat)
  except msgspec.ValidationError as error:
    raise MissingField(str(error)) from None
  if not asked.messages:
    raise RequestError("Messages cannot be empty.")
  for field in ("return_prompt_token_ids", "return_token_ids", "return_meta_info"):
    if asked.stream and getattr(asked, field):
      raise RequestError(
        f"{field} is not supported with streaming on /v1/chat/completions. Please set "
        f"stream=false when using {field}=true."
      )
  variables = asked.chat_template_kwargs or {}
  if "chat_template" in variables:
    raise RequestError("Request-supplied chat_template is not allowed.")
  if reserved := sorted(RESERVED & variables.keys()):
    raise RequestError(
      f"chat_template_kwargs: expected names other than {', '.join(sorted(RESERVED))}, "
      f"got {', '.join(reserved)}."
    )
  if asked.tool_choice not in (None, "auto", "none"):
    raise RequestError(
      f"tool_choice={asked.tool_choice!r} is not supported by the embedded engine."
    )
  if asked.top_logprobs and not asked.logprobs:
    raise RequestError("top_logprobs: expected logprobs to be true with it.")
  wording.include_usage(asked.stream_options)
  return asked


def plan(asked: Chat, serving: Serving) -> Plan:
  """Renders the prompt and checks the rest; raises RequestError naming what is wrong."""
  tools = [_tool(index, tool) for index, tool in enumerate(asked.tools or ())]
  offered = tools if asked.tool_choice != "none" else []
  variables = dict(asked.chat_template_kwargs or {})
  if asked.reasoning_effort is not None:
    variables.setdefault("reasoning_effort", asked.reasoning_effort)
  thinking = serving.reasoning_parser is not None and variables.get("enable_thinking") is not False
  prompt = asked.input_ids
  if prompt is None:
    prompt = _prompt(asked, offered, variables, serving)
  if asked.logprobs and serving.text is None:
    raise RequestError("logprobs: the model directory has no tokenizer.json.")
  salted = "" if asked.cache_salt is None else f"{asked.cache_salt}\0"
  wishes = Wishes(
    rid=asked.rid,
    return_logprob=asked.logprobs,
    logprob_start_len=-1,
    top_logprobs_num=asked.top_logprobs or 0,
    return_routed_experts=asked.return_routed_experts,
    extra_key=salted + (asked.extra_key or ""),
    stream=asked.stream,
  )
  call = parse.plan_call(
    [(prompt, _sampling(asked, bool(offered), serving), wishes)],
    serving.limits,
    serving.text,
    stream=asked.stream,
    token_names=asked.return_meta_info and serving.text is not None,
  )
  return Plan(
    asked=asked,
    call=call,
    tools=offered if serving.tool_call_parser is not None else (),
    thinking=thinking,
    split=serving.reasoning_parser is not None and asked.separate_reasoning,
  )


def _sampling(asked: Chat, with_tools: bool, serving: Serving) -> Sampling:
  given: dict[str, Any] = {
    name: serving.chat_defaults.get(name) if (value := getattr(asked, name)) is None else value
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
  }
  return Sampling(
    max_new_tokens=(
      asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    ),
    min_new_tokens=asked.min_tokens,
    frequency_penalty=asked.frequency_penalty,
    presence_penalty=asked.presence_penalty,
    stop=asked.stop,
    stop_token_ids=list(asked.stop_token_ids or ()),
    n=asked.n,
    no_stop_trim=asked.no_stop_trim,
    ignore_eos=asked.ignore_eos,
    # The marks of tool calls may be special tokens.
    skip_special_tokens=asked.skip_special_tokens and not with_tools,
    sampling_seed=asked.seed,
    **given,
  )


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
  function = tool.get("function")
  if not isinstance(function, dict) or not isinstance(function.get("name"), str):
    raise RequestError(f"tools[{index}].function.name: expected a string, got {tool!r}")
  # SGLang's own record of a tool reaches the template with this field; prompts must be the same.
  return {"type": "function", **tool, "defer_loading": tool.get("defer_loading")}


def _prompt(
  asked: Chat, tools: list[dict[str, Any]], variables: dict[str, Any], serving: Serving
) -> list[int]:
  if serving.chat is None or serving.text is None:
    raise RequestError("messages: the model directory has no chat template; send input_ids.")
  messages = [
    _message(index, message, parts=serving.chat.takes_parts)
    for index, message in enumerate(asked.messages)
  ]
  prefix = ""
  if messages[-1]["role"] == "assistant":
    if not asked.continue_final_message:
      raise RequestError(
        "messages: the last one is the assistant's; set continue_final_message to go on with it."
      )
    prefix = messages.pop()["content"]
    if not isinstance(prefix, str):
      raise RequestError("messages: expected text for content of the one to be continued.")
  try:
    rendered = serving.chat.render(messages, tools=tools or None, **variables)
  except (ValueError, TypeError) as error:
    raise RequestError(str(error)) from None
  prompt = serving.text.encode(rendered, special=False)
  return prompt + serving.text.encode(prefix, special=False) if prefix else prompt


def _message(index: int, message: dict[str, Any], *, parts: bool) -> dict[str, Any]:
  """A message as templates expect it: content is text, or parts of it; arguments are objects."""
  role = message.get("role")
  if role not in ROLES:
    raise RequestError(f"messages[{index}].role: expected one of {', '.join(ROLES)}, got {role!r}")
  message = message | {"content": _content(index, message.get("content"), parts)}
  calls = message.get("tool_calls")
  if calls is None:
    return message
  if not isinstance(calls, list):
    raise RequestError(f"messages[{index}].tool_calls: expected a list, got {calls!r}")
  return message | {"tool_calls": [_past_call(index, call) for call in calls]}


def _content(index: int, content: Any, parts: bool) -> str | list[dict[str, str]]:
  if content is None or isinstance(content, str):
    return content or ""
  given = content if isinstance(content, list) else [None]
  found = [part.get("text") if isinstance(part, dict) else part for part in given]
  texts = parse.typed(f"messages[{index}].content", found, list[str])
  # As SGLang joins them where the template cannot.
  return [{"type": "text", "text": text} for text in texts] if parts else " ".join(texts)


def _past_call(index: int, call: Any) -> dict[str, Any]:
  function = call.get("function") if isinstance(call, dict) else None
  if not isinstance(function, dict):
    raise RequestError(f"messages[{index}].tool_calls: expected functions, got {call!r}")
  arguments = function.get("arguments")
  if isinstance(arguments, str):
    try:
      arguments = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
      arguments = None
  if not isinstance(arguments, dict):
    raise RequestError("Assistant tool call function.arguments must be a JSON object.")
  return call | {"function": function | {"arguments": arguments}}


def parts(plan: Plan, text: str) -> tuple[str, str, list[glm45.Call]]:
  """Reasoning, content and tool calls of an output's text."""
  reasoning, calls = "", list[glm45.Call]()
  if plan.split:
    reasoning, text = glm45.split_reasoning(text, thinking=plan.thinking)
  if plan.tools:
    text, calls = glm45.parse_calls(text, plan.tools)
  return reasoning, text, calls
