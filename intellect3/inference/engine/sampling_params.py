"""The sampling parameters of a request: SGLang's names, defaults and bounds, checked.

Place in the ring: `/generate` and the OpenAI routes hand over what the client sent; what comes back
is within bounds. A parameter that SGLang knows and this engine does not support is refused unless
its value means "off"; an unknown one is refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from intellect3.inference.engine.request import RequestError

DEFAULT_MAX_NEW_TOKENS = 128
GREEDY_BELOW = 1e-6
"""Temperatures below this are greedy, as in SGLang."""

MAX_STOP_STRINGS = 32
MAX_PARALLEL = 4096
"""Of `n`: more than any queue takes."""

ALL_TOKENS = (-1, 1 << 30)
"""Values of `top_k` that exclude no token."""


class Sampling(msgspec.Struct, kw_only=True):
  """Sampling parameters as clients write them; None is the default.

  Attributes:
    max_new_tokens: None is as many as the context takes; absent it is 128, or those.
    spaces_between_special_tokens: changes nothing in byte-level vocabularies.
  """

  max_new_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
  stop: str | list[str] | None = None
  stop_token_ids: int | list[int | None] | None = None
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None
  min_p: float | None = None
  frequency_penalty: float | None = None
  presence_penalty: float | None = None
  repetition_penalty: float | None = None
  min_new_tokens: int | None = None
  n: int | None = None
  ignore_eos: bool | None = None
  skip_special_tokens: bool | None = None
  spaces_between_special_tokens: bool | None = None
  no_stop_trim: bool | None = None
  stream_interval: int | None = None
  sampling_seed: int | None = None


UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "stop_regex": (None, "", []),
  "json_schema": (None, ""),
  "regex": (None, ""),
  "ebnf": (None, ""),
  "structural_tag": (None, ""),
  "logit_bias": (None, {}),
  "beam_width": (None, 1),
  "custom_params": (None, {}),
  "watermark": (None,),
  "choice": (None,),
}
"""What SGLang knows and we refuse, with the values that mean "off"."""

SUPPORTED = frozenset(Sampling.__struct_fields__)


def read(fields: Any) -> Sampling:
  """Checks names and types.

  Raises:
    RequestError: an unknown or unsupported parameter, or a value of another type, by name.
  """
  if fields is None:
    return Sampling()
  if not isinstance(fields, dict):
    raise RequestError(f"sampling_params: expected an object, got {fields!r}")
  for name in fields.keys() - SUPPORTED:
    off = UNSUPPORTED.get(name)
    if off is None:
      known = "`, `".join([*Sampling.__struct_fields__, *UNSUPPORTED])
      message = f"unknown field `{name}`, expected one of `{known}`"
      raise RequestError(message, payload={"error": message})
    if fields[name] not in off:
      raise RequestError(f"{name}={fields[name]!r} is not supported by the embedded engine.")
  try:
    return msgspec.convert(fields, Sampling)
  except msgspec.ValidationError as error:
    raise RequestError(f"sampling_params: {error}") from None


def settled(sampling: Sampling, *, prompt: int, context: int, vocab_size: int) -> dict[str, Any]:
  """Checks values; gives those fields of a Request that are about sampling.

  Args:
    sampling: as read.
    prompt: tokens of the prompt.
    context: most tokens of prompt and output.
    vocab_size: of the model.

  Raises:
    RequestError: a value out of bounds, by name.
  """
  given = _checked(sampling)
  temperature = given["temperature"]
  top_k = given["top_k"]
  seed = sampling.sampling_seed
  return {
    "max_new_tokens": _max_new_tokens(sampling.max_new_tokens, prompt, context),
    "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
    "min_new_tokens": given["min_new_tokens"],
    "top_k": 0 if top_k in ALL_TOKENS or top_k >= vocab_size else top_k,
    "top_p": given["top_p"],
    "min_p": given["min_p"],
    "frequency_penalty": given["frequency_penalty"],
    "presence_penalty": given["presence_penalty"],
    "repetition_penalty": given["repetition_penalty"],
    "stop_token_ids": _stop_token_ids(sampling.stop_token_ids),
    "stop_strings": stop_strings(sampling.stop),
    "ignore_eos": bool(sampling.ignore_eos),
    "seed": None if seed is None else seed & 0xFFFF_FFFF_FFFF_FFFF,
    "skip_special_tokens": sampling.skip_special_tokens is not False,
    "no_stop_trim": bool(sampling.no_stop_trim),
  }


_DEFAULTS: Sequence[tuple[str, float]] = (
  ("temperature", 1.0),
  ("top_p", 1.0),
  ("top_k", -1),
  ("min_p", 0.0),
  ("frequency_penalty", 0.0),
  ("presence_penalty", 0.0),
  ("repetition_penalty", 1.0),
  ("min_new_tokens", 0),
)


def _checked(sampling: Sampling) -> dict[str, Any]:
  """The numbers with their defaults, all within SGLang's bounds."""
  given = {
    name: default if (value := getattr(sampling, name)) is None else value
    for name, default in _DEFAULTS
  }
  temperature, top_k = given["temperature"], given["top_k"]
  if not (math.isfinite(temperature) and temperature >= 0.0):
    raise RequestError(f"temperature must be a non-negative finite number, got {temperature:g}.")
  _bounded(0 < given["top_p"] <= 1, "top_p", "in (0, 1]", given)
  _bounded(top_k == -1 or top_k >= 1, "top_k", "-1 (disable) or at least 1", given)
  _bounded(0 <= given["min_p"] <= 1, "min_p", "in [0, 1]", given)
  _bounded(-2 <= given["frequency_penalty"] <= 2, "frequency_penalty", "in [-2, 2]", given)
  _bounded(-2 <= given["presence_penalty"] <= 2, "presence_penalty", "in [-2, 2]", given)
  _bounded(0 < given["repetition_penalty"] <= 2, "repetition_penalty", "in (0, 2]", given)
  most, least = sampling.max_new_tokens, given["min_new_tokens"]
  if most is msgspec.UNSET:
    most = DEFAULT_MAX_NEW_TOKENS
  if most is not None and most < 0:
    raise RequestError(f"max_new_tokens must be at least 0, got {most}.")
  if least < 0 or (most is not None and least > most):
    raise RequestError(f"min_new_tokens must be in [0, max_new_tokens({most})], got {least}.")
  seed = sampling.sampling_seed
  if seed is not None and not -(2**63) <= seed < 2**63:
    raise RequestError(f"sampling_seed must be in [-2**63, 2**63 - 1], got {seed}.")
  return given


def _bounded(within: bool, name: str, bounds: str, given: Mapping[str, Any]) -> None:
  if not within:
    raise RequestError(f"{name} must be {bounds}, got {given[name]}.")


def parallel(sampling: Sampling) -> int:
  """How many generations of one prompt are asked for."""
  count = 1 if sampling.n is None else sampling.n
  if not 1 <= count <= MAX_PARALLEL:
    raise RequestError(f"n must be in [1, {MAX_PARALLEL}], got {count}.")
  return count


def interval(sampling: Sampling) -> int:
  """A stream's events come at least this many tokens apart, but for the first and the last."""
  tokens = 1 if sampling.stream_interval is None else sampling.stream_interval
  if tokens < 1:
    raise RequestError(f"stream_interval must be at least 1, got {tokens}.")
  return tokens


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
  """`stop` as a tuple; one empty string means none, as in SGLang's clients."""
  if not stop:
    return ()
  strings = (stop,) if isinstance(stop, str) else tuple(stop)
  if len(strings) > MAX_STOP_STRINGS or "" in strings:
    raise RequestError(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got {stop}.")
  return strings


def _stop_token_ids(given: int | list[int | None] | None) -> frozenset[int]:
  if given is None:
    return frozenset()
  return frozenset({given} if isinstance(given, int) else {i for i in given if i is not None})


def _max_new_tokens(asked: int | msgspec.UnsetType | None, prompt: int, context: int) -> int:
  if prompt >= context:
    raise RequestError(
      f"The input ({prompt} tokens) is longer than the model's context length ({context} tokens)."
    )
  if isinstance(asked, int) and prompt + asked > context:
    raise RequestError(
      f"Requested token count exceeds the model's maximum context length of {context} tokens. "
      f"You requested a total of {prompt + asked} tokens: {prompt} tokens from the input messages "
      f"and {asked} tokens for the completion. Please reduce the number of tokens in the input "
      "messages or the completion to fit within the limit."
    )
  # SGLang keeps two positions of the context for itself; one token is always possible.
  most = max(context - 2 - prompt, 1)
  if asked is None:
    return most
  return min(asked if isinstance(asked, int) else DEFAULT_MAX_NEW_TOKENS, most)
