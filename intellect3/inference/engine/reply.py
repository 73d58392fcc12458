"""What `/generate` answers: a sequence in SGLang's words, whole or as it grows.

Every key of SGLang's answer is there with its type. Times are wall-clock seconds (`.._ts`,
`.._time`) or durations in seconds.
"""

import base64
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from intellect3.inference.engine import text as texts
from intellect3.inference.engine.sequence import Sequence as Generation
from intellect3.inference.engine.sequence import TopLogprobs
from intellect3.inference.engine.text import Text

Namer = Callable[[int], str | None]
"""Token id -> its text in logprobs, or None."""


def nameless(index: int) -> None:
  """The Namer of clients that did not ask for texts."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wording:
  """How sequences are told: the tokenizer, and the layers that have no experts.

  Attributes:
    text: None where the model has no tokenizer; every text is then empty.
    num_dense_layers: the first layers, told as zeros in `routed_experts`.
  """

  text: Text | None
  num_dense_layers: int = 0

  def namer(self, wanted: bool) -> Namer:
    return self.text.name if wanted and self.text is not None else nameless

  def final_text(self, sequence: Generation) -> str:
    """The text of a finished sequence; what stopped it is cut off unless it was asked for."""
    if self.text is None:
      return ""
    request, output, finish = sequence.request, sequence.output_ids, sequence.finish
    assert finish is not None
    matched = finish.get("matched")
    if isinstance(matched, int) and not request.no_stop_trim:
      output = output[:-1]
    text = self.text.decode(output, request.skip_special_tokens)
    if isinstance(matched, str):
      return texts.trim(text, matched, keep=request.no_stop_trim)
    return text

  def meta_info(
    self,
    sequence: Generation,
    *,
    finished: bool,
    version: str,
    length: int,
    since: int = 0,
    namer: Namer = nameless,
    reasoning_tokens: int = 0,
  ) -> dict[str, Any]:
    """`meta_info` of the first tokens of an output, or of all with how it ended.

    Args:
      sequence: running or finished.
      finished: whether to tell how it ended.
      version: of the weights that are served now.
      length: output tokens to tell of.
      since: the first output token whose logprobs are told.
      namer: texts in logprobs.
      reasoning_tokens: how many of the output tokens are reasoning.
    """
    request, received = sequence.request, sequence.received
    end = received if sequence.finished is None else sequence.finished
    started = end if sequence.started is None else sequence.started
    first_token = end if sequence.first_token is None else sequence.first_token
    meta: dict[str, Any] = {
      "id": request.rid,
      "finish_reason": sequence.finish if finished else None,
      "prompt_tokens": len(request.input_ids),
      "weight_version": version,
      "num_retractions": sequence.retractions,
      "storage_prefetch_wait": 0.0,
      "storage_staging_wait": 0.0,
      "forward_entry_time": started,
      "prefill_finished_time": first_token,
      "queue_time": started - received,
    }
    if request.return_logprob:
      _add_logprobs(meta, sequence, slice(since, length), length, namer)
    cached = sequence.cached_tokens
    meta["reasoning_tokens"] = reasoning_tokens
    meta["completion_tokens"] = length
    meta["cached_tokens"] = cached
    if finished:
      meta["weight_versions"] = [
        {"version": version, "start": start, "end": end} for version, start, end in sequence.spans
      ]
    meta["cached_tokens_details"] = {"device": cached, "host": 0} if cached else None
    if finished and request.return_routed_experts:
      meta["routed_experts"] = self.routed_experts(sequence)
    meta["dp_rank"] = None
    if finished:
      meta["e2e_latency"] = end - received
      meta["request_received_ts"] = received
      meta["first_token_latency"] = first_token - received
      meta["api_server_dispatch_finish_ts"] = received
      meta["request_finished_ts"] = end
      if length > 1:
        meta["decode_throughput"] = (length - 1) / max(end - first_token, 1e-9)
    return meta

  def reply(
    self,
    sequence: Generation,
    *,
    version: str,
    namer: Namer = nameless,
    prompt_ids: bool = False,
    reasoning_tokens: int = 0,
  ) -> dict[str, Any]:
    """The answer for one finished sequence; arguments as of `meta_info`."""
    meta = self.meta_info(
      sequence,
      finished=True,
      version=version,
      length=len(sequence.output_ids),
      namer=namer,
      reasoning_tokens=reasoning_tokens,
    )
    meta["response_sent_to_client_ts"] = time.time()
    reply = {
      "text": self.final_text(sequence),
      "output_ids": sequence.output_ids,
      "meta_info": meta,
    }
    if prompt_ids:
      reply["prompt_token_ids"] = sequence.request.input_ids
    return reply

  def routed_experts(self, sequence: Generation) -> str:
    """Base64 of int32 [prompt + output - 1, layers, A], less the tokens before the asked start;
    layers without experts are zeros."""
    if not sequence.experts:
      return ""
    moe_TLA = np.concatenate(sequence.experts)[sequence.request.routed_experts_start :]
    tokens, _, active = moe_TLA.shape
    dense_TLA = np.zeros((tokens, self.num_dense_layers, active), np.int32)
    whole_TLA = np.concatenate([dense_TLA, moe_TLA.astype(np.int32, copy=False)], axis=1)
    return base64.b64encode(whole_TLA.tobytes()).decode("ascii")


def _add_logprobs(
  meta: dict[str, Any], sequence: Generation, told: slice, length: int, namer: Namer
) -> None:
  request = sequence.request
  inputs = _input_rows(sequence)
  meta["input_token_logprobs"] = _rows(*inputs, namer) if inputs else []
  meta["output_token_logprobs"] = _rows(
    sequence.output_logprobs[told], sequence.output_ids[told], namer
  )
  meta["output_token_logprobs_length"] = length
  if request.top_logprobs_num:
    meta["input_top_logprobs"] = _input_top(sequence, namer)
    meta["output_top_logprobs"] = [_top(row, namer) for row in sequence.output_top[told]]


def _rows(
  logprobs: Sequence[float | None], ids: Sequence[int], namer: Namer
) -> list[tuple[float | None, int, str | None]]:
  if namer is nameless:
    return list(zip(logprobs, ids, itertools.repeat(None)))
  return [(logprob, index, namer(index)) for logprob, index in zip(logprobs, ids, strict=True)]


def _top(row: TopLogprobs, namer: Namer) -> list[tuple[float, int, str | None]]:
  return [(logprob, index, namer(index)) for logprob, index in row]


def _input_rows(sequence: Generation) -> tuple[list[float | None], Sequence[int]] | None:
  """Logprobs and ids of the prompt from the asked position on; the first has nothing before it."""
  request = sequence.request
  start = request.logprob_start
  if start is None:
    return None
  ids = request.input_ids[start:]
  scored = len(ids) - 1
  # An aborted sequence may not have been scored to its end.
  if len(sequence.input_logprobs) < scored:
    return None
  return [None, *sequence.input_logprobs[len(sequence.input_logprobs) - scored :]], ids


def _input_top(
  sequence: Generation, namer: Namer
) -> list[list[tuple[float, int, str | None]] | None]:
  start = sequence.request.logprob_start
  if start is None:
    return []
  scored = len(sequence.request.input_ids) - start - 1
  if len(sequence.input_top) < scored:
    return []
  rows = sequence.input_top[len(sequence.input_top) - scored :]
  return [None, *(_top(row, namer) for row in rows)]
