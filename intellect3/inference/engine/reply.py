"""What `/generate` answers: a finished sequence in SGLang's words.

Every key of SGLang's answer is there with its type. Times are wall-clock seconds (`.._ts`,
`.._time`) or durations in seconds.
"""

import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

from intellect3.inference.engine.batcher import Running

Decoder = Callable[[Sequence[int], bool], str]
"""(ids, skip_special_tokens) -> text."""


def make_decoder(directory: str | os.PathLike[str]) -> Decoder:
  """The text of ids by the model directory's `tokenizer.json`; always "" where there is none."""
  path = pathlib.Path(directory) / "tokenizer.json"
  if not path.is_file():
    return lambda ids, skip_special_tokens: ""
  tokenizer = tokenizers.Tokenizer.from_file(str(path))

  def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

  return decode


def generate_reply(sequence: Running, *, decode: Decoder, version: str) -> dict[str, Any]:
  """The answer for one finished sequence.

  Args:
    sequence: with `finish` and `finished` set.
    decode: gives `text`; a stop token that ended the generation is not part of it.
    version: of the weights that are served now.
  """
  request, output = sequence.request, sequence.output_ids
  finish, finished = sequence.finish, sequence.finished
  assert finish is not None and finished is not None
  text_ids = output
  if finish["type"] == "stop" and not request.no_stop_trim:
    text_ids = output[:-1]
  received = sequence.received
  started = finished if sequence.started is None else sequence.started
  first_token = finished if sequence.first_token is None else sequence.first_token
  meta: dict[str, Any] = {
    "id": request.rid,
    "finish_reason": finish,
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
    meta["input_token_logprobs"] = _input_logprobs(sequence)
    meta["output_token_logprobs"] = [
      (logprob, token, None)
      for logprob, token in zip(sequence.output_logprobs, output, strict=True)
    ]
    meta["output_token_logprobs_length"] = len(output)
  meta |= {
    "reasoning_tokens": 0,
    "completion_tokens": len(output),
    "cached_tokens": 0,
    "weight_versions": [
      {"version": version, "start": start, "end": end} for version, start, end in sequence.spans
    ],
    "cached_tokens_details": None,
    "dp_rank": None,
    "e2e_latency": finished - received,
    "request_received_ts": received,
    "first_token_latency": first_token - received,
    "api_server_dispatch_finish_ts": received,
    "request_finished_ts": finished,
  }
  if len(output) > 1:
    meta["decode_throughput"] = (len(output) - 1) / max(finished - first_token, 1e-9)
  meta["response_sent_to_client_ts"] = time.time()
  return {
    "text": decode(text_ids, request.skip_special_tokens) if text_ids else "",
    "output_ids": output,
    "meta_info": meta,
  }


def _input_logprobs(sequence: Running) -> list[tuple[float | None, int, None]]:
  """`[logprob, id, null]` from the asked position on; the first has nothing before it: null."""
  request = sequence.request
  start = request.logprob_start
  # An aborted sequence may not have been scored to its end.
  if start is None or len(sequence.input_logprobs) < len(request.input_ids) - 1:
    return []
  logprobs = [None, *sequence.input_logprobs[start:]]
  return [
    (logprob, token, None)
    for logprob, token in zip(logprobs, request.input_ids[start:], strict=True)
  ]
