"""Asynchronous reinforcement learning from gin files.

    python -m experiments.rl_run --gin FILE [--gin FILE ..] [--set a.b=c ..] --out DIR
        [--role all|trainer|orchestrator|worker|inference] [--index I] [--resume]

`--role all` (the default) starts every role on this machine and supervises them; on a cluster each
role is started with the same files, the trainer as one process or several (docs/clusters.md).
Exit code 2: the configuration or the machine is not fit, and nothing was started.
"""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from experiments import gin_config, process
from intellect3 import compilation_cache, rl


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.rl_run",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--gin", action="append", required=True, metavar="FILE")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--out", required=True, metavar="DIR", help="the run directory")
  parser.add_argument("--role", choices=("all", *rl.ROLES), default="all")
  parser.add_argument("--index", type=int, default=0, help="of a worker or server among its kind")
  parser.add_argument("--resume", action="store_true", help="go on from DIR's last checkpoint")
  arguments = parser.parse_args(argv)
  compilation_cache.set_default()

  def build() -> Callable[[], None]:
    with contextlib.ExitStack() as stack:
      if arguments.role == "all":
        stack.enter_context(_sharing_devices())
      return checked()

  def checked() -> Callable[[], None]:
    text = gin_config.read(arguments.gin, arguments.bindings)
    gin_config.parse(text, without_jax=arguments.role in ("orchestrator", "worker"))
    return gin_config.call(
      rl.run,
      run_dir=arguments.out,
      role=arguments.role,
      index=arguments.index,
      resume=arguments.resume,
      config_text=text,
      command=[
        *(sys.executable, "-m", "experiments.rl_run", "--out", arguments.out),
        *("--gin", str(pathlib.Path(arguments.out) / "config.gin")),
      ],
    )

  return process.run_together(build) if arguments.role == "trainer" else process.run(build)


@contextlib.contextmanager
def _sharing_devices() -> Iterator[None]:
  """While this process counts the GPUs, it takes no memory that its children will need."""
  name = "XLA_PYTHON_CLIENT_PREALLOCATE"
  before = os.environ.get(name)
  os.environ[name] = "false"
  try:
    yield
  finally:
    del os.environ[name]
    if before is not None:
      os.environ[name] = before


if __name__ == "__main__":
  sys.exit(main())
