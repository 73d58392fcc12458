"""A watchdog over one process: no progress for too long ends it, with every thread's stack.

Place in the ring: the trainer and supervised runs tell it what they begin. A collective that one
process never enters leaves the others in it for ever, alive and silent; this is what says so. No
jax.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

EXIT_STALLED = 74
"""Exit code of a process that its watchdog ended."""

WAITING = "waiting"
"""The phase that may last: for a batch that others make."""


class Watchdog:
  """Watches over what the process says it does; closed by the end of `watched`."""

  def __init__(self, name: str, stall_seconds: float) -> None:
    """Begins in the phase `starting`.

    Args:
      name: of the process, for people.
      stall_seconds: how long a phase may last, `WAITING` excepted.
    """
    self._name = name
    self._stall_seconds = stall_seconds
    self._now = ("starting", 0, time.monotonic())
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._thread.start()

  def enter(self, phase: str, step: int) -> None:
    """The phase before is done; this one begins, and with it the count."""
    self._now = (phase, step, time.monotonic())

  def close(self) -> None:
    """Ends the watch."""
    self._closed.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._stall_seconds / 4)):
      phase, step, began = self._now
      stalled = time.monotonic() - began
      if phase != WAITING and stalled > self._stall_seconds:
        self._end(phase, step, stalled)

  def _end(self, phase: str, step: int, stalled: float) -> None:
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    print(
      f"error: {self._name}: step {step}: no progress in {phase} for {stalled:.0f} s "
      f"(stall_seconds = {self._stall_seconds:g}); stacks of all threads above",
      file=sys.stderr,
      flush=True,
    )
    os._exit(EXIT_STALLED)


@contextlib.contextmanager
def watched(name: str, stall_seconds: float) -> Iterator[Watchdog]:
  """A watchdog for the length of a block."""
  watchdog = Watchdog(name, stall_seconds)
  try:
    yield watchdog
  finally:
    watchdog.close()
