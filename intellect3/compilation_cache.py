"""Where compiled programs are kept between processes, so that only the first start is slow.

Place in the ring: entry points (runs and the engine) call it before jax is imported.
"""

import os
import pathlib

_SETTINGS = {
  "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "intellect3" / "xla"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def set_default() -> None:
  """Gives jax, here and in every child process, a compilation cache; what is set stays."""
  for name, value in _SETTINGS.items():
    os.environ.setdefault(name, value)
