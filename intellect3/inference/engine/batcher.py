"""Who runs at each step: the pure scheduling state of continuous batching. NumPy, no JAX, no clock.

A sequence waits in a queue, holds a slot of the cache while its prompt is prefilled in chunks and
while it decodes, and leaves when it finishes. `plan` says what one step computes: at most one
prefill call of the fixed shape [prefill_rows, prefill_chunk], and at most one decode call over all
slots; `apply` takes their results. Shapes never depend on who runs, so nothing is compiled twice
and a row's numbers do not depend on its neighbours (contract 10).
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from intellect3.inference.engine.request import Request
from intellect3.inference.engine.steps import (
  PADDING_SEGMENT,
  REAL_SEGMENT,
  Decode,
  Prefill,
  Sampled,
  Sampling,
  empty_sampling,
)


class Chunk(NamedTuple):
  """Which part of which sequence a prefill row holds: tokens [start, end)."""

  sequence: "Running"
  start: int
  end: int


class Plan(NamedTuple):
  """What one step computes; either half may be missing, not both.

  Attributes:
    prefill: the prefill call, or None.
    score: whether it is to score its targets (some row wants its input logprobs).
    chunks: what its rows hold, first rows first.
    decode: the decode call, or None.
    decoding: the sequences it decodes, each at its slot.
  """

  prefill: Prefill | None
  score: bool
  chunks: tuple[Chunk, ...]
  decode: Decode | None
  decoding: tuple["Running", ...]


@dataclasses.dataclass(eq=False, slots=True)
class Running:
  """A request with its life: what it has sampled, where its cache is, when things happened.

  Attributes:
    request: what was asked.
    seed: the request's own or the engine's choice.
    received: wall clock, seconds.
    slot: index of its cache, None while it waits.
    cached: how many of its tokens (prompt, then output) are in the cache.
    output_ids: sampled so far.
    output_logprobs: of each sampled id.
    input_logprobs: of prompt ids 1, 2, ... as far as they were scored.
    spans: `[version, start, end]` over the output tokens.
    finish: SGLang's finish reason, None while it lives.
    retractions: how often it lost its cache and went back to the queue.
  """

  request: Request
  seed: int
  received: float
  slot: int | None = None
  cached: int = 0
  output_ids: list[int] = dataclasses.field(default_factory=list)
  output_logprobs: list[float] = dataclasses.field(default_factory=list)
  input_logprobs: list[float] = dataclasses.field(default_factory=list)
  spans: list[list[Any]] = dataclasses.field(default_factory=list)
  finish: Mapping[str, Any] | None = None
  retractions: int = 0
  started: float | None = None
  first_token: float | None = None
  finished: float | None = None

  @property
  def length(self) -> int:
    return len(self.request.input_ids) + len(self.output_ids)

  @property
  def wants_scores(self) -> bool:
    """Whether prompt logprobs are still to be computed (they are kept over a retraction)."""
    missing = len(self.input_logprobs) < len(self.request.input_ids) - 1
    return self.request.logprob_start is not None and missing


class Batcher:
  """The scheduling state. Every method is instant; the engine's thread owns it."""

  def __init__(
    self,
    *,
    slots: int,
    prefill_rows: int,
    prefill_chunk: int,
    eos_token_ids: Iterable[int] = (),
  ):
    for name, value in (
      ("slots", slots),
      ("prefill_rows", prefill_rows),
      ("prefill_chunk", prefill_chunk),
    ):
      if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    self._rows, self._chunk = prefill_rows, prefill_chunk
    self._eos = frozenset(eos_token_ids)
    self._waiting: collections.deque[Running] = collections.deque()
    self._prefilling: list[Running] = []
    self._decoding: list[Running] = []
    self._free = list(range(slots - 1, -1, -1))
    self._tokens_S = np.zeros(slots, np.int32)
    self._positions_S = np.zeros(slots, np.int32)
    self._segments_S = np.full(slots, PADDING_SEGMENT, np.int32)
    self._sampling_S = empty_sampling(slots)

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    """Sequences that hold a slot, hence cache."""
    return len(self._prefilling) + len(self._decoding)

  @property
  def idle(self) -> bool:
    return not (self._waiting or self._prefilling or self._decoding)

  def padding(self) -> tuple[Decode, Prefill]:
    """Steps of the fixed shapes in which no row is real; they write nothing. For warm-up."""
    slots = len(self._tokens_S)
    zeros = np.zeros(slots, np.int32)
    padding = np.full(slots, PADDING_SEGMENT, np.int32)
    return Decode(zeros, zeros, padding, empty_sampling(slots)), self._prefill(())

  def add(self, sequence: Running) -> None:
    self._waiting.append(sequence)

  def abort(self, rid: str | None = None) -> list[Running]:
    """Ends the sequence of that name, or all; returns those that were ended."""
    chosen = [
      sequence
      for group in (self._prefilling, self._decoding, self._waiting)
      for sequence in group
      if rid is None or sequence.request.rid == rid
    ]
    for sequence in chosen:
      sequence.finish = {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
      }
      if sequence.slot is None:
        self._waiting.remove(sequence)
      else:
        self._release(sequence)
    return chosen

  def retract(self) -> int:
    """Takes every slot back: running sequences return to the head of the queue, in order of
    arrival, with what they have sampled. Returns how many."""
    running = sorted((*self._prefilling, *self._decoding), key=lambda sequence: sequence.received)
    for sequence in reversed(running):
      self._release(sequence)
      sequence.cached = 0
      sequence.retractions += 1
      if sequence.wants_scores:
        sequence.input_logprobs.clear()
      self._waiting.appendleft(sequence)
    return len(running)

  def plan(self) -> Plan | None:
    """Admits waiting sequences to free slots and says what the next step computes."""
    while self._free and self._waiting:
      sequence = self._waiting.popleft()
      sequence.slot = self._free.pop()
      self._prefilling.append(sequence)
    chunks = tuple(
      Chunk(sequence, sequence.cached, min(sequence.cached + self._chunk, sequence.length))
      for sequence in self._prefilling[: self._rows]
    )
    if not chunks and not self._decoding:
      return None
    decode = None
    if self._decoding:
      decode = Decode(self._tokens_S, self._positions_S, self._segments_S, self._sampling_S)
    return Plan(
      prefill=self._prefill(chunks) if chunks else None,
      score=any(chunk.sequence.wants_scores for chunk in chunks),
      chunks=chunks,
      decode=decode,
      decoding=tuple(self._decoding),
    )

  def apply(
    self,
    plan: Plan,
    prefilled: Sampled | None,
    decoded: Sampled | None,
    *,
    version: str,
    now: float,
  ) -> list[Running]:
    """Takes the results of `plan`; returns the sequences that it finished.

    Args:
      plan: of the last call of `plan`, with nothing done in between.
      prefilled: rows of `plan.prefill`.
      decoded: rows are slots.
      version: of the weights that computed both.
      now: wall clock, seconds.
    """
    done: list[Running] = []
    if decoded is not None:
      tokens, logprobs = decoded.tokens_R.tolist(), decoded.logprobs_R.tolist()
      for sequence in plan.decoding:
        slot = sequence.slot
        assert slot is not None
        sequence.cached += 1
        if self._append(sequence, tokens[slot], logprobs[slot], version, now):
          done.append(sequence)
    if prefilled is not None:
      tokens, logprobs = prefilled.tokens_R.tolist(), prefilled.logprobs_R.tolist()
      for row, chunk in enumerate(plan.chunks):
        sequence = chunk.sequence
        sequence.started = sequence.started or now
        if prefilled.input_logprobs_RT is not None and sequence.wants_scores:
          scored = min(chunk.end, len(sequence.request.input_ids) - 1) - chunk.start
          sequence.input_logprobs += prefilled.input_logprobs_RT[row, : max(scored, 0)].tolist()
        sequence.cached = chunk.end
        if chunk.end < sequence.length:
          continue
        self._prefilling.remove(sequence)
        self._decoding.append(sequence)
        if self._append(sequence, tokens[row], logprobs[row], version, now):
          done.append(sequence)
    for sequence in done:
      sequence.finished = now
      self._release(sequence)
    return done

  def _append(
    self, sequence: Running, token: int, logprob: float, version: str, now: float
  ) -> bool:
    """Adds one sampled token; returns whether it ends the sequence (SGLang's order of rules)."""
    request, output = sequence.request, sequence.output_ids
    if sequence.first_token is None:
      sequence.first_token = now
    if request.max_new_tokens == 0:
      sequence.spans.append([version, 0, 0])
      sequence.finish = {"type": "length", "length": 0}
      return True
    output.append(token)
    sequence.output_logprobs.append(logprob)
    if sequence.spans and sequence.spans[-1][0] == version:
      sequence.spans[-1][2] = len(output)
    else:
      sequence.spans.append([version, len(output) - 1, len(output)])
    if len(output) >= request.max_new_tokens:
      sequence.finish = {"type": "length", "length": len(output)}
      return True
    if not request.ignore_eos and (token in self._eos or token in request.stop_token_ids):
      sequence.finish = {"type": "stop", "matched": token}
      return True
    slot = sequence.slot
    self._tokens_S[slot] = token
    self._positions_S[slot] = sequence.length - 1
    self._segments_S[slot] = REAL_SEGMENT
    _set_sampling(self._sampling_S, slot, sequence)
    return False

  def _release(self, sequence: Running) -> None:
    slot = sequence.slot
    assert slot is not None
    group = self._decoding if sequence in self._decoding else self._prefilling
    group.remove(sequence)
    self._segments_S[slot] = PADDING_SEGMENT
    self._free.append(slot)
    sequence.slot = None

  def _prefill(self, chunks: Sequence[Chunk]) -> Prefill:
    shape = (self._rows, self._chunk)
    prefill = Prefill(
      tokens_RT=np.zeros(shape, np.int32),
      positions_RT=np.zeros(shape, np.int32),
      segments_RT=np.full(shape, PADDING_SEGMENT, np.int32),
      targets_RT=np.zeros(shape, np.int32),
      slots_R=np.zeros(self._rows, np.int32),
      last_R=np.zeros(self._rows, np.int32),
      sampling=empty_sampling(self._rows),
    )
    for row, (sequence, start, end) in enumerate(chunks):
      prompt, count = sequence.request.input_ids, end - start
      # The tokens of a retracted sequence are its prompt and what it has sampled.
      tokens = prompt[start:end]
      if end > len(prompt):
        tokens = [*tokens, *sequence.output_ids[max(start - len(prompt), 0) : end - len(prompt)]]
      prefill.tokens_RT[row, :count] = tokens
      prefill.positions_RT[row, :count] = np.arange(start, end)
      prefill.segments_RT[row, :count] = REAL_SEGMENT
      targets = prompt[start + 1 : end + 1]
      prefill.targets_RT[row, : len(targets)] = targets
      prefill.slots_R[row] = sequence.slot
      prefill.last_R[row] = count - 1
      _set_sampling(prefill.sampling, row, sequence)
    return prefill


def _set_sampling(sampling: Sampling, row: int | None, sequence: Running) -> None:
  sampling.seeds_R2[row] = (sequence.seed >> 32, sequence.seed & 0xFFFF_FFFF)
  sampling.positions_R[row] = len(sequence.output_ids)
  sampling.temperatures_R[row] = sequence.request.temperature
