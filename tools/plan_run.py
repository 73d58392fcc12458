"""What a run will take on machines that are not here, without starting anything.

    python -m tools.plan_run --gin FILE [--gin FILE ..] [--set a.b=c ..]
        [--target h100|h200|b200|v5p] [--devices N] [--json OUT] [--programs rl_step,logprobs]
        [--rows N] [--trajectory-tokens N] [--margin SHARE] [--hardware FILE] [--allow-cpu]
        [--search [--search-most N]] [--xla NAME=VALUE ..] [--hlo DIR]

Compiles the functions that the run would jit, for the target and without a device (the wheels of
`make plan`; for v5p of `make plan-tpu`), and reports memory, collectives, arithmetic and a
predicted step time per device.
Exit code 1: it does not fit, or float32 weights travel; 2: the configuration or a flag is not fit,
told in one line before anything is compiled.
"""

import argparse
import json
import logging
import os
import pathlib
import sys
from typing import Any

from intellect3.planning import hardware

PLAN = pathlib.Path(sys.prefix) / "plan"
PLAN_TPU = pathlib.Path(sys.prefix) / "plan-tpu"
"""Where `make plan` and `make plan-tpu` put the compilers."""


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  try:
    constants = _checked(arguments)
  except ValueError as error:
    return _refused(error)
  _prepare(arguments.target, arguments.allow_cpu)
  from experiments import gin_config

  try:
    report = _plan(arguments, constants)
    if arguments.json is not None:
      arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  except (gin_config.ConfigError, ValueError, OSError) as error:
    return _refused(error)
  from intellect3.planning import table

  print(table.ranking(report) if arguments.search else table.table(report), flush=True)
  return 1 if report["faults"] else 0


def _refused(error: Exception) -> int:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return 2


def _checked(arguments: argparse.Namespace) -> hardware.Hardware:
  """The constants to predict with; ValueError for a flag that can be seen to be wrong at once."""
  for name in ("devices", "rows", "trajectory_tokens", "search_most"):
    value = getattr(arguments, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
  if not 0.0 <= arguments.margin < 1.0:
    raise ValueError(f"--margin: expected a share from 0 to below 1, got {arguments.margin}")
  if arguments.search:
    given = [f"--{name}" for name in ("programs", "hlo") if getattr(arguments, name) is not None]
    if given:
      raise ValueError(f"--search compiles the step alone: expected no {' or '.join(given)}")
  elif arguments.search_most is not None:
    raise ValueError("--search-most: expected beside --search")
  _options(arguments.xla)
  if arguments.json is not None:
    _writable("--json", arguments.json, arguments.json.parent, taken=arguments.json.is_dir())
  if arguments.hlo is not None:
    there = next(path for path in (arguments.hlo, *arguments.hlo.parents) if path.exists())
    _writable("--hlo", arguments.hlo, there, taken=False)
  name = "cpu" if arguments.allow_cpu else arguments.target
  return hardware.load(name, arguments.hardware)


def _writable(flag: str, path: pathlib.Path, folder: pathlib.Path, *, taken: bool) -> None:
  if taken or not folder.is_dir() or not os.access(folder, os.W_OK):
    raise ValueError(f"{flag}: expected a path in a folder that can be written, got {str(path)!r}")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m tools.plan_run",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--gin", action="append", required=True, metavar="FILE")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--target", default="h200", help="h100, h200, b200 or v5p")
  parser.add_argument("--devices", type=int, help="of the trainer; by default what the mesh needs")
  parser.add_argument("--json", type=pathlib.Path, metavar="OUT", help="where the report goes")
  parser.add_argument("--programs", help="of rl_step, sft_step, logprobs; by default all")
  parser.add_argument("--rows", type=int, help="of a step's batch; by default the most")
  parser.add_argument("--trajectory-tokens", type=int, help="by default the longest")
  parser.add_argument(
    "--margin", type=float, default=hardware.MARGIN, help="share of the memory to leave free"
  )
  parser.add_argument(
    "--hardware", type=pathlib.Path, help="other constants (hardware.toml's form)"
  )
  parser.add_argument("--allow-cpu", action="store_true", help="compile for fake CPU devices")
  parser.add_argument("--search", action="store_true", help="rank the layouts that divide")
  parser.add_argument("--search-most", type=int, help="layouts to compile at most")
  parser.add_argument(
    "--xla", action="append", default=[], metavar="NAME=VALUE", help="option of XLA's compiler"
  )
  parser.add_argument("--hlo", type=pathlib.Path, help="a folder for the compiled programs' text")
  return parser


def _prepare(target: str, allow_cpu: bool) -> None:
  """Before jax is imported: no look for a real GPU, and the target's compiler."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  compiler = PLAN_TPU if target == "v5p" else PLAN
  if not allow_cpu and compiler.is_dir() and str(compiler) not in sys.path:
    sys.path.append(str(compiler))
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax: no autotuning for what is not here


def _plan(arguments: argparse.Namespace, constants: hardware.Hardware) -> dict[str, Any]:
  from experiments import gin_config
  from intellect3.planning import plan, search, target
  from tools import plan_job

  text = gin_config.read(arguments.gin, arguments.bindings)
  kind, job = plan_job.read(
    text, rows=arguments.rows, trajectory_tokens=arguments.trajectory_tokens
  )
  count = arguments.devices or job.needs_devices
  if arguments.allow_cpu:
    import jax

    jax.config.update("jax_num_cpu_devices", count)
    devices: Any = jax.devices("cpu")
    name = "cpu"
  else:
    devices, name = target.devices(arguments.target, count), arguments.target
  first = "rl_step" if kind == "rl" else "sft_step"
  names = arguments.programs.split(",") if arguments.programs else None
  say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
  head = {"target": name, "gin": arguments.gin, "bindings": arguments.bindings}
  if arguments.search:
    return head | search.search(
      job,
      devices,
      constants,
      program=first,
      margin=arguments.margin,
      most=arguments.search_most or search.MOST,
      say=say,
      options=_options(arguments.xla),
    )
  return head | plan.plan(
    job,
    devices,
    constants,
    names=names,
    margin=arguments.margin,
    say=say,
    hlo=arguments.hlo,
    options=_options(arguments.xla),
  )


def _options(given: list[str]) -> dict[str, Any]:
  """`NAME=VALUE`, where a number, true and false are what XLA takes them for."""
  options: dict[str, Any] = {}
  for one in given:
    name, separator, value = one.partition("=")
    if not separator or not name:
      raise ValueError(f"--xla: expected NAME=VALUE, got {one!r}")
    typed = value.lstrip("-").isdigit() or value in ("true", "false")
    options[name] = json.loads(value) if typed else value
  return options


if __name__ == "__main__":
  sys.exit(main())
