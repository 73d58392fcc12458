"""Where SGLang is installed and what a process needs to run out of there.

Shared by the installer and the launcher. A stamp with the digest of the pins marks a complete
environment; without it, or with another one, `python -m tools.sglang.install` has work to do.
"""

import hashlib
import os
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
PINS = HERE / "pins.txt"
SHIM = HERE / "shim"
DEFAULT_DIRECTORY = HERE.parents[1] / ".sglang"


def python_of(directory: pathlib.Path) -> pathlib.Path:
  """The interpreter of the environment."""
  return directory / "bin" / "python"


def stamp_of(directory: pathlib.Path) -> pathlib.Path:
  """The file that is written last."""
  return directory / "installed"


def digest() -> str:
  """What a complete environment's stamp says: the digest of the pins."""
  return hashlib.sha256(PINS.read_bytes()).hexdigest()


def why_not_ready(directory: pathlib.Path) -> str | None:
  """Why SGLang cannot be started from there, or None where it can."""
  how = "`make sglang` installs it"
  if not python_of(directory).exists():
    return f"no SGLang in {directory}; {how}"
  stamp = stamp_of(directory)
  if not stamp.exists():
    return f"the installation in {directory} is not complete; {how}"
  if stamp.read_text(encoding="utf-8").strip() != digest():
    return f"the installation in {directory} is of other pins; {how}"
  return None


def variables(directory: pathlib.Path) -> dict[str, str]:
  """The environment of a process that imports SGLang: the caller's, and what makes it run here.

  The stand-ins of `shim/` come first on the path; the CPU engine is chosen although the build is
  for CUDA; models are directories, so no hub is asked; models are tiny, so one thread is enough
  where the caller does not say otherwise.
  """
  result = dict(os.environ)
  result["PATH"] = os.pathsep.join([str(directory / "bin"), result.get("PATH", os.defpath)])
  result["PYTHONPATH"] = str(SHIM)
  result["SGLANG_USE_CPU_ENGINE"] = "1"
  result["HF_HUB_OFFLINE"] = "1"
  result.setdefault("OMP_NUM_THREADS", "1")
  return result
