"""Fills the arrays of device calls: which numbers stand in which row.

Place in the ring: between the batcher, which decides who is computed, and the device.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from intellect3.inference.engine.sequence import Sequence
from intellect3.inference.engine.steps import (
  MAX_STOP_IDS,
  NO_ID,
  Decode,
  Prefill,
  Sampling,
  empty_sampling,
)


class Chunk(NamedTuple):
  """Which part of which sequence a prefill row holds: tokens [start, end)."""

  sequence: Sequence
  start: int
  end: int


class Slots:
  """The rows of decode calls: slot s holds the sequence that decodes there, if any."""

  def __init__(self, slots: int, table_width: int):
    self.tables_SW = np.zeros((slots, table_width), np.int32)
    self._tokens_S = np.zeros(slots, np.int32)
    self._positions_S = np.zeros(slots, np.int32)
    self._remaining_S = np.zeros(slots, np.int32)
    self._ends_S = np.zeros(slots, bool)
    self._sampling = empty_sampling(slots)

  def set_table(self, slot: int, pages: Seq[int]) -> None:
    self.tables_SW[slot, : len(pages)] = pages

  def start(self, sequence: Sequence, stops: Iterable[int]) -> None:
    """Puts a sequence into its slot; `advance` then says where it stands."""
    assert sequence.slot is not None
    self._ends_S[sequence.slot] = not sequence.request.ignore_eos
    set_sampling(self._sampling, sequence.slot, sequence, stops)

  def advance(self, sequence: Sequence, remaining: int) -> None:
    """Its last token is the next input; it may sample `remaining` tokens in the next call."""
    slot = sequence.slot
    self._tokens_S[slot] = sequence.output_ids[-1]
    self._positions_S[slot] = sequence.length - 1
    self._remaining_S[slot] = remaining
    self._sampling.positions_R[slot] = len(sequence.output_ids)

  def clear(self, slot: int) -> None:
    """Nothing decodes there any more."""
    self._remaining_S[slot] = 0
    # A row that was never started: bans, penalties and filters of the last tenant are gone.
    self._sampling.min_new_R[slot] = 0

  def decode(self, running: Seq[Sequence], *, steps: int, quorum: int) -> Decode:
    """The call that decodes those who were put in."""
    return Decode(
      tokens_S=self._tokens_S,
      positions_S=self._positions_S,
      remaining_S=self._remaining_S,
      ends_S=self._ends_S,
      tables_SW=self.tables_SW,
      steps=np.int32(steps),
      quorum=np.int32(quorum),
      sampling=with_wishes(self._sampling, running),
    )


def prefill(
  chunks: Seq[Chunk],
  slots: Slots,
  *,
  rows: int,
  length: int,
  stops: Seq[Iterable[int]],
) -> Prefill:
  """The call that computes some chunks, one in each of the first rows.

  Args:
    chunks: at most `rows`, each of at most `length` tokens.
    slots: has the page tables.
    rows: R.
    length: T.
    stops: the stop ids of each chunk's sequence.
  """
  shape = (rows, length)
  call = Prefill(
    tokens_RT=np.zeros(shape, np.int32),
    positions_RT=np.zeros(shape, np.int32),
    valid_RT=np.zeros(shape, bool),
    targets_RT=np.zeros(shape, np.int32),
    slots_R=np.zeros(rows, np.int32),
    tables_RW=np.zeros((rows, slots.tables_SW.shape[1]), np.int32),
    last_R=np.zeros(rows, np.int32),
    samples_R=np.zeros(rows, bool),
    score=np.bool_(any(chunk.sequence.wants_scores for chunk in chunks)),
    sampling=empty_sampling(rows),
  )
  for row, (sequence, start, end) in enumerate(chunks):
    prompt, count = sequence.request.input_ids, end - start
    # The tokens of a retracted sequence are its prompt and what it has sampled.
    tokens = prompt[start:end]
    if end > len(prompt):
      tokens = [*tokens, *sequence.output_ids[max(start - len(prompt), 0) : end - len(prompt)]]
    call.tokens_RT[row, :count] = tokens
    call.positions_RT[row, :count] = np.arange(start, end)
    call.valid_RT[row, :count] = True
    if sequence.wants_scores:
      targets = prompt[start + 1 : end + 1]
      call.targets_RT[row, : len(targets)] = targets
    call.slots_R[row] = sequence.slot
    call.tables_RW[row] = slots.tables_SW[sequence.slot]
    call.last_R[row] = count - 1
    call.samples_R[row] = end == sequence.length
    if end == sequence.length:
      set_sampling(call.sampling, row, sequence, stops[row])
  ending = [chunk.sequence for chunk in chunks if chunk.end == chunk.sequence.length]
  wishes = with_wishes(call.sampling, ending)
  scoring = any(c.sequence.wants_scores and c.sequence.request.top_logprobs_num for c in chunks)
  return call._replace(sampling=wishes._replace(top=wishes.top | np.bool_(scoring)))


def with_wishes(sampling: Sampling, running: Seq[Sequence]) -> Sampling:
  """Sampling whose `filters`, `penalizes` and `top` say what any of these sequences wants."""
  requests = [sequence.request for sequence in running]
  return sampling._replace(
    filters=np.bool_(any(request.filters for request in requests)),
    penalizes=np.bool_(any(request.penalizes for request in requests)),
    top=np.bool_(any(request.top_logprobs_num for request in requests)),
  )


def set_sampling(sampling: Sampling, row: int, sequence: Sequence, stops: Iterable[int]) -> None:
  """Writes how a sequence samples into its row."""
  request = sequence.request
  sampling.seeds_R2[row] = (sequence.seed >> 32, sequence.seed & 0xFFFF_FFFF)
  sampling.positions_R[row] = len(sequence.output_ids)
  sampling.temperatures_R[row] = request.temperature
  sampling.top_k_R[row] = request.top_k
  sampling.top_p_R[row] = request.top_p
  sampling.min_p_R[row] = request.min_p
  sampling.frequency_R[row] = request.frequency_penalty
  sampling.presence_R[row] = request.presence_penalty
  sampling.repetition_R[row] = request.repetition_penalty
  sampling.min_new_R[row] = min(request.min_new_tokens, request.max_new_tokens)
  # Requests may name ids that no vocabulary has.
  known = [stop for stop in stops if 0 <= stop < NO_ID][:MAX_STOP_IDS]
  sampling.stops_RJ[row] = empty_sampling(1).stops_RJ[0]
  sampling.stops_RJ[row, : len(known)] = known
