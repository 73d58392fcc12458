"""Metrics of a run: one JSON line and one set of TensorBoard scalars per step.

Level 0 of the ring, without jax: every process writes its own `metrics/NAME.jsonl`, and the
console, the plots and `summary.json` are made by reading these files. A process that dies may leave
half a line at the end; readers skip it and a resumed writer cuts it off.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np


def metrics_path(run_dir: str | os.PathLike[str], name: str) -> pathlib.Path:
  """The JSON-lines file of the process `name` in a run directory."""
  return pathlib.Path(run_dir) / "metrics" / f"{name}.jsonl"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads every whole row of a metrics file, in file order.

  Args:
    path: a `.jsonl` file; a missing one holds no rows.

  Returns:
    One dict per line. A last line that was not finished (no newline, or not JSON yet) is left out.

  Raises:
    ValueError: a line before the last is not JSON: the file is broken, not half written.
  """
  path = pathlib.Path(path)
  return [row for row, _ in _whole_rows(path)] if path.exists() else []


def _whole_rows(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
  """The whole rows of a file, each with the bytes of its line."""
  rows = []
  lines = path.read_bytes().split(b"\n")
  for number, line in enumerate(lines[:-1], start=1):
    try:
      rows.append((json.loads(line), line + b"\n"))
    except ValueError as error:
      raise ValueError(f"{path}: line {number}: expected a JSON object, got {line!r}") from error
  return rows


class MetricsWriter:
  """Writes the rows of one process; every row is on disk when `write` returns.

  Rows go to `RUN/metrics/NAME.jsonl`, scalars also to `RUN/metrics/tensorboard/NAME`. An existing
  file is continued: call `truncate_after` first where steps will be done again.
  """

  def __init__(self, run_dir: str | os.PathLike[str], name: str):
    self.path = metrics_path(run_dir, name)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    _cut(self.path, lambda row: True)
    self._file = open(self.path, "ab")  # noqa: SIM115 - it lives as long as the writer
    self._board_dir = self.path.parent / "tensorboard" / name
    # Imported by who writes alone: it loads torch where that is installed.
    from tensorboardX import SummaryWriter

    self._make_board = SummaryWriter
    self._board: Any = None
    self._purge_step: int | None = None

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends the row of `step`.

    Args:
      step: written as the key `step`, first in the row.
      values: numbers, strings, booleans, arrays (written as lists) or nested mappings; a number
        that is not finite is written as null. Scalars also go to TensorBoard.
    """
    row = {"step": int(step), **{name: _plain(value) for name, value in values.items()}}
    self._file.write(json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    self._file.flush()
    if self._board is None:
      self._board = self._make_board(str(self._board_dir), purge_step=self._purge_step)
    for name, value in row.items():
      if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
        self._board.add_scalar(name, value, step)

  def truncate_after(self, step: int) -> None:
    """Removes the rows of steps later than `step`, so that a resumed run writes each step once.

    Raises:
      RuntimeError: a row has been written already; cut before writing.
    """
    if self._board is not None:
      raise RuntimeError("MetricsWriter.truncate_after: expected before the first write, got after")
    self._file.close()
    _cut(self.path, lambda row: row["step"] <= step)
    self._file = open(self.path, "ab")  # noqa: SIM115
    self._purge_step = step + 1

  def close(self) -> None:
    """Closes both files; safe to call again."""
    self._file.close()
    if self._board is not None:
      self._board.close()
      self._board = None

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()


def _cut(path: pathlib.Path, keep: Any) -> None:
  """Rewrites a file with only its whole rows that `keep` accepts, if that changes it."""
  if not path.exists():
    return
  kept = b"".join(line for row, line in _whole_rows(path) if keep(row))
  if len(kept) != path.stat().st_size:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(kept)
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
  """Turns a value into what JSON holds; NaN and infinities become None."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return _plain(np.asarray(value).tolist())
