"""What a client may ask of `/generate`: bodies in, checked requests out.

The names and defaults are SGLang's. A field that SGLang knows and this engine does not support is
refused when it is set to anything but its default; an unknown sampling parameter is refused; an
unknown top-level field is ignored, as SGLang does, with one warning in the log.
"""

import dataclasses
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

log = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128
GREEDY_BELOW = 1e-6
"""Temperatures below this are greedy, as in SGLang."""


def _names(text: str) -> list[str]:
  return text.split()


_SUPPORTED_SAMPLING = frozenset(
  _names(
    "max_new_tokens temperature stop_token_ids ignore_eos sampling_seed skip_special_tokens "
    "no_stop_trim stream_interval spaces_between_special_tokens custom_params"
  )
)
_UNSUPPORTED_SAMPLING: Mapping[str, tuple[Any, ...]] = {
  "stop": (None, "", []),
  "stop_regex": (None, "", []),
  "top_p": (None, 1.0),
  "top_k": (None, -1, 1 << 30),
  "min_p": (None, 0.0),
  "frequency_penalty": (None, 0.0),
  "presence_penalty": (None, 0.0),
  "repetition_penalty": (None, 1.0),
  "min_new_tokens": (None, 0),
  "n": (None, 1),
  "beam_width": (None,),
  "json_schema": (None,),
  "regex": (None,),
  "ebnf": (None,),
  "structural_tag": (None,),
  "logit_bias": (None, {}),
  "watermark": (None,),
  "choice": (None,),
}
"""Sampling parameters that SGLang knows and we refuse, with the values that mean "off"."""

_SUPPORTED_FIELDS = frozenset(
  # The second line changes nothing that a caller could see: there is no prefix cache to separate,
  # no priority queue, and no per-request log.
  _names(
    "rid input_ids sampling_params return_logprob logprob_start_len "
    "extra_key cache_salt log_metrics no_logs routing_key conversation_id custom_labels "
    "external_trace_header received_time kv_hints modalities"
  )
)
_UNSUPPORTED_FIELDS: Mapping[str, tuple[Any, ...]] = {
  **dict.fromkeys(
    _names(
      "text input_embeds image_data video_data audio_data video_config mm_hashes "
      "mm_content_hashes watermark token_ids_logprob return_sampling_mask "
      "sampling_logprobs_mode lora_path lora_id "
      "custom_logit_processor positional_embed_overrides bootstrap_host bootstrap_port "
      "bootstrap_room bootstrap_pair_key decode_tp_size routed_dp_rank data_parallel_rank "
      "disagg_prefill_dp_rank max_thinking_tokens priority multi_item_delimiter_indices "
      "token_indices_to_pool images_config mm_processor_kwargs max_dynamic_patch min_dynamic_patch "
      "image_max_dynamic_patch video_max_dynamic_patch http_worker_ipc num_items_assigned "
      "need_wait_for_mm_inputs encoder_urls"
    ),
    (None,),
  ),
  **dict.fromkeys(
    _names(
      "stream return_text_in_logprobs return_flat_raw_top_logprobs "
      "return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 return_hidden_states "
      "return_routed_experts return_indexer_topk use_audio_in_video require_reasoning return_bytes "
      "return_entropy return_prompt_token_ids background"
    ),
    (None, False),
  ),
  "top_logprobs_num": (None, 0),
  "routed_experts_start_len": (None, 0),
}
"""Top-level fields that SGLang knows and we refuse, with the values that mean "off"."""

_warned_fields: set[str] = set()


class RequestError(Exception):
  """A request that must be refused; `payload` is the JSON body of the answer."""

  def __init__(self, message: str, *, status: int = 400, payload: Any = None):
    super().__init__(message)
    self.status = status
    self.payload = {"error": {"message": message}} if payload is None else payload


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
  """What the served model allows: ids below `vocab_size`, `context_length` tokens in all."""

  vocab_size: int
  context_length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """One checked generation.

  Attributes:
    rid: the name by which it can be aborted.
    input_ids: the prompt, at least one id, all inside the vocabulary.
    max_new_tokens: cut to what the context leaves.
    temperature: 0.0 is greedy.
    stop_token_ids: end the generation, besides the model's own.
    ignore_eos: sample on past every stop token (SGLang: also past `stop_token_ids`).
    seed: 64 bits, or None for one of the engine's own.
    return_logprob: whether the reply carries logprobs.
    logprob_start: first prompt position to score, or None for none.
    skip_special_tokens: leave special tokens out of `text`.
    no_stop_trim: keep the stop token in `text`.
  """

  rid: str
  input_ids: Sequence[int]
  max_new_tokens: int
  temperature: float
  stop_token_ids: frozenset[int] = frozenset()
  ignore_eos: bool = False
  seed: int | None = None
  return_logprob: bool = False
  logprob_start: int | None = None
  skip_special_tokens: bool = True
  no_stop_trim: bool = False


def parse_body(body: bytes) -> dict[str, Any]:
  """Decodes a JSON object; raises RequestError on anything else. An empty body is `{}`."""
  if not body:
    return {}
  try:
    return msgspec.json.decode(body, type=dict[str, Any])
  except msgspec.DecodeError as error:
    raise RequestError(f"The body is not a JSON object: {error}") from None


def parse_generate(body: bytes, limits: Limits) -> tuple[list[Request], bool]:
  """Checks a `/generate` body.

  Returns:
    The requests in order, and whether the body held a batch (its answer is then a list).

  Raises:
    RequestError: with SGLang's status and shape; the message names the field.
  """
  fields = parse_body(body)
  _check_fields(fields)
  ids = fields.get("input_ids")
  if ids is None:
    raise RequestError("Either text, input_ids or input_embeds should be provided.")
  if not isinstance(ids, list):
    raise RequestError(f"input_ids must be a list of token ids, got {ids!r}.")
  if not ids:
    raise RequestError("input_ids cannot be empty.")
  batched = isinstance(ids[0], list)
  prompts = ids if batched else [ids]
  each = {
    name: _spread(name, fields.get(name), len(prompts), batched)
    for name in ("rid", "sampling_params", "return_logprob", "logprob_start_len")
  }
  requests = [
    _parse_one(prompt, **{name: values[index] for name, values in each.items()}, limits=limits)
    for index, prompt in enumerate(prompts)
  ]
  return requests, batched


def _check_fields(fields: dict[str, Any]) -> None:
  for name, value in fields.items():
    if name in _SUPPORTED_FIELDS:
      continue
    off = _UNSUPPORTED_FIELDS.get(name)
    if off is None:
      if name not in _warned_fields:
        _warned_fields.add(name)
        log.warning("/generate: unknown field %r is ignored (said once per field)", name)
    elif value not in off:
      raise RequestError(f"{name}={value!r} is not supported by the embedded engine.")


def _spread(name: str, value: Any, count: int, batched: bool) -> list[Any]:
  """Gives each prompt its own value: a list in a batch is one per prompt, all else is shared."""
  if isinstance(value, list):
    if not batched:
      raise RequestError(f"{name} must not be a list when input_ids is one prompt.")
    if len(value) != count:
      raise RequestError(
        f"{name} must have one entry per prompt: expected {count}, got {len(value)}."
      )
    return value
  if name == "rid" and isinstance(value, str) and batched:
    return [f"{value}_{index}" for index in range(count)]
  return [value] * count


def _typed(name: str, value: Any, kind: Any) -> Any:
  try:
    return msgspec.convert(value, type=kind)
  except msgspec.ValidationError as error:
    raise RequestError(f"{name}: {error}") from None


def _parse_one(
  prompt: Any,
  *,
  rid: Any,
  sampling_params: Any,
  return_logprob: Any,
  logprob_start_len: Any,
  limits: Limits,
) -> Request:
  ids = _typed("input_ids", prompt, list[int])
  if not ids:
    raise RequestError("input_ids cannot be empty.")
  smallest, largest = min(ids), max(ids)
  if smallest < 0 or largest >= limits.vocab_size:
    bad = smallest if smallest < 0 else largest
    raise RequestError(f"input_ids: {bad} is outside the vocabulary of {limits.vocab_size} tokens.")
  sampling = _typed("sampling_params", sampling_params or {}, dict[str, Any])
  _check_sampling(sampling)

  temperature = _given(sampling, "temperature", 1.0, float)
  if not (math.isfinite(temperature) and temperature >= 0.0):
    raise RequestError(
      f"temperature must be a non-negative finite number, got {sampling['temperature']}."
    )
  stops = sampling.get("stop_token_ids")
  if isinstance(stops, int):
    stops = [stops]
  seed = _given(sampling, "sampling_seed", None, int | None)
  logprobs = bool(_typed("return_logprob", return_logprob, bool | None))
  start = _typed("logprob_start_len", logprob_start_len, int | None)
  if start is not None and start >= len(ids):
    raise RequestError(
      f"logprob_start_len ({start}) is higher than the number of input tokens ({len(ids)})."
    )
  return Request(
    rid=_typed("rid", rid, str | None) or uuid.uuid4().hex,
    input_ids=ids,
    max_new_tokens=_max_new_tokens(sampling, len(ids), limits.context_length),
    temperature=0.0 if temperature < GREEDY_BELOW else temperature,
    stop_token_ids=frozenset(_typed("stop_token_ids", stops or [], list[int])),
    ignore_eos=_given(sampling, "ignore_eos", False, bool),
    seed=None if seed is None else seed & 0xFFFF_FFFF_FFFF_FFFF,
    return_logprob=logprobs,
    logprob_start=start if logprobs and start is not None and start >= 0 else None,
    skip_special_tokens=_given(sampling, "skip_special_tokens", True, bool),
    no_stop_trim=_given(sampling, "no_stop_trim", False, bool),
  )


def _given(sampling: dict[str, Any], name: str, default: Any, kind: Any) -> Any:
  value = sampling.get(name)
  return default if value is None else _typed(name, value, kind)


def _check_sampling(sampling: dict[str, Any]) -> None:
  for name, value in sampling.items():
    if name in _SUPPORTED_SAMPLING:
      continue
    off = _UNSUPPORTED_SAMPLING.get(name)
    if off is None:
      known = "`, `".join([*sorted(_SUPPORTED_SAMPLING), *_UNSUPPORTED_SAMPLING])
      message = f"unknown field `{name}`, expected one of `{known}`"
      raise RequestError(message, payload={"error": message})
    if value not in off:
      raise RequestError(f"{name}={value!r} is not supported by the embedded engine.")


def _max_new_tokens(sampling: dict[str, Any], prompt: int, context: int) -> int:
  asked = _given(sampling, "max_new_tokens", None, int | None)
  if asked is not None and asked < 0:
    raise RequestError(f"max_new_tokens must be at least 0, got {asked}.")
  if prompt >= context:
    raise RequestError(
      f"The input ({prompt} tokens) is longer than the model's context length ({context} tokens)."
    )
  if asked is not None and prompt + asked > context:
    raise RequestError(
      f"Requested token count exceeds the model's maximum context length of {context} tokens. "
      f"You requested a total of {prompt + asked} tokens: {prompt} tokens from the input messages "
      f"and {asked} tokens for the completion. Please reduce the number of tokens in the input "
      "messages or the completion to fit within the limit."
    )
  wanted = DEFAULT_MAX_NEW_TOKENS if asked is None else asked
  # SGLang keeps two positions of the context for itself; one token is always possible.
  return min(wanted, max(context - 2 - prompt, 1))
