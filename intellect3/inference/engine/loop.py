"""The engine's thread: takes commands between steps, runs steps, hands out what finished.

The HTTP side never touches the batcher or the device. It sends closures through an inbox; each
runs on the engine's thread between two steps, so that pauses and weight swaps fall between tokens.

Paused, nothing is computed, and requests that arrive wait. What a weight update does to running
requests:

- paused `in_place`: they keep their cache and go on with the new weights (`flush_cache` false), or
  the update is refused and nothing changes (`flush_cache` true).
- paused `retract`: they were sent back to the queue and prefill again, under the new weights.
- not paused: the update waits until those that came before it have finished; those that come
  after it wait for it.
"""

import asyncio
import concurrent.futures
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol, TypeVar

from intellect3.inference.engine.batcher import Batcher, Plan
from intellect3.inference.engine.request import Request
from intellect3.inference.engine.sequence import Sequence
from intellect3.inference.engine.steps import Decoded, Prefilled

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_MODES = ("abort", "in_place", "retract")


class StepDevice(Protocol):
  """What the loop needs of `device.Device`."""

  def run(self, plan: Plan) -> tuple[Prefilled | None, Decoded | None]: ...

  def swap(self, params: Any) -> None: ...

  def release(self, tags: Collection[str]) -> None: ...

  def resume(self, tags: Collection[str]) -> None: ...

  @property
  def released(self) -> frozenset[str]: ...


class Event(NamedTuple):
  """What became of a sequence in a step.

  Attributes:
    sequence: only to be read, up to `length` of its output.
    length: tokens sampled so far.
    finished: whether it is at its end; progress before that is told only of streamed requests.
  """

  sequence: Sequence
  length: int
  finished: bool


class Weights(NamedTuple):
  """The served weights: where they came from and the version stamped on their tokens."""

  path: str
  version: str


class UpdateRefused(Exception):
  """A weight update that cannot be done now; the old weights go on serving."""


class _Update(NamedTuple):
  params: Any
  weights: Weights
  flush_cache: bool
  abort_running: bool
  done: concurrent.futures.Future[None]


def _promise() -> concurrent.futures.Future[Any]:
  """A future that its awaiter cannot cancel: a client that goes away must not stop a command."""
  promise: concurrent.futures.Future[Any] = concurrent.futures.Future()
  promise.set_running_or_notify_cancel()
  return promise


class Engine:
  """Owns the batcher, the device and the thread that drives them."""

  def __init__(
    self,
    device: StepDevice,
    batcher: Batcher,
    weights: Weights,
    *,
    seed: int,
    on_events: Callable[[list[Event]], None],
    on_failure: Callable[[BaseException], None],
  ):
    """Makes an engine that does not run yet.

    Args:
      device: warmed up.
      batcher: empty.
      weights: what the device holds.
      seed: of the generator that gives seeds to requests without one.
      on_events: called on the engine's thread with what a step brought; must not block.
      on_failure: called on the engine's thread when it dies of an exception.
    """
    self.weights = weights
    self.paused = False
    self.steps = 0
    self.prefill_calls = 0
    self.decode_calls = 0
    self._last_step = time.monotonic()
    self._device, self._batcher = device, batcher
    self._seeds = random.Random(seed)
    self._on_events, self._on_failure = on_events, on_failure
    self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    self._stopping = False
    self._update: _Update | None = None
    self._held: list[Sequence] = []
    self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self, timeout: float = 10.0) -> bool:
    """Ends the thread after the step it is in; returns whether it ended in time."""
    self._inbox.put(self._stop)
    self._thread.join(timeout)
    return not self._thread.is_alive()

  @property
  def alive(self) -> bool:
    return self._thread.is_alive()

  @property
  def halted(self) -> bool:
    """Whether nothing is computed for now: paused, or memory is released."""
    return self.paused or bool(self._device.released)

  def stalled(self, seconds: float) -> bool:
    """Whether there is work that nothing holds back, and no step has ended for that long."""
    idle = self.halted or self._batcher.idle
    return not idle and time.monotonic() - self._last_step > seconds

  @property
  def updating(self) -> bool:
    """Whether a weight update waits for running requests; new ones are held back meanwhile."""
    return self._update is not None

  @property
  def num_running(self) -> int:
    return self._batcher.num_running

  @property
  def num_waiting(self) -> int:
    return self._batcher.num_waiting + len(self._held)

  def stats(self) -> dict[str, int | float]:
    """Counters since the start and the state of the moment; read without a lock, so that figures
    may be a step apart. Tokens unless the name says otherwise."""
    counters, pages = self._batcher.counters, self._batcher.pages
    size = pages.page_size
    return {
      "running_requests": self.num_running,
      "waiting_requests": self.num_waiting,
      "generated_tokens": counters.generated,
      "prompt_tokens": counters.prompt,
      "cached_tokens": counters.cached,
      "prefilled_tokens": counters.prefilled,
      "reprefilled_tokens": counters.reprefilled,
      "retractions": counters.retractions,
      "steps": self.steps,
      "prefill_calls": self.prefill_calls,
      "decode_calls": self.decode_calls,
      "used_tokens": (pages.count - pages.available) * size,
      "prefix_tokens": pages.unused * size,
      "max_total_tokens": pages.count * size,
      "paused": self.paused,
      "updating": self.updating,
    }

  def submit(self, request: Request) -> Sequence:
    """Queues a request; what comes of it is handed to `on_events`."""
    sequence = Sequence(request, seed=0, received=time.time())
    self._inbox.put(lambda: self._submit(sequence))
    return sequence

  def abort(self, rid: str | None = None) -> "asyncio.Future[int]":
    """Ends the request of that name, or all, with what they have; gives how many."""
    return self._call(lambda: self._abort(rid))

  def pause(self, mode: str) -> "asyncio.Future[None]":
    """Stops stepping: `abort` ends every request, `retract` queues the running ones again,
    `in_place` keeps them where they are."""
    if mode not in PAUSE_MODES:
      raise ValueError(f"mode: expected one of {', '.join(PAUSE_MODES)}, got {mode!r}")
    return self._call(lambda: self._pause(mode))

  def resume(self) -> "asyncio.Future[None]":
    return self._call(self._resume)

  def flush_cache(self) -> "asyncio.Future[bool]":
    """Forgets every prefix; False, and nothing is done, while requests run or wait."""
    return self._call(self._flush_cache)

  def release_memory(self, tags: Collection[str]) -> "asyncio.Future[None]":
    """Frees the memory of the cache (`kv_cache`), the weights, or both; ValueError through the
    future while requests hold cache. Nothing runs until `resume_memory`."""
    return self._call(lambda: self._release_memory(tags))

  def resume_memory(self, tags: Collection[str]) -> "asyncio.Future[None]":
    """Takes back what `release_memory` freed; the cache comes back empty."""
    return self._call(lambda: self._device.resume(tags))

  def update(
    self, params: Any, weights: Weights, *, flush_cache: bool, abort_running: bool
  ) -> "asyncio.Future[None]":
    """Swaps the weights as the module's table says; one update at a time.

    Args:
      params: from `Device.prepare`.
      weights: their path and version.
      flush_cache: whether running requests may not keep cache of the old weights.
      abort_running: whether to end every request first.

    Raises (through the future):
      UpdateRefused: paused in place with running requests, and flush_cache was asked.
    """
    done: concurrent.futures.Future[None] = _promise()
    update = _Update(params, weights, flush_cache, abort_running, done)
    self._inbox.put(lambda: self._begin_update(update))
    return asyncio.wrap_future(done)

  def _call(self, fn: Callable[[], T]) -> "asyncio.Future[T]":
    done: concurrent.futures.Future[T] = _promise()

    def command() -> None:
      try:
        done.set_result(fn())
      except ValueError as error:
        done.set_exception(error)

    self._inbox.put(command)
    return asyncio.wrap_future(done)

  # Everything below runs on the engine's thread.

  def _main(self) -> None:
    try:
      while not self._stopping:
        self._take_commands()
        self._finish_update()
        plan = None if self.halted or self._stopping else self._batcher.plan()
        if plan is not None:
          self._step(plan)
    except BaseException as error:
      log.exception("the engine's thread died")
      self._on_failure(error)

  def _take_commands(self) -> None:
    nothing_to_do = self._update is None and (self.halted or self._batcher.idle)
    try:
      command = self._inbox.get(block=nothing_to_do)
      while True:
        if self.halted or self._batcher.idle:
          self._last_step = time.monotonic()  # no step was due until this command
        command()
        command = self._inbox.get_nowait()
    except queue.Empty:
      return

  def _step(self, plan: Plan) -> None:
    prefilled, decoded = self._device.run(plan)
    done = self._batcher.apply(
      plan, prefilled, decoded, version=self.weights.version, now=time.time()
    )
    self.steps += 1
    self.prefill_calls += plan.prefill is not None
    self.decode_calls += plan.decode is not None
    self._last_step = time.monotonic()
    self._tell(plan, done)

  def _tell(self, plan: Plan, done: list[Sequence]) -> None:
    """Hands out what finished, and how far the streamed ones are."""
    events = [Event(sequence, len(sequence.output_ids), True) for sequence in done]
    touched = (*plan.decoding, *(chunk.sequence for chunk in plan.chunks))
    streamed = {id(sequence): sequence for sequence in touched if sequence.request.stream}
    events += [
      Event(sequence, len(sequence.output_ids), False)
      for sequence in streamed.values()
      if sequence.finish is None and sequence.output_ids
    ]
    if events:
      self._on_events(events)

  def _stop(self) -> None:
    self._stopping = True

  def _submit(self, sequence: Sequence) -> None:
    asked = sequence.request.seed
    sequence.seed = self._seeds.getrandbits(64) if asked is None else asked
    if self._update is None:
      self._batcher.add(sequence)
    else:
      self._held.append(sequence)

  def _abort(self, rid: str | None) -> int:
    ended = self._batcher.abort(rid)
    for sequence in [s for s in self._held if rid is None or s.request.rid == rid]:
      # Held requests are not in the batcher yet; pass them through it, so that they end alike.
      self._held.remove(sequence)
      self._batcher.add(sequence)
      ended += self._batcher.abort(sequence.request.rid)
    now = time.time()
    for sequence in ended:
      sequence.finished = now
    if ended:
      self._on_events([Event(sequence, len(sequence.output_ids), True) for sequence in ended])
    return len(ended)

  def _pause(self, mode: str) -> None:
    self.paused = True
    if mode == "abort":
      self._abort(None)
    elif mode == "retract":
      self._batcher.retract()

  def _resume(self) -> None:
    self.paused = False

  def _flush_cache(self) -> bool:
    if not self._batcher.idle:
      return False
    self._batcher.forget_prefixes()
    return True

  def _release_memory(self, tags: Collection[str]) -> None:
    if self._batcher.num_running:
      raise ValueError(
        f"release_memory_occupation: expected no running requests, got {self._batcher.num_running}"
      )
    # What was computed is gone with the cache, or with the weights that may come back changed.
    self._batcher.forget_prefixes()
    self._device.release(tags)

  def _begin_update(self, update: _Update) -> None:
    if update.abort_running:
      self._abort(None)
    self._update = update

  def _finish_update(self) -> None:
    update = self._update
    if update is None or not (self.halted or self._batcher.idle):
      return
    running = self._batcher.num_running
    refused = update.flush_cache and running > 0
    if not refused:
      self._device.swap(update.params)
      self._batcher.forget_prefixes()
      self.weights = update.weights
    self._update = None
    for sequence in self._held:
      self._batcher.add(sequence)
    self._held.clear()
    # Told last: whoever hears of it finds the engine as it is said to be.
    if refused:
      update.done.set_exception(
        UpdateRefused(
          f"Weights were not updated: flush_cache was asked and {running} requests are running, "
          "paused in place. Pause with retract, or set flush_cache to false."
        )
      )
    else:
      update.done.set_result(None)
