"""The live view of a run: phase, step, reward, staleness, mismatch KL, speed and time left.

It only reads the run's files, so it shows a run on this machine or, on a shared file system, one
elsewhere. Without a terminal it prints plain lines.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from intellect3 import summary, telemetry

PLAIN_SECONDS = 5.0
"""Least time between two plain lines of the same phase."""


def _newest(path: pathlib.Path, window: int = 1 << 16) -> Mapping[str, Any]:
  """The newest whole row of a metrics file, {} where there is none; reads only the file's end."""
  try:
    with path.open("rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - window))
      lines = file.read().split(b"\n")[:-1]
  except FileNotFoundError:
    return {}
  return json.loads(lines[-1]) if lines else {}


class Console:
  """Shows a run until it is closed; `tick` as often as you like."""

  def __init__(self, run_dir: pathlib.Path, steps: int) -> None:
    self._run_dir = run_dir
    self._steps = steps
    self._console = RichConsole()
    self._live = (
      Live(console=self._console, refresh_per_second=4, transient=True)
      if self._console.is_terminal
      else None
    )
    self._started = time.monotonic()
    self._training_since: tuple[float, int] | None = None
    self._printed = ("", 0.0)
    if self._live is not None:
      self._live.start()

  def tick(self) -> None:
    """Looks at the run's files and shows what changed."""
    view = self._view()
    if self._live is not None:
      self._live.update(_table(view, self._steps))
      return
    phase, at = self._printed
    now = time.monotonic()
    if view["phase"] != phase or now - at >= PLAIN_SECONDS:
      self._printed = (view["phase"], now)
      text = "  ".join(f"{key} {value}" for key, value in view.items() if value not in ("", None))
      print(text, file=sys.stdout, flush=True)

  def close(self) -> None:
    """Leaves the terminal as it was."""
    if self._live is not None:
      self._live.stop()
      self._live = None

  def _view(self) -> dict[str, Any]:
    trainer = _newest(telemetry.metrics_path(self._run_dir, "trainer"))
    orchestrator = _newest(telemetry.metrics_path(self._run_dir, "orchestrator"))
    phase = summary.read_status(self._run_dir).get("phase", "starting")
    step = int(trainer.get("step", 0))
    now = time.monotonic()
    if phase == "training" and self._training_since is None:
      self._training_since = (now, step)
    left = ""
    if self._training_since is not None and step > self._training_since[1]:
      since, first = self._training_since
      left = _duration((now - since) / (step - first) * (self._steps - step))
    return {
      "phase": phase,
      "elapsed": _duration(now - self._started),
      "step": f"{step}/{self._steps}",
      "reward": _number(orchestrator.get("reward"), 3),
      "staleness": _number(orchestrator.get("staleness_mean"), 2),
      "mismatch_kl": _number(trainer.get("mismatch_kl"), 6),
      "generated_tok/s": _number(orchestrator.get("sampled_tokens_per_second"), 0),
      "trained_tok/s": _number(trainer.get("trained_tokens_per_second"), 0),
      "left": left,
    }


def _table(view: Mapping[str, Any], steps: int) -> Table:
  table = Table.grid(padding=(0, 2))
  step = int(str(view["step"]).partition("/")[0])
  table.add_row("[bold]" + view["phase"], ProgressBar(total=steps, completed=step, width=40))
  for key, value in view.items():
    if key != "phase":
      table.add_row(f"[dim]{key.replace('_', ' ')}", str(value))
  return table


def _number(value: float | None, digits: int) -> str:
  return "" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f"{minutes}:{seconds:02d}"
