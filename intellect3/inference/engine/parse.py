"""What a client may ask of `/generate`: bodies in, checked requests out.

The names and defaults are SGLang's. A field that SGLang knows and this engine does not support is
refused when it is set to anything but its default; an unknown one is ignored, as SGLang does, with
one warning in the log.
"""

import dataclasses
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from intellect3.inference.engine import sampling_params
from intellect3.inference.engine.request import Limits, Request, RequestError
from intellect3.inference.engine.sampling_params import Sampling
from intellect3.inference.engine.text import Text

log = logging.getLogger(__name__)


def _names(names: str) -> list[str]:
  return names.split()


# The last line changes nothing that a caller could see: there is no per-request log and no routing.
SUPPORTED = frozenset(
  _names("""rid input_ids text sampling_params return_logprob logprob_start_len top_logprobs_num
  return_text_in_logprobs stream return_routed_experts routed_experts_start_len
  return_prompt_token_ids extra_key cache_salt
  log_metrics no_logs routing_key conversation_id custom_labels external_trace_header received_time
  kv_hints modalities""")
)

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  **dict.fromkeys(
    _names("""input_embeds image_data video_data audio_data video_config mm_hashes mm_content_hashes
    watermark token_ids_logprob return_sampling_mask sampling_logprobs_mode lora_path lora_id
    custom_logit_processor positional_embed_overrides bootstrap_host bootstrap_port bootstrap_room
    bootstrap_pair_key decode_tp_size routed_dp_rank data_parallel_rank disagg_prefill_dp_rank
    max_thinking_tokens multi_item_delimiter_indices token_indices_to_pool images_config
    mm_processor_kwargs max_dynamic_patch min_dynamic_patch image_max_dynamic_patch
    video_max_dynamic_patch http_worker_ipc num_items_assigned need_wait_for_mm_inputs
    encoder_urls"""),
    (None,),
  ),
  **dict.fromkeys(
    _names("""return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs
    return_flat_raw_top_logprobs_b64 return_hidden_states return_indexer_topk use_audio_in_video
    require_reasoning return_bytes return_entropy background"""),
    (None, False),
  ),
  "priority": (None, 0),
}
"""Fields that SGLang knows and we refuse, with the values that mean "off"."""

_warned: set[tuple[str, str]] = set()


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
  """One HTTP request's generations.

  Attributes:
    requests: in the order of the answer.
    listed: whether the answer is a list.
    stream: whether it is a stream of events.
    interval: tokens between a stream's events, at least; the most that any prompt asks for.
    token_names: whether logprobs carry each token's text.
    prompt_ids: whether the answer repeats the prompts' ids.
    names: names that the client gave to several generations at once -> their rids.
  """

  requests: Sequence[Request]
  listed: bool = False
  stream: bool = False
  interval: int = 1
  token_names: bool = False
  prompt_ids: bool = False
  names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Wishes:
  """What is asked besides prompt and sampling; one per prompt. As the fields of `/generate`."""

  rid: str | None = None
  return_logprob: bool = False
  logprob_start_len: int | None = None
  top_logprobs_num: int = 0
  return_routed_experts: bool = False
  routed_experts_start_len: int = 0
  extra_key: str = ""
  stream: bool = False


def parse_body(body: bytes) -> dict[str, Any]:
  """Decodes a JSON object; raises RequestError on anything else. An empty body is `{}`."""
  if not body:
    return {}
  try:
    return msgspec.json.decode(body, type=dict[str, Any])
  except (msgspec.DecodeError, RecursionError) as error:
    raise RequestError(f"The body is not a JSON object: {error}") from None


def parse_generate(fields: dict[str, Any], limits: Limits, text: Text | None) -> Call:
  """Checks the fields of a `/generate` body.

  Raises:
    RequestError: with SGLang's status and shape; the message names the field.
  """
  check_fields("/generate", fields, SUPPORTED, UNSUPPORTED)
  prompts, batched = _prompts(fields, text)
  count = len(prompts)
  each = {name: _spread(name, fields.get(name), count, batched) for name in _PER_PROMPT}
  stream = bool(typed("stream", fields.get("stream"), bool | None))
  start = typed("routed_experts_start_len", fields.get("routed_experts_start_len"), int | None)
  plans = []
  for index, prompt in enumerate(prompts):
    salt = typed("cache_salt", each["cache_salt"][index], str | None)
    key = typed("extra_key", each["extra_key"][index], str | None) or ""
    experts = typed("return_routed_experts", each["return_routed_experts"][index], bool | None)
    wishes = Wishes(
      rid=typed("rid", each["rid"][index], str | None),
      return_logprob=bool(typed("return_logprob", each["return_logprob"][index], bool | None)),
      logprob_start_len=typed("logprob_start_len", each["logprob_start_len"][index], int | None),
      top_logprobs_num=typed("top_logprobs_num", each["top_logprobs_num"][index], int | None) or 0,
      return_routed_experts=bool(experts),
      routed_experts_start_len=start or 0,
      extra_key=key if salt is None else f"{salt}\0{key}",
      stream=stream,
    )
    sampling = sampling_params.read(each["sampling_params"][index])
    plans.append((prompt, sampling, wishes))
  rid = fields.get("rid")
  return plan_call(
    plans,
    limits,
    text,
    shared_rid=rid if batched and isinstance(rid, str) else None,
    listed=batched,
    stream=stream,
    token_names=bool(
      typed("return_text_in_logprobs", fields.get("return_text_in_logprobs"), bool | None)
    ),
    prompt_ids=bool(
      typed("return_prompt_token_ids", fields.get("return_prompt_token_ids"), bool | None)
    ),
  )


def plan_call(
  plans: Sequence[tuple[list[int], Sampling, Wishes]],
  limits: Limits,
  text: Text | None,
  *,
  shared_rid: str | None = None,
  listed: bool = False,
  stream: bool = False,
  token_names: bool = False,
  prompt_ids: bool = False,
) -> Call:
  """Makes the requests of some prompts, `n` of each.

  Args:
    plans: prompt, sampling and wishes of each.
    limits: of the model.
    text: None where the model has no tokenizer.
    shared_rid: a name that the client gave to all of them.
    listed, stream, token_names, prompt_ids: as the Call's.

  Raises:
    RequestError: something is out of bounds, by name.
  """
  if token_names and text is None:
    raise RequestError("return_text_in_logprobs: the model directory has no tokenizer.json.")
  requests: list[Request] = []
  names: dict[str, list[str]] = {}
  for index, (prompt, sampling, wishes) in enumerate(plans):
    count = sampling_params.parallel(sampling)
    rid = wishes.rid
    if rid is None:
      rid = uuid.uuid4().hex if shared_rid is None else f"{shared_rid}_{index}"
    request = _request(rid, prompt, sampling, wishes, limits, text)
    if count == 1:
      requests.append(request)
      continue
    listed = True
    names[rid] = [f"{rid}_{sample}" for sample in range(count)]
    for sample, name in enumerate(names[rid]):
      seed = None if request.seed is None else (request.seed + sample) & 0xFFFF_FFFF_FFFF_FFFF
      requests.append(dataclasses.replace(request, rid=name, seed=seed))
  if shared_rid is not None:
    names[shared_rid] = [request.rid for request in requests]
  interval = max(sampling_params.interval(sampling) for _, sampling, _ in plans)
  return Call(requests, listed, stream, interval, token_names, prompt_ids, names)


def check_fields(
  route: str,
  fields: dict[str, Any],
  supported: frozenset[str],
  unsupported: Mapping[str, tuple[Any, ...]],
) -> None:
  """Refuses fields of `unsupported` that are not off; warns once of those that nobody knows."""
  for name in fields.keys() - supported:
    off = unsupported.get(name)
    if off is None:
      if (route, name) not in _warned and len(_warned) < 1000:
        _warned.add((route, name))
        log.warning("%s: unknown field %r is ignored (said once per field)", route, name)
    elif fields[name] not in off:
      raise RequestError(f"{name}={fields[name]!r} is not supported by the embedded engine.")


def typed(name: str, value: Any, kind: Any) -> Any:
  """The value, if it is of that kind; raises RequestError naming the field if not."""
  try:
    return msgspec.convert(value, type=kind)
  except msgspec.ValidationError as error:
    raise RequestError(f"{name}: {error}") from None


_PER_PROMPT = (
  "rid",
  "sampling_params",
  "return_logprob",
  "logprob_start_len",
  "top_logprobs_num",
  "return_routed_experts",
  "extra_key",
  "cache_salt",
)
"""Fields of which a batch may hold one per prompt."""


def _prompts(fields: dict[str, Any], text: Text | None) -> tuple[list[list[int]], bool]:
  """Ids of each prompt, and whether they came as a list of prompts."""
  ids, texts = fields.get("input_ids"), fields.get("text")
  if ids is None and texts is None:
    raise RequestError("Either text, input_ids or input_embeds should be provided.")
  if ids is not None and texts is not None:
    raise RequestError("text and input_ids: expected one of them, got both.")
  if texts is not None:
    batched = isinstance(texts, list)
    strings = typed("text", texts if batched else [texts], list[str])
    if not strings:
      raise RequestError("text cannot be empty.")
    return [encode_prompt("text", string, text) for string in strings], batched
  if not isinstance(ids, list):
    raise RequestError(f"input_ids must be a list of token ids, got {ids!r}.")
  if not ids:
    raise RequestError("input_ids cannot be empty.")
  batched = isinstance(ids[0], list)
  if batched:
    return typed("input_ids", ids, list[list[int]]), True
  return [typed("input_ids", ids, list[int])], False


def encode_prompt(name: str, string: str, text: Text | None) -> list[int]:
  """Ids of a text prompt, as the tokenizer begins and ends texts."""
  if text is None:
    raise RequestError(f"{name}: the model directory has no tokenizer.json; send input_ids.")
  return text.encode(string, special=True)


def _spread(name: str, value: Any, count: int, batched: bool) -> Sequence[Any]:
  """Gives each prompt its own value: a list in a batch is one per prompt, all else is shared."""
  if isinstance(value, list):
    if not batched:
      raise RequestError(f"{name} must not be a list when there is one prompt.")
    if len(value) != count:
      raise RequestError(
        f"{name} must have one entry per prompt: expected {count}, got {len(value)}."
      )
    return value
  if name == "rid" and batched and isinstance(value, str):
    return [None] * count
  return [value] * count


def _request(
  rid: str,
  prompt: list[int],
  sampling: Sampling,
  wishes: Wishes,
  limits: Limits,
  text: Text | None,
) -> Request:
  if not prompt:
    raise RequestError("input_ids cannot be empty.")
  smallest, largest = min(prompt), max(prompt)
  if smallest < 0 or largest >= limits.vocab_size:
    bad = smallest if smallest < 0 else largest
    raise RequestError(f"input_ids: {bad} is outside the vocabulary of {limits.vocab_size} tokens.")
  if wishes.return_routed_experts and not limits.routed_experts:
    raise RequestError(
      "return_routed_experts: the server was started without --enable-return-routed-experts."
    )
  if wishes.return_routed_experts and not 0 <= wishes.routed_experts_start_len <= len(prompt):
    raise RequestError(
      f"routed_experts_start_len: expected 0 to the number of input tokens ({len(prompt)}), "
      f"got {wishes.routed_experts_start_len}."
    )
  if not 0 <= wishes.top_logprobs_num <= limits.max_top_logprobs:
    raise RequestError(
      f"top_logprobs_num must be in [0, {limits.max_top_logprobs}] (--max-top-logprobs), "
      f"got {wishes.top_logprobs_num}."
    )
  settled = sampling_params.settled(
    sampling, prompt=len(prompt), context=limits.context_length, vocab_size=limits.vocab_size
  )
  if settled["min_new_tokens"] and len(settled["stop_token_ids"]) > limits.max_stop_ids:
    raise RequestError(
      f"stop_token_ids: expected at most {limits.max_stop_ids} together with min_new_tokens, "
      f"got {len(settled['stop_token_ids'])}."
    )
  if settled["stop_strings"] and text is None:
    raise RequestError("stop: the model directory has no tokenizer.json.")
  start = wishes.logprob_start_len
  if start is not None and start > len(prompt):
    raise RequestError(
      f"logprob_start_len ({start}) is higher than the number of input tokens ({len(prompt)})."
    )
  scores = wishes.return_logprob and start is not None and 0 <= start < len(prompt)
  logprobs = wishes.return_logprob
  return Request(
    rid=rid,
    input_ids=prompt,
    return_logprob=logprobs,
    logprob_start=start if scores else None,
    top_logprobs_num=wishes.top_logprobs_num if logprobs else 0,
    return_routed_experts=wishes.return_routed_experts,
    routed_experts_start=wishes.routed_experts_start_len,
    extra_key=wishes.extra_key,
    stream=wishes.stream,
    **settled,
  )
