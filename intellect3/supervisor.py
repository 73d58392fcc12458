"""Starts the processes of a run on one machine, watches them, and ends them all together.

A child that fails ends the run: the others are ended, and the failure says which child, why and
where its log is. Of the children of a group some may fail while one lives, and a child may be
started again so many times, after a wait that grows. Every child leads its own process group and
dies with the supervisor (`leash`), so no process outlives a run, however the run ends.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from intellect3.distributed import meeting, watchdog

RESTART_SECONDS = 0.5
"""Before a child is started again for the first time; doubles."""


class ChildFailed(RuntimeError):
  """A process of the run died; the message names it, the reason and its log."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child:
  """A process of the run.

  Attributes:
    name: for people, and its log's name.
    command: argument vector.
    log: file that takes its stdout and stderr.
    ends_run: whether the run waits for its end; another's end before that is a failure.
    environment: added to this process's environment.
    group: children of one group may fail while another of it lives; None: this one may not.
    restarts: how many times it is started again after it failed.
  """

  name: str
  command: Sequence[str]
  log: pathlib.Path
  ends_run: bool
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  group: str | None = None
  restarts: int = 0


def supervise(
  children: Sequence[Child],
  *,
  tick: Callable[[], None],
  interval_seconds: float = 0.2,
  patience_seconds: float = 10.0,
) -> None:
  """Runs the children until every one that `ends_run` has ended with exit code 0.

  Args:
    children: started in this order.
    tick: called between looks at the children (the console).
    interval_seconds: how often to look.
    patience_seconds: from SIGTERM to SIGKILL, at the end.

  Raises:
    ChildFailed: a child ended with another exit code, or before it should.
    KeyboardInterrupt: SIGINT or SIGTERM came; every child has been ended.
  """
  processes: dict[str, subprocess.Popen[bytes]] = {}
  lost: set[str] = set()  # those that the run goes on without
  due: dict[str, float] = {}  # when those that failed are started again
  starts = {child.name: 1 for child in children}
  with _terminate_as_interrupt():
    try:
      for child in children:
        processes[child.name] = _start(child)
      while True:
        for child in children:
          if child.name in due:
            if time.monotonic() >= due[child.name]:
              del due[child.name]
              processes[child.name] = _start(child)
            continue
          code = processes[child.name].poll()
          if child.name in lost or code is None or (code == 0 and child.ends_run):
            continue
          _signal_group(processes[child.name], signal.SIGKILL)  # what it may have left behind
          if starts[child.name] <= child.restarts:
            wait = RESTART_SECONDS * 2.0 ** (starts[child.name] - 1)
            again = f"started again in {wait:g} s"
            print(f"{_obituary(child, code)}: {again}", file=sys.stderr, flush=True)
            starts[child.name] += 1
            due[child.name] = time.monotonic() + wait
            continue
          peers = [other for other in children if child.group and other.group == child.group]
          if any(o.name in due or processes[o.name].poll() is None for o in peers):
            print(f"{_obituary(child, code)}: the run goes on", file=sys.stderr, flush=True)
            lost.add(child.name)
            continue
          # The death of one often breaks its peers: name the one that failed by itself.
          time.sleep(interval_seconds)
          raise ChildFailed(_obituary(*_first_cause(child, children, processes)))
        if all(processes[child.name].poll() == 0 for child in children if child.ends_run):
          return
        tick()
        time.sleep(interval_seconds)
    finally:
      end_all(list(processes.values()), patience_seconds=patience_seconds)
      tick()


def _start(child: Child) -> subprocess.Popen[bytes]:
  child.log.parent.mkdir(parents=True, exist_ok=True)
  with child.log.open("ab") as log:
    return subprocess.Popen(
      [sys.executable, "-m", "intellect3.leash", str(os.getpid()), *child.command],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **child.environment},
      start_new_session=True,
    )


def end_all(processes: Sequence[subprocess.Popen[bytes]], *, patience_seconds: float) -> None:
  """SIGTERM to every process group, then SIGKILL to what is left after `patience_seconds`."""
  for process in processes:
    if process.poll() is None:
      _signal_group(process, signal.SIGTERM)
  deadline = time.monotonic() + patience_seconds
  for process in processes:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(max(0.0, deadline - time.monotonic()))
  for process in processes:
    _signal_group(process, signal.SIGKILL)  # also what a dead leader left behind in its group
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, number)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
  """SIGTERM ends the run as Ctrl-C does."""

  def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

  previous = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)


def _first_cause(
  found: Child, children: Sequence[Child], processes: Mapping[str, subprocess.Popen[bytes]]
) -> tuple[Child, int]:
  """Of the children that may not fail and did, the one that the others most likely failed of.

  Whoever was killed, or ended by its watchdog, was so by itself. A peer that loses it says so, or
  jax's runtime aborts.
  """

  def rank(code: int) -> int:
    if code == watchdog.EXIT_STALLED or (code < 0 and code != -signal.SIGABRT):
      return 0
    return 1 if code > 0 and code != meeting.EXIT_LOST else 2

  failed = [(found, processes[found.name].poll() or 0)]
  for child in children:
    code = processes[child.name].poll()
    if child is not found and child.group is None and not child.restarts and code:
      failed.append((child, code))
  return min(failed, key=lambda each: rank(each[1]))


def _obituary(child: Child, code: int) -> str:
  if code < 0:  # whoever was killed has not logged why
    return f"{child.name} was killed by {signal.Signals(-code).name} (log: {child.log})"
  how = f"ended with exit code {code}" if code else "ended before the run did"
  return f"{child.name} {how}: {last_words(child.log)} (log: {child.log})"


def last_words(log: pathlib.Path) -> str:
  """The last line of a log that says what went wrong, or its last line at all."""
  try:
    lines = log.read_text(errors="replace").splitlines()[-200:]
  except OSError:
    return "no log"
  lines = [line.strip() for line in lines if line.strip()]
  for line in reversed(lines):
    head = line.split(" ", 1)[0].rstrip(":")
    if head.endswith(("Error", "Exception", "RunFailed")) or "error:" in line.lower():
      return line[:400]
  return lines[-1][:400] if lines else "its log is empty"
