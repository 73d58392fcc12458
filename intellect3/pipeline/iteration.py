"""Batches by step number as a Grain iterator: resumable by index, prefetched, ended by an event.

Both sources of the pipeline (the RolloutLog and supervised examples) are a function of the step
number. This module turns such a function into a Grain iterator whose whole state is the next step,
which is saved beside the model (`training.checkpoint`).
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import grain
from grain import experimental

from intellect3.pipeline import packing


class Stop(Protocol):
  """What ends a wait: a `threading.Event`, or several of them as one."""

  def is_set(self) -> bool:
    """Whether to end."""
    ...

  def wait(self, timeout: float | None = None) -> bool:
    """Sleeps until set or until `timeout` seconds have passed; returns whether it is set."""
    ...


class AnyStop:
  """Set as soon as one of its events is."""

  def __init__(self, *events: threading.Event):
    self._events = events

  def is_set(self) -> bool:
    """Whether one of the events is set."""
    return any(event.is_set() for event in self._events)

  def wait(self, timeout: float | None = None) -> bool:
    """Sleeps until one is set or `timeout` seconds have passed; returns whether one is set."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not self.is_set():
      rest = 0.02 if deadline is None else min(0.02, deadline - time.monotonic())
      if rest <= 0.0:
        break
      self._events[0].wait(rest)
    return self.is_set()


MakeBatch = Callable[[int, Stop], packing.Batch | None]
"""The batch of a step; None when the stop was set before it could be made."""


class _StepIterator(grain.DatasetIterator):
  """Element n is the batch of step n; the state is the next step alone."""

  def __init__(self, make: MakeBatch, first: int, last: int | None, stop: Stop):
    super().__init__()
    self._make, self._last, self._stop = make, last, stop
    self._next_step = first

  def __next__(self) -> packing.Batch:
    if self._stop.is_set() or (self._last is not None and self._next_step > self._last):
      raise StopIteration
    batch = self._make(self._next_step, self._stop)
    if batch is None:
      raise StopIteration
    self._next_step += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    return {"next_step": self._next_step}

  def set_state(self, state: dict[str, Any]) -> None:
    self._next_step = int(state["next_step"])


class _StepDataset(grain.IterDataset):
  def __init__(self, make: MakeBatch, first: int, last: int | None, stop: Stop):
    super().__init__()
    self._arguments = (make, first, last, stop)

  def __iter__(self) -> _StepIterator:
    return _StepIterator(*self._arguments)


class BatchIterator(grain.DatasetIterator):
  """The pipeline's iterator: prefetches in a thread, knows its exact position, ends promptly.

  `get_state` speaks of the batches handed out, not of those prefetched. `close` (also as a context
  manager), or the stop event, ends a batch that is still being waited for; after `close` no thread
  is left.
  """

  def __init__(
    self,
    make: MakeBatch,
    *,
    first_step: int,
    last_step: int | None,
    stop: threading.Event,
    prefetch: int,
  ):
    self._closing = threading.Event()
    steps = _StepDataset(make, first_step, last_step, AnyStop(stop, self._closing))
    dataset = experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=prefetch)
    self._prefetched = iter(dataset)
    super().__init__(self._prefetched)

  def __next__(self) -> packing.Batch:
    self._assert_not_closed()
    return next(self._prefetched)

  def get_state(self) -> dict[str, Any]:
    """`{"next_step": n}`: the step whose batch the next call returns."""
    return self._prefetched.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a saved state; what was prefetched before is dropped."""
    self._closing.set()  # a batch that is being waited for would hold the thread
    try:
      self._prefetched.set_state(state)
    finally:
      self._closing.clear()

  def close(self) -> None:
    """Ends the thread and waits for it; safe to call again."""
    self._closing.set()
    super().close()

  def __enter__(self) -> "BatchIterator":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
