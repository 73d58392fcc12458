"""What chats and completions share: refusals, usage, logprobs in OpenAI's form."""

from collections.abc import Mapping, Sequence
from typing import Any

from intellect3.inference.engine import asgi
from intellect3.inference.engine.asgi import Answer
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.sequence import Sequence as Generation
from intellect3.inference.engine.sequence import TopLogprobs
from intellect3.inference.engine.text import REPLACEMENT, Text

NOT_OURS: Mapping[str, tuple[Any, ...]] = {
  **dict.fromkeys(
    (
      "bootstrap_host",
      "bootstrap_port",
      "bootstrap_room",
      "routed_dp_rank",
      "disagg_prefill_dp_rank",
      "data_parallel_rank",
      "max_dynamic_patch",
      "min_dynamic_patch",
      "images_config",
      "video_config",
      "mm_processor_kwargs",
      "lora_path",
      "custom_logit_processor",
      "watermark",
    ),
    (None,),
  ),
  "use_audio_in_video": (None, False),
  "custom_params": (None, {}),
  "priority": (None, 0),
}
"""Fields of both routes that this engine has nothing for, with the values that mean "off"."""


_KINDS = {400: "BadRequest", 413: "PayloadTooLarge", 503: "ServiceUnavailable"}


def refusal(error: RequestError) -> dict[str, Any]:
  """A refusal as OpenAI's routes word it."""
  kind = _KINDS[error.status]
  told = {"object": "error", "message": str(error), "type": kind}
  return told | {"param": None, "code": error.status}


def refuse(error: RequestError) -> Answer:
  return asgi.json_answer(refusal(error), error.status)


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
  """Tokens in and out."""
  details = {"reasoning_tokens": reasoning_tokens} if reasoning_tokens else None
  return {
    "prompt_tokens": prompt_tokens,
    "total_tokens": prompt_tokens + completion_tokens,
    "completion_tokens": completion_tokens,
    "prompt_tokens_details": None,
    "reasoning_tokens": reasoning_tokens,
    "completion_tokens_details": details,
  }


def metadata(generation: Generation, version: str) -> dict[str, Any]:
  """Versions of the weights: served now, and of the first choice's tokens."""
  spans = [
    {"version": version, "start": start, "end": end} for version, start, end in generation.spans
  ]
  return {"weight_version": version, "weight_versions": spans}


def include_usage(options: Mapping[str, Any] | None) -> bool:
  """Whether a stream ends with usage; `continuous_usage_stats` is not supported."""
  options = options or {}
  if options.get("continuous_usage_stats"):
    raise RequestError("stream_options.continuous_usage_stats is not supported.")
  return options.get("include_usage") is True


def chat_logprobs(text: Text, generation: Generation, since: int, until: int) -> dict[str, Any]:
  """Logprobs of the output tokens [since, until) with their bytes and alternatives."""
  tops: Sequence[TopLogprobs] = generation.output_top[since:until]
  rows = zip(
    generation.output_logprobs[since:until], generation.output_ids[since:until], strict=True
  )
  content = []
  for index, (logprob, token) in enumerate(rows):
    row = _chat_row(text, logprob, token)
    top = tops[index] if tops else ()
    row["top_logprobs"] = [_chat_row(text, other, other_id) for other, other_id in top]
    content.append(row)
  return {"content": content}


def _chat_row(text: Text, logprob: float, token: int) -> dict[str, Any]:
  return {"token": text.name(token), "bytes": list(text.bytes_of(token)), "logprob": logprob}


def completion_logprobs(
  text: Text, generation: Generation, since: int, until: int, *, echo: bool
) -> dict[str, Any]:
  """The same in the form of completions; with the prompt's where it is echoed."""
  told: dict[str, list[Any]] = {
    "text_offset": [],
    "token_logprobs": [],
    "tokens": [],
    "top_logprobs": [],
  }
  request = generation.request
  if echo:
    logprobs = [None, *generation.input_logprobs]
    _add_rows(told, text, logprobs, request.input_ids)
    if request.top_logprobs_num:
      told["top_logprobs"] += [None, *(_named(text, row) for row in generation.input_top)]
  _add_rows(told, text, generation.output_logprobs[since:until], generation.output_ids[since:until])
  told["top_logprobs"] += [_named(text, row) for row in generation.output_top[since:until]]
  return told


def _add_rows(
  told: dict[str, list[Any]], text: Text, logprobs: Sequence[Any], ids: Sequence[int]
) -> None:
  told["token_logprobs"] += logprobs
  told["tokens"] += [_lossless(text, index) for index in ids]
  told["text_offset"] += [-1] * len(ids)


def _named(text: Text, row: TopLogprobs) -> dict[str, float]:
  return {_lossless(text, index): logprob for logprob, index in row}


def _lossless(text: Text, index: int) -> str:
  """The token's text; of half a character its bytes as Latin-1, so that names do not collide."""
  name = text.name(index)
  if REPLACEMENT not in name:
    return name
  raw = text.bytes_of(index)
  return name if name.encode() == raw else raw.decode("latin-1")
