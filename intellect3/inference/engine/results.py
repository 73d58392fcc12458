"""What a device call computed, written into the sequences: tokens, scores, experts, and the end.

Place in the ring: the batcher calls it after each step. Pure bookkeeping over NumPy.
"""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import numpy as np

from intellect3.inference.engine.rows import Chunk
from intellect3.inference.engine.sequence import Sequence, TopLogprobs
from intellect3.inference.engine.steps import MAX_STOP_IDS, Prefilled, Top

MatchStop = Callable[[Seq[int], tuple[str, ...]], str | None]
"""(output ids, stop strings) -> the string that their text now holds."""


def take_chunk(chunk: Chunk, prefilled: Prefilled, row: int) -> None:
  """Writes what a prefill row computed besides its sample."""
  sequence, start, end = chunk
  sequence.cached = end
  if prefilled.experts_LRTA is not None:
    piece = prefilled.experts_LRTA[:, row, : end - start].swapaxes(0, 1)
    sequence.experts.append(np.ascontiguousarray(piece))
  if prefilled.input_logprobs_RT is None or not sequence.wants_scores:
    return
  assert sequence.first_scored is not None
  # Position t scores the prompt's id t + 1.
  first = max(sequence.first_scored - 1 - start, 0)
  scored = slice(first, min(end, len(sequence.request.input_ids) - 1) - start)
  if scored.start < scored.stop:
    sequence.input_logprobs += prefilled.input_logprobs_RT[row, scored].tolist()
    sequence.input_top += alternatives(prefilled.input_top, sequence, row, scored)


def extend(
  sequence: Sequence,
  tokens: Seq[int],
  logprobs: Seq[float],
  top: Seq[TopLogprobs],
  *,
  stops: Collection[int],
  match_stop: MatchStop,
  version: str,
  now: float,
) -> int:
  """Adds sampled tokens up to the one that ends the sequence, and sets `finish` if one does.

  Args:
    sequence: decodes.
    tokens: in order; the device has left out what follows a stop id that it knew.
    logprobs: of the tokens, at least as many.
    top: alternatives, or nothing.
    stops: ids that end the sequence unless it ignores them.
    match_stop: finds stop strings.
    version: of the weights that sampled.
    now: wall clock, seconds.

  Returns:
    How many tokens were added.
  """
  request, output = sequence.request, sequence.output_ids
  if sequence.first_token is None:
    sequence.first_token = now
  if request.max_new_tokens == 0:
    sequence.spans.append([version, 0, 0])
    sequence.finish = {"type": "length", "length": 0}
    return 0
  began = len(output)
  if request.stop_strings or len(stops) > MAX_STOP_IDS:
    for token in tokens:
      output.append(token)
      sequence.finish = _finish(sequence, stops, match_stop)
      if sequence.finish is not None:
        break
  else:
    output.extend(tokens)
    sequence.finish = _finish(sequence, stops, match_stop)
  added = len(output) - began
  sequence.output_logprobs.extend(logprobs[:added])
  sequence.output_top.extend(top[:added])
  if sequence.spans and sequence.spans[-1][0] == version:
    sequence.spans[-1][2] = len(output)
  else:
    sequence.spans.append([version, began, len(output)])
  return added


def _finish(sequence: Sequence, stops: Collection[int], match_stop: MatchStop) -> dict | None:
  """The finish reason that the last token brings, in SGLang's order of rules."""
  request, output = sequence.request, sequence.output_ids
  if request.stop_strings:
    matched = match_stop(output, request.stop_strings)
    if matched is not None:
      return {"type": "stop", "matched": matched}
  if not request.ignore_eos and output[-1] in stops:
    return {"type": "stop", "matched": output[-1]}
  if len(output) >= request.max_new_tokens:
    return {"type": "length", "length": len(output)}
  return None


def alternatives(top: Top | None, sequence: Sequence, *at: slice | int) -> list[TopLogprobs]:
  """The alternatives at some positions, as many as the request wants; none where it wants none."""
  count = sequence.request.top_logprobs_num
  if top is None or not count:
    return []
  logprobs, ids = (np.asarray(x)[at][..., :count].tolist() for x in top)
  return [list(zip(*pair, strict=True)) for pair in zip(logprobs, ids, strict=True)]
