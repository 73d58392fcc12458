"""SGLang's HTTP protocol as types: what we send, what we accept, and the checks in between.

Place in the ring: the border between our records and any server that speaks the protocol (SGLang,
the embedded engine, a simulator). A reply is checked as if its sender were hostile: whatever does
not fit raises ProtocolError and never reaches a Trajectory. As observed of SGLang 0.5.23.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from intellect3.types import Generation

T = TypeVar("T")


UNCHECKED = "unchecked-"
"""Begins the `weight_version` of a server between the first and last bucket of a version."""
_NO_VERSION = -2


class ProtocolError(Exception):
  """A server's reply breaks the protocol. Asking again would not mend it."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
  """How to sample; an unknown field is a 400 at the server.

  Attributes:
    max_new_tokens: at most this many tokens; 0 only scores the prompt.
    temperature: 0 is greedy.
    stop_token_ids: ids that end the generation; the one that did is part of the output.
    sampling_seed: SGLang heeds it only with --enable-deterministic-inference.
  """

  max_new_tokens: int
  temperature: float
  stop_token_ids: Sequence[int] = ()
  sampling_seed: int | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
  """The body of `POST /generate`.

  Attributes:
    input_ids: the prompt.
    rid: id of the request; the reply repeats it.
    sampling_params: how to sample.
    return_logprob: ask for logprobs of the output, and of the input from `logprob_start_len`.
    logprob_start_len: first input position to score; -1 scores none.
    stream: always False: generations are asked for whole.
    extra_key: separates prefix caches; carries the policy version.
    return_routed_experts: ask for the experts of each token from `routed_experts_start_len` on;
      see `routed_experts`.
    routed_experts_start_len: first position whose experts are told, at most the prompt's length.
  """

  input_ids: Sequence[int]
  rid: str
  sampling_params: SamplingParams
  return_logprob: bool = True
  logprob_start_len: int = -1
  stream: bool = False
  extra_key: str | None = None
  return_routed_experts: bool | None = None
  routed_experts_start_len: int | None = None


class VersionSpan(msgspec.Struct, frozen=True):
  """Output tokens [start, end) were sampled under weights `version`."""

  version: str
  start: int
  end: int


class FinishReason(msgspec.Struct, frozen=True):
  """Why a generation ended; `status_code` and `message` may come with an abort."""

  type: Literal["stop", "length", "abort"]
  matched: int | str | None = None
  message: str | None = None
  status_code: int | None = None


class MetaInfo(msgspec.Struct, frozen=True):
  """The part of `meta_info` that we read. A logprob row is (logprob, token id, text or None).

  SGLang leaves `prompt_tokens` out where a request was aborted in its queue.
  """

  id: str
  finish_reason: FinishReason
  completion_tokens: int
  weight_version: str
  weight_versions: Sequence[VersionSpan]
  output_token_logprobs: Sequence[tuple[float, int, str | None]]
  input_token_logprobs: Sequence[tuple[float | None, int, str | None]] = ()
  prompt_tokens: int | None = None
  cached_tokens: int | None = None
  routed_experts: str | None = None


class GenerateReply(msgspec.Struct, frozen=True):
  """The part of a `/generate` reply that we read; other fields are ignored."""

  output_ids: Sequence[int]
  meta_info: MetaInfo


class UpdateReply(msgspec.Struct, frozen=True):
  """What `/update_weights_from_disk` answers, also with status 400."""

  success: bool
  message: str = ""


class ModelInfo(msgspec.Struct, frozen=True):
  """The part of `/model_info` that we read."""

  model_path: str
  weight_version: str


def encode(request: msgspec.Struct) -> dict[str, Any]:
  """The request as a JSON object of plain values; fields that are None are left out."""
  return _without_none(msgspec.to_builtins(request))


def decode(body: bytes, kind: type[T]) -> T:
  """Reads a reply's JSON body; raises ProtocolError where it is not of that kind."""
  try:
    return msgspec.json.decode(body, type=kind)
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
    raise ProtocolError(f"not a {kind.__name__}: {error}") from error


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
  """Checks a prompt before it is sent: an id outside the vocabulary kills an SGLang server.

  Args:
    ids: whole numbers, at least one.
    vocab_size: number of ids the server knows.

  Raises:
    ValueError: naming the first bad position.
  """
  array = np.asarray(ids)
  if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
    raise ValueError(
      f"input_ids: expected a flat, non-empty sequence of ints, got {array.dtype}{[*array.shape]}"
    )
  bad = np.flatnonzero((array < 0) | (array >= vocab_size))
  if bad.size:
    raise ValueError(
      f"input_ids[{bad[0]}]: expected an id in [0, {vocab_size}), got {array[bad[0]]}"
    )


def parse_version(version: str) -> int:
  """A `weight_version` as our policy version; ProtocolError where it is not a whole number."""
  if not (version.isascii() and version.isdigit() and len(version) < 10):
    raise ProtocolError(f"weight_version: expected a whole number, got {version!r}")
  return int(version)


def expand_versions(spans: Sequence[VersionSpan], length: int) -> np.ndarray:
  """The version of each output token.

  Args:
    spans: consecutive, from token 0 to `length`.
    length: number of output tokens.

  Returns:
    int32[length], below 0 where the weights were a mixture (`UNCHECKED`).

  Raises:
    ProtocolError: spans that do not cover each token once, or a version that is no whole number.
  """
  versions = np.empty(length, np.int32)
  covered = 0
  for span in spans:
    if span.start != covered or not span.start <= span.end <= length:
      raise ProtocolError(
        f"weight_versions: expected a span from {covered} to at most {length}, "
        f"got [{span.start}, {span.end})"
      )
    mixed = span.version.startswith(UNCHECKED)
    versions[span.start : span.end] = _NO_VERSION if mixed else parse_version(span.version)
    covered = span.end
  if covered != length:
    raise ProtocolError(f"weight_versions: expected {length} tokens covered, got {covered}")
  return versions


def parse_generation(
  reply: GenerateReply, request: GenerateRequest, *, vocab_size: int, server: str
) -> Generation:
  """Checks a reply against its request and makes our record of it.

  Args:
    reply: decoded reply; its `finish_reason` may be `abort`, with the tokens made until then.
    request: what was asked.
    vocab_size: ids at or above it are refused.
    server: address, for the record.

  Returns:
    The Generation, with per-token policy versions. It ends before the first token of weights that
    were a mixture, as if it had been aborted there.

  Raises:
    ProtocolError: the answer to another request; lengths that disagree; ids outside the vocabulary;
      logprobs that are not finite or above 0; version spans that do not fit; a stop with no token.
  """
  meta = reply.meta_info
  length = len(reply.output_ids)
  _expect("meta_info.id", request.rid, meta.id)
  if meta.prompt_tokens is not None or meta.finish_reason.type != "abort":
    _expect("prompt_tokens", len(request.input_ids), meta.prompt_tokens)
  _expect("completion_tokens", length, meta.completion_tokens)
  _expect("len(output_token_logprobs)", length, len(meta.output_token_logprobs))
  if length > request.sampling_params.max_new_tokens:
    raise ProtocolError(
      f"output_ids: expected at most {request.sampling_params.max_new_tokens} ids, got {length}"
    )
  if meta.finish_reason.type == "stop" and length == 0:
    raise ProtocolError("output_ids: expected the stop token at least, got none")
  for position, (token, (logprob, scored, _)) in enumerate(
    zip(reply.output_ids, meta.output_token_logprobs, strict=True)
  ):
    if not 0 <= token < vocab_size or scored != token:
      raise ProtocolError(
        f"output_ids[{position}]: expected one id in [0, {vocab_size}) in ids and logprobs, "
        f"got {token} and {scored}"
      )
    _check_logprob(f"output_token_logprobs[{position}]", logprob)
  versions = expand_versions(meta.weight_versions, length)
  kept = int(np.argmax(versions < 0)) if np.any(versions < 0) else length
  return Generation(
    tokens=np.asarray(reply.output_ids, np.int32)[:kept],
    inference_logprobs=np.asarray(
      [row[0] for row in meta.output_token_logprobs[:kept]], np.float32
    ),
    policy_versions=versions[:kept],
    finish_reason=meta.finish_reason.type if kept == length else "abort",
    server=server,
  )


def parse_scores(reply: GenerateReply, request: GenerateRequest) -> np.ndarray:
  """The logprobs of a scored prompt.

  Returns:
    float32[T] for a prompt of T ids; [t] scores id t, [0] is 0.0 since nothing comes before it.

  Raises:
    ProtocolError: as for parse_generation.
  """
  rows, ids = reply.meta_info.input_token_logprobs, request.input_ids
  _expect("meta_info.id", request.rid, reply.meta_info.id)
  _expect("len(input_token_logprobs)", len(ids), len(rows))
  scores = np.zeros(len(ids), np.float32)
  for position, (token, (logprob, scored, _)) in enumerate(zip(ids, rows, strict=True)):
    _expect(f"input_token_logprobs[{position}] id", token, scored)
    if position > 0:
      if logprob is None:
        raise ProtocolError(f"input_token_logprobs[{position}]: expected a logprob, got none")
      scores[position] = _check_logprob(f"input_token_logprobs[{position}]", logprob)
  return scores


def error_message(body: bytes) -> str:
  """What a refusal says, at most 300 characters."""
  text = body.decode(errors="replace").strip()
  try:
    error = msgspec.json.decode(body)
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
    return text[:300]
  while isinstance(error, Mapping) and ("error" in error or "message" in error):
    error = error.get("error", error.get("message"))
  return str(error)[:300]


_ROUNDING = 1e-3
"""A logprob may exceed 0 by the rounding of a low-precision softmax."""
_LOWEST = float(np.finfo(np.float32).min)


def _check_logprob(name: str, logprob: float) -> float:
  if not _LOWEST <= logprob <= _ROUNDING:  # NaN fails every comparison
    raise ProtocolError(f"{name}: expected a finite logprob of at most 0, got {logprob}")
  return logprob


def _expect(name: str, expected: Any, got: Any) -> None:
  if expected != got:
    raise ProtocolError(f"{name}: expected {expected!r}, got {got!r}")


def _without_none(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _without_none(item) for key, item in value.items() if item is not None}
  return value
