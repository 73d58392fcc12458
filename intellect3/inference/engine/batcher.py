"""Who runs at each step: the scheduling state of continuous batching. NumPy, no JAX, no clock.

A sequence waits in a queue, holds a slot and pages of the cache while its prompt is prefilled in
chunks and while it decodes, and leaves when it finishes. `plan` says what one step computes: at
most one prefill call of the fixed shape [prefill_rows, prefill_chunk] and at most one decode call
over all slots, of several tokens each; `apply` takes their results. Shapes never depend on who
runs, so nothing is compiled twice and a row's numbers do not depend on its neighbours (contract
10). A prompt whose beginning is in the cache, or is about to be, is computed from there on.
"""

import collections
import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from intellect3.inference.engine import results, rows, tenancy
from intellect3.inference.engine.pages import Pages
from intellect3.inference.engine.results import MatchStop
from intellect3.inference.engine.rows import Chunk, Slots
from intellect3.inference.engine.sequence import Sequence
from intellect3.inference.engine.steps import Decode, Decoded, Prefill, Prefilled

ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


class Plan(NamedTuple):
  """What one step computes; either half may be missing, not both.

  Attributes:
    prefill: the prefill call, or None.
    chunks: what its rows hold, first rows first.
    decode: the decode call, or None.
    decoding: the sequences it decodes, each at its slot.
    resets: slots with the tokens that their new tenants have sampled, where penalties count them.
  """

  prefill: Prefill | None
  chunks: tuple[Chunk, ...]
  decode: Decode | None
  decoding: tuple[Sequence, ...]
  resets: tuple[tuple[int, Seq[int]], ...] = ()


@dataclasses.dataclass
class Counters:
  """What was done since the start, in tokens unless said.

  Attributes:
    generated: sampled.
    prompt: of requests that began to run.
    cached: of those, found in the prefix cache.
    prefilled: computed in prefill calls.
    reprefilled: of those, computed once more after a retraction.
    retractions: how often a sequence lost its cache.
  """

  generated: int = 0
  prompt: int = 0
  cached: int = 0
  prefilled: int = 0
  reprefilled: int = 0
  retractions: int = 0


class Batcher:
  """The scheduling state. Every method is instant; the engine's thread owns it."""

  def __init__(
    self,
    *,
    slots: int,
    pages: Pages,
    context_length: int,
    prefill_rows: int,
    prefill_chunk: int,
    decode_steps: int = 8,
    eos_token_ids: Iterable[int] = (),
    deterministic: bool = False,
    match_stop: MatchStop = lambda ids, strings: None,
  ):
    """Makes an empty batcher.

    Args:
      slots: sequences that run at once.
      pages: the cache; one sequence of full length must fit.
      context_length: most tokens of a sequence.
      prefill_rows: chunks that one prefill call computes.
      prefill_chunk: tokens of each; divides the page size, so that a token lies at the same place
        of its chunk whoever computes it.
      decode_steps: most tokens that one decode call samples for each slot.
      eos_token_ids: the model's own stop ids.
      deterministic: pages are reserved for the whole generation, so that nothing is retracted for
        want of memory, and only what prefill computed is shared: decode rounds differently.
      match_stop: finds stop strings.
    """
    for name, value in (
      ("slots", slots),
      ("prefill_rows", prefill_rows),
      ("prefill_chunk", prefill_chunk),
      ("decode_steps", decode_steps),
    ):
      if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if pages.page_size % prefill_chunk:
      raise ValueError(
        f"prefill_chunk: expected a divisor of page_size ({pages.page_size}), got {prefill_chunk}"
      )
    width = -(-context_length // pages.page_size)
    if pages.count < width:
      raise ValueError(
        f"max_total_tokens: expected at least context_length ({context_length}), "
        f"got {pages.count * pages.page_size}"
      )
    self.counters = Counters()
    self.pages = pages
    self._rows, self._chunk, self._steps = prefill_rows, prefill_chunk, decode_steps
    self._eos = frozenset(eos_token_ids)
    self._deterministic, self._match_stop = deterministic, match_stop
    self._waiting: collections.deque[Sequence] = collections.deque()
    self._prefilling: list[Sequence] = []
    self._decoding: list[Sequence] = []
    self._free = list(range(slots - 1, -1, -1))
    self._slots = Slots(slots, width)
    self._resets: list[tuple[int, Seq[int]]] = []
    self._refused: tuple[Any, ...] = ()

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
    """Calls of the fixed shapes in which no row is real; they write nothing. For warm-up."""
    decode = self._slots.decode((), steps=1, quorum=0)
    return decode, rows.prefill((), self._slots, rows=self._rows, length=self._chunk, stops=())

  def add(self, sequence: Sequence) -> None:
    self._waiting.append(sequence)

  def abort(self, rid: str | None = None) -> list[Sequence]:
    """Ends the sequence of that name, or all; returns those that were ended."""
    chosen = [
      sequence
      for group in (self._prefilling, self._decoding, self._waiting)
      for sequence in group
      if rid is None or sequence.request.rid == rid
    ]
    for sequence in chosen:
      sequence.finish = ABORTED
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
      self._retract(sequence)
    return len(running)

  def forget_prefixes(self) -> None:
    """No later sequence finds what was computed so far; those that run keep their pages."""
    self.pages.clear()

  def plan(self) -> Plan | None:
    """Admits waiting sequences and says what the next step computes."""
    while self._free and self._waiting and self._admit(self._waiting[0]):
      self._waiting.popleft()
    # While prompts are computed, decoding goes on in short calls between them.
    steps = max(1, self._steps // 4) if self._prefilling else self._steps
    decoding = self._grow(steps)
    chunks = self._chunks()
    if not chunks and not decoding:
      return None
    prefill = None
    if chunks:
      stops = [self._stops(chunk.sequence) for chunk in chunks]
      prefill = rows.prefill(chunks, self._slots, rows=self._rows, length=self._chunk, stops=stops)
    decode = None
    if decoding:
      # With others waiting for a slot, a call ends when a quarter of its sequences has.
      quorum = -(-3 * len(decoding) // 4) if self._waiting else 1
      decode = self._slots.decode(decoding, steps=steps, quorum=quorum)
    resets, self._resets = tuple(self._resets), []
    return Plan(prefill, chunks, decode, tuple(decoding), resets)

  def apply(
    self,
    plan: Plan,
    prefilled: Prefilled | None,
    decoded: Decoded | None,
    *,
    version: str,
    now: float,
  ) -> list[Sequence]:
    """Takes the results of `plan`; returns the sequences that it finished.

    Args:
      plan: of the last call of `plan`, with nothing done in between.
      prefilled: rows of `plan.prefill`.
      decoded: columns are slots.
      version: of the weights that computed both.
      now: wall clock, seconds.
    """
    done: list[Sequence] = []

    def extend(sequence: Sequence, tokens: Seq[int], logprobs: Seq[float], top: Seq) -> int:
      added = results.extend(
        sequence,
        tokens,
        logprobs,
        top,
        stops=self._stops(sequence),
        match_stop=self._match_stop,
        version=version,
        now=now,
      )
      self.counters.generated += added
      if sequence.finish is not None:
        done.append(sequence)
      return added

    if decoded is not None:
      tokens, logprobs = decoded.tokens_NS.T.tolist(), decoded.logprobs_NS.T.tolist()
      lengths = decoded.lengths_S.tolist()
      for sequence in plan.decoding:
        slot = sequence.slot
        assert slot is not None
        count = lengths[slot]
        top = results.alternatives(decoded.top, sequence, slice(count), slot)
        # Fewer than were computed where the text ends the sequence: the rest is forgotten.
        added = extend(sequence, tokens[slot][:count], logprobs[slot], top)
        sequence.cached += added
        if decoded.experts_NLSA is not None:
          sequence.experts.append(decoded.experts_NLSA[:added, :, slot].copy())
    if prefilled is not None:
      tokens, logprobs = prefilled.tokens_R.tolist(), prefilled.logprobs_R.tolist()
      for row, chunk in enumerate(plan.chunks):
        sequence = chunk.sequence
        self._count(chunk, now)
        results.take_chunk(chunk, prefilled, row)
        tenancy.keep_experts(sequence, self.pages)
        if chunk.end < sequence.length:
          continue
        self._prefilling.remove(sequence)
        self._decoding.append(sequence)
        self._slots.start(sequence, self._stops(sequence))
        top = results.alternatives(prefilled.top, sequence, slice(row, row + 1))
        extend(sequence, [tokens[row]], [logprobs[row]], top)
    for sequence in done:
      sequence.finished = now
      self._release(sequence)
    return done

  def _count(self, chunk: Chunk, now: float) -> None:
    sequence, start, end = chunk
    if sequence.started is None:
      sequence.started = now
      self.counters.prompt += len(sequence.request.input_ids)
      self.counters.cached += sequence.cached_tokens
    self.counters.prefilled += end - start
    self.counters.reprefilled += max(0, min(end, sequence.lost) - start)

  def _admit(self, sequence: Sequence) -> bool:
    """Gives a sequence a slot and pages; False where there are too few."""
    request = sequence.request
    length, spare = sequence.length + 1, self.num_running
    if self._deterministic:
      length, spare = len(request.input_ids) + request.max_new_tokens, 0
    # What did not fit does not fit until something changes; looking a long prompt up is not free.
    situation = (sequence, self.pages.available, spare, self.pages.epoch)
    if situation == self._refused:
      return False
    if not tenancy.move_in(sequence, self.pages, length=length, spare=spare):
      self._refused = situation
      return False
    sequence.slot = self._free.pop()
    self._slots.set_table(sequence.slot, sequence.pages)
    self._prefilling.append(sequence)
    if request.penalizes:
      self._resets.append((sequence.slot, tuple(sequence.output_ids)))
    return True

  def _chunks(self) -> tuple[Chunk, ...]:
    """What the next prefill call computes, in order of arrival."""
    chunks: list[Chunk] = []
    waiting = len(self._prefilling)
    for sequence in self._prefilling:
      if len(chunks) == self._rows:
        break
      # A long prompt leaves some rows to those behind it, so that short ones need not wait.
      waiting -= 1
      room = max(1, self._rows - len(chunks) - min(waiting, self._rows // 4))
      # Where bits count, a token is computed at the same place of its chunk each time.
      align = self._chunk if self._deterministic else 1
      if not tenancy.pass_shared(sequence, self.pages, align=align):
        continue
      if sequence.started is None:
        sequence.cached_tokens = sequence.cached
      start = sequence.cached
      while start < sequence.length and room:
        end = min(start + self._chunk, sequence.length)
        chunks.append(Chunk(sequence, start, end))
        start, room = end, room - 1
      tenancy.announce(sequence, start, self.pages)
    return tuple(chunks)

  def _grow(self, steps: int) -> list[Sequence]:
    """Sees that every decoding sequence has pages for its next tokens; where there are none left,
    the youngest go back to the queue. Returns those that decode."""
    size = self.pages.page_size
    for sequence in list(self._decoding):
      if sequence.slot is None:
        continue
      wanted = min(steps, sequence.request.max_new_tokens - len(sequence.output_ids))
      last = sequence.length - 1 + wanted
      while len(sequence.pages) * size < last:
        taken = self.pages.take(1)
        if taken is not None:
          sequence.pages += taken
          self._slots.set_table(sequence.slot, sequence.pages)
        elif len(sequence.pages) * size >= sequence.length:
          break  # enough for one token at least
        else:
          youngest = max((*self._decoding, *self._prefilling), key=lambda s: s.received)
          self._retract(youngest)
          if youngest is sequence:
            break
      if sequence.slot is not None:
        room = len(sequence.pages) * size - (sequence.length - 1)
        self._slots.advance(sequence, min(wanted, room))
    return self._decoding

  def _stops(self, sequence: Sequence) -> frozenset[int]:
    own = sequence.request.stop_token_ids
    return self._eos | own if own else self._eos

  def _retract(self, sequence: Sequence) -> None:
    sequence.lost = max(sequence.lost, sequence.cached)
    self._release(sequence)
    sequence.cached = 0
    sequence.experts.clear()
    sequence.retractions += 1
    self.counters.retractions += 1
    if sequence.wants_scores:
      sequence.input_logprobs.clear()
      sequence.input_top.clear()
    self._waiting.appendleft(sequence)

  def _release(self, sequence: Sequence) -> None:
    """Takes slot and pages back."""
    slot = sequence.slot
    assert slot is not None
    group = self._decoding if sequence in self._decoding else self._prefilling
    group.remove(sequence)
    tenancy.move_out(sequence, self.pages, share_sampled=not self._deterministic)
    self._slots.clear(slot)
    self._free.append(slot)
    sequence.slot = None
