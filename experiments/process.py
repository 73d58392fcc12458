"""What an entry point does to its own process: compilation cache, logging, exit codes."""

import logging
import os
import pathlib
import sys
from collections.abc import Callable

from intellect3 import supervisor
from intellect3.rollouts.orchestrator import RunFailed

_CACHE = {
  "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "intellect3" / "xla"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def prepare() -> None:
  """Gives jax, here and in every child, a compilation cache. Call it before jax is imported."""
  for name, value in _CACHE.items():
    os.environ.setdefault(name, value)


def run_to_end(start: Callable[[], None]) -> int:
  """Runs what a builder returned; gives the exit code for the shell."""
  logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
  )
  for chatty in ("absl", "jax", "matplotlib", "aiohttp.access"):
    logging.getLogger(chatty).setLevel(logging.WARNING)
  try:
    start()
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except (supervisor.ChildFailed, RunFailed) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0
