"""How far a conversion is: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  MofNCompleteColumn,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.progress import Progress as Bar

_EVERY = 0.1
"""Share of the whole after which a line is printed."""


class Progress:
  """Counts bytes and shows them on stderr; use it as a context."""

  def __init__(self, what: str, total: int, *, unit: str = "GB"):
    """Shows nothing yet.

    Args:
      what: is done.
      total: bytes of all tensors, or how many of another unit.
      unit: `GB`, or what is counted.
    """
    self._unit, self._scale = unit, 1e9 if unit == "GB" else 1.0
    self._what, self._total, self._done, self._said = what, max(total, 1), 0, 0.0
    self._lock = threading.Lock()
    self._began = time.monotonic()
    self._bar: Bar | None = None
    console = Console(stderr=True)
    if console.is_terminal:
      self._bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if unit == "GB" else (MofNCompleteColumn(),)),
        TimeRemainingColumn(),
        console=console,
      )
      self._task = self._bar.add_task(what, total=self._total)

  def __enter__(self) -> "Progress":
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()

  def add(self, name: str, size: int) -> None:
    """Tells of a tensor that is done; from any thread."""
    with self._lock:
      self._done += size
      if self._bar is not None:
        self._bar.update(self._task, completed=self._done, description=f"{self._what} {name}")
        return
      share = self._done / self._total
      if share - self._said >= _EVERY or (self._done >= self._total > 0 and self._said < 1.0):
        self._said = 1.0 if self._done >= self._total else share
        seconds = time.monotonic() - self._began
        print(
          f"{self._what}: {self._done / self._scale:.3g} of {self._total / self._scale:.3g} "
          f"{self._unit}, {seconds:.0f} s",
          file=sys.stderr,
          flush=True,
        )
