"""What an entry point does to its own process: logging, exit codes."""

import logging
import sys
from collections.abc import Callable

from intellect3 import supervisor
from intellect3.rollouts.orchestrator import RunFailed


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
