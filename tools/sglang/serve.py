"""Runs a real SGLang server on this machine's CPU, in the foreground.

    python -m tools.sglang.serve --model DIR [--port P] [--host H] [--directory DIR]
        [--timeout SECONDS] [-- SGLANG_FLAG ...]

What follows `--` goes to SGLang as it is and wins over the flags given here. The server is ready
when `/health` answers, 20 to 50 s after the start on two cores; until then a line every few seconds
says what it is doing. Ctrl-C or SIGTERM ends it with everything it started: SIGTERM to its process
group, SIGKILL after a few seconds, since SGLang may linger over a minute in diagnostics.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import TracebackType

from intellect3 import supervisor
from intellect3.inference import launch
from tools.sglang import environment

CPU_FLAGS = (
  *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
  *("--disable-overlap-schedule", "--skip-server-warmup", "--enable-metrics"),
  "--sleep-on-idle",  # else an idle server burns a core
  *("--context-length", "1024", "--max-total-tokens", "16384", "--max-running-requests", "16"),
  *("--mem-fraction-static", "0.1", "--weight-version", "0"),
)
"""What a tiny model on a CPU needs: no kernel build, float32 as the trainer's, a small cache."""

PROBE_SECONDS = 0.5
SAY_SECONDS = 5.0
STOP_SECONDS = 5.0


class ServerNotStarted(Exception):
  """The server ended, or did not answer in time; the message has the end of its log."""


def command(
  directory: pathlib.Path, model: pathlib.Path, host: str, port: int, flags: Sequence[str] = ()
) -> list[str]:
  """SGLang's argument vector; `flags` come last and so win."""
  python = str(environment.python_of(directory))
  arguments = ["--model-path", str(model), "--host", host, "--port", str(port)]
  return [python, "-m", "sglang.launch_server", *arguments, *CPU_FLAGS, *flags]


class Server:
  """One SGLang server, from its start to the end of its process group.

  A context manager: leaving it stops the server. It dies with the process that started it.
  """

  def __init__(
    self,
    model: pathlib.Path,
    *,
    port: int,
    log: pathlib.Path,
    flags: Sequence[str] = (),
    host: str = "127.0.0.1",
    directory: pathlib.Path = environment.DEFAULT_DIRECTORY,
  ):
    """Starts the process; `wait` tells when it answers.

    Args:
      model: model directory in Hugging Face's layout.
      port: where it listens.
      log: file that takes what it says.
      flags: SGLang's own, over `CPU_FLAGS`.
      host: address it listens on.
      directory: where SGLang is installed.

    Raises:
      ValueError: the model is none, or the port is taken.
      ServerNotStarted: SGLang is not installed there.
    """
    if not (model / "config.json").is_file():
      raise ValueError(f"model: expected a directory with a config.json, got {model}")
    launch.check_port_free(host, port)
    if reason := environment.why_not_ready(directory):
      raise ServerNotStarted(reason)
    self.url = f"http://{host}:{port}"
    self.log = log
    directory = directory.absolute()
    leash = [sys.executable, "-m", "intellect3.leash", str(os.getpid())]
    with log.open("wb") as out:
      self.process = subprocess.Popen(
        [*leash, *command(directory, model.absolute(), host, port, flags)],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=environment.variables(directory),
        start_new_session=True,
      )

  def __enter__(self) -> "Server":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.stop()

  def wait(self, timeout_seconds: float, say: Callable[[str], None] | None = None) -> None:
    """Waits until `/health` answers.

    Args:
      timeout_seconds: for the whole start.
      say: gets a line of progress every few seconds.

    Raises:
      ServerNotStarted: the process ended, or time is up.
    """
    started = time.monotonic()
    said = 0.0
    while True:
      seconds = time.monotonic() - started
      if self.process.poll() is not None:
        raise ServerNotStarted(f"ended with {self.process.returncode}: {self._last_words()}")
      if seconds > timeout_seconds:
        raise ServerNotStarted(f"no answer after {timeout_seconds:g} s: {self._last_words()}")
      if _healthy(self.url):
        if say:
          say(f"ready after {seconds:.0f} s: {self.url}")
        return
      if say and seconds - said >= SAY_SECONDS:
        said = seconds
        say(f"{seconds:3.0f} s: {_last_line(self.log)}")
      time.sleep(PROBE_SECONDS)

  def kill(self) -> None:
    """SIGKILL to the whole group at once, as a machine that is lost."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()

  def stop(self) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it after `STOP_SECONDS`."""
    supervisor.end_all([self.process], patience_seconds=STOP_SECONDS)

  def _last_words(self) -> str:
    return f"{supervisor.last_words(self.log)} (log: {self.log})"


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m tools.sglang.serve",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument("--port", type=int, default=30000)
  parser.add_argument("--host", default="127.0.0.1")
  parser.add_argument(
    "--directory",
    type=pathlib.Path,
    default=environment.DEFAULT_DIRECTORY,
    help="where SGLang is installed",
  )
  parser.add_argument("--log", type=pathlib.Path, help="default: a file that stays on failure")
  parser.add_argument("--timeout", type=float, default=240.0, help="seconds until it must answer")
  parser.add_argument("flags", nargs="*", metavar="SGLANG_FLAG", help="after --; see SGLang's help")
  arguments = parser.parse_args()
  signal.signal(signal.SIGTERM, _interrupt)
  log = arguments.log or pathlib.Path(tempfile.mkdtemp(prefix="sglang-")) / "log"
  try:
    server = Server(
      arguments.model,
      port=arguments.port,
      log=log,
      flags=arguments.flags,
      host=arguments.host,
      directory=arguments.directory,
    )
    with server:
      server.wait(arguments.timeout, lambda line: print(line, file=sys.stderr, flush=True))
      _follow(server)
      sys.exit(f"tools.sglang.serve: SGLang ended with {server.process.returncode} (log: {log})")
  except (ValueError, ServerNotStarted) as error:
    sys.exit(f"tools.sglang.serve: {error}")
  except KeyboardInterrupt:
    if arguments.log is None:
      shutil.rmtree(log.parent)
    sys.exit(130)


def _follow(server: Server) -> None:
  """Copies the log to stdout until the process ends."""
  with server.log.open("rb") as log:
    while True:
      ended = server.process.poll() is not None
      sys.stdout.buffer.write(log.read())
      sys.stdout.flush()
      if ended:
        return
      time.sleep(PROBE_SECONDS)


def _interrupt(number: int, frame: object) -> None:
  raise KeyboardInterrupt


def _healthy(url: str) -> bool:
  try:
    with urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
      return bool(answer.status == 200)
  except (urllib.error.URLError, OSError):
    return False


def _last_line(log: pathlib.Path) -> str:
  lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
  return lines[-1].strip()[:200] if lines else "starting"


if __name__ == "__main__":
  main()
