"""A side of a benchmark in a process of its own: asked by a line of JSON, answers with one."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Side:
  """The process of one side, from its start until `close`."""

  def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]):
    """Starts `python -m` with these arguments and waits for its first answer, `first`."""
    self._process = subprocess.Popen(
      [sys.executable, "-m", *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, **environment},
    )
    self.first = self._answer()

  def ask(self, question: Any) -> dict[str, Any]:
    """Sends a line and returns the answer to it."""
    assert self._process.stdin is not None
    self._process.stdin.write(json.dumps(question) + "\n")
    self._process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    """Ends the process; call it in every case."""
    self._process.communicate()

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"benchmark side ended early, exit code {self._process.wait()}")
    return json.loads(line)


def peak_mib(pid: int | str = "self") -> float:
  """High-water mark of a process's resident set since the last reset, in MiB."""
  for line in pathlib.Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) / 1024
  raise RuntimeError(f"/proc/{pid}/status: expected a line VmHWM, got none")
