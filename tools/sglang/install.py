"""Installs SGLang for the CPU, at pins, into a directory of its own.

    python -m tools.sglang.install [--directory DIR] [--python PYTHON] [--torch-index URL]

About four minutes and 3 GB. Standard library only. A second call does nothing where the pins have
not changed; an interrupted one goes on. No GPU, compiler or kernel build is needed: what SGLang
imports of its kernels is stood in for by `shim/`.
"""

import argparse
import pathlib
import platform
import subprocess
import sys
import time

from tools.sglang import environment

PYTHONS = ((3, 11), (3, 13))
CHECK = """
import sglang, sglang.launch_server, sglang.srt.entrypoints.http_server
print(sglang.__version__)
"""
# Looks at torch without importing it: what it needs is installed after it.
CUDA = """
import importlib.util, pathlib, runpy
version = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")
print(runpy.run_path(str(version))["cuda"])
"""


class InstallError(Exception):
  """The environment could not be made; the message says what to do."""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--directory", type=pathlib.Path, default=environment.DEFAULT_DIRECTORY)
  parser.add_argument("--python", default=sys.executable, help="interpreter to build from")
  parser.add_argument("--torch-index", help="package index that has torch's CPU build")
  arguments = parser.parse_args()
  try:
    install(arguments.directory, python=arguments.python, torch_index=arguments.torch_index)
  except InstallError as error:
    sys.exit(f"tools.sglang.install: {error}")


def install(directory: pathlib.Path, *, python: str, torch_index: str | None = None) -> None:
  """Brings `directory` to the pins; does nothing where it is there already.

  Args:
    directory: the environment's, made where it does not exist.
    python: interpreter to build it from, 3.11 to 3.13.
    torch_index: package index with torch's CPU build, where the usual one offers CUDA's first.

  Raises:
    InstallError: naming what was expected and what was found, or pip's own last words.
  """
  if environment.why_not_ready(directory) is None:
    print(f"{directory} is at the pins")
    return
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    raise InstallError(f"machine: expected linux x86_64, got {sys.platform} {platform.machine()}")
  started = time.monotonic()
  stamp = environment.stamp_of(directory)
  stamp.unlink(missing_ok=True)
  inside = environment.python_of(directory)
  if not inside.exists():
    _check_python(python)
    _run([python, "-m", "venv", str(directory)], "making the environment")
  pins = [line for line in environment.PINS.read_text(encoding="utf-8").splitlines()]
  torch = [line for line in pins if line.startswith("torch==")]
  pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
  pip += ["--progress-bar", "off", "-qq"]
  index = ["--index-url", torch_index] if torch_index else []
  _run([*pip, *index, *torch], "installing torch")
  cuda = _quiet([str(inside), "-c", CUDA])
  if cuda.stdout.strip() != "None":
    raise InstallError(
      f"torch: expected a CPU build, got one for CUDA {cuda.stdout.strip() or cuda.stderr}; "
      "remove the directory and name an index that has the CPU build with --torch-index"
    )
  _run([*pip, "--requirement", str(environment.PINS)], f"installing {_count(pins)} pins (minutes)")
  checked = _quiet([str(inside), "-c", CHECK], environment.variables(directory))
  if checked.returncode:
    raise InstallError(f"sglang: expected to import, got\n{checked.stderr[-2000:]}")
  stamp.write_text(environment.digest() + "\n", encoding="utf-8")
  print(f"sglang {checked.stdout.strip()} in {directory}, {time.monotonic() - started:.0f} s")


def _check_python(python: str) -> None:
  code = "import sys; print(*sys.version_info[:2])"
  found = tuple(int(part) for part in _quiet([python, "-c", code]).stdout.split())
  if not PYTHONS[0] <= found <= PYTHONS[1]:
    raise InstallError(f"python: expected 3.11 to 3.13, got {'.'.join(map(str, found))}")


def _count(pins: list[str]) -> int:
  return sum("==" in line for line in pins)


def _run(command: list[str], what: str) -> None:
  print(what, flush=True)
  if subprocess.run(command, check=False).returncode:
    raise InstallError(f"{what} failed: {' '.join(command)}")


def _quiet(
  command: list[str], variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(command, check=False, capture_output=True, text=True, env=variables)


if __name__ == "__main__":
  main()
