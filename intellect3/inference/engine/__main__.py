"""The engine's command line: `python -m intellect3.inference.engine --model DIR --port P`.

Exit codes: 0 after SIGTERM or SIGINT, 2 with one line on stderr when it cannot start (busy port,
broken model directory, bad flag), 1 when it dies.
"""

import asyncio
import ctypes
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

from intellect3 import compilation_cache
from intellect3.inference.engine import flags

SWITCH_INTERVAL_SECONDS = 2e-4
"""Under load the event loop's thread is always busy; at Python's 5 ms the engine's thread would
wait that long for the interpreter after every device call."""

LISTEN_BACKLOG = 4096
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
  """Runs a server until it is told to end; returns the exit code."""
  settings = flags.parse(arguments)
  # Until the server is up there is nothing to tidy, and a compile holds back Python's handlers.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  if settings.die_with_parent:
    _die_with_parent()
  logging.basicConfig(
    level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
  )
  sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
  try:
    listener = _bind(settings.host, settings.port)
  except OSError as error:
    return _cannot_start(f"--host {settings.host} --port {settings.port}: {error.strerror}")

  compilation_cache.set_default()
  from intellect3.inference.engine import server  # late: jax takes a second to import

  try:
    parts = server.build(settings)
  except ValueError as error:
    return _cannot_start(str(error))
  try:
    # Only now: until everything is compiled, connections are refused and not left waiting.
    listener.listen(LISTEN_BACKLOG)
  except OSError as error:
    return _cannot_start(f"--port {settings.port}: {error.strerror}")
  with asyncio.Runner(loop_factory=_loop_factory()) as runner:
    runner.run(server.serve(parts, listener, settings))
  return 0


def _bind(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  listener.bind((host, port))
  return listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
  if importlib.util.find_spec("uvloop") is None:
    return None
  import uvloop

  return uvloop.new_event_loop


def _die_with_parent() -> None:
  parent = os.getppid()
  ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # it died before the call
    sys.exit(1)


def _cannot_start(reason: str) -> int:
  print(f"engine: cannot start: {' '.join(reason.split())}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
