"""What an entry point does to its own process: its place among others, logging, exit codes."""

import logging
import os
import sys
from collections.abc import Callable

from experiments import gin_config
from intellect3 import supervisor
from intellect3.distributed import cluster as clusters
from intellect3.rollouts.orchestrator import RunFailed

Build = Callable[[], Callable[[], None]]
"""Checks a run and returns what does it; raises `gin_config.ConfigError`."""


def run(build: Build) -> int:
  """Builds a run and does it; gives the exit code for the shell, 2 where nothing was started."""
  try:
    start = build()
  except gin_config.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return run_to_end(start)


def run_together(build: Build) -> int:
  """As `run`, as one of the processes that the environment tells of (`distributed.cluster`)."""
  try:
    cluster = clusters.detect(os.environ)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if cluster is None:
    return run(build)
  from intellect3.distributed import processes  # it imports jax

  _log()
  with processes.started(cluster):
    code = run(build)
    if code:
      raise SystemExit(code)  # at once: the others may be waiting for this one
  return code


def run_to_end(start: Callable[[], None]) -> int:
  """Runs what a builder returned; gives the exit code for the shell."""
  _log()
  try:
    start()
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except (supervisor.ChildFailed, RunFailed) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def _log() -> None:
  logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
  )
  for chatty in ("absl", "jax", "matplotlib", "aiohttp.access"):
    logging.getLogger(chatty).setLevel(logging.WARNING)
