"""Stands in for SGLang's compiled kernels where there is no build of them.

SGLang imports names from `sgl_kernel` all over and, with the torch_native attention backend, calls
none of them. Here every name can be imported, and whatever is called raises and says which it was:
a wrong result is never made up.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch


def __getattr__(name: str) -> Callable[..., NoReturn]:
  if name.startswith("__"):
    raise AttributeError(name)

  def absent(*arguments: Any, **keywords: Any) -> NoReturn:
    raise NotImplementedError(f"sgl_kernel.{name} was called; this machine has no build of it")

  absent.__name__ = name
  return absent


class _NoRuntime:
  """The CUDA runtime's calls to pin host memory: done where there is nothing to pin for."""

  def cudaHostRegister(self, *arguments: Any) -> int:
    return 0

  def cudaHostUnregister(self, *arguments: Any) -> int:
    return 0


# --enable-return-routed-experts pins its buffer in host memory through the CUDA runtime.
if not torch.cuda.is_available():
  torch.cuda.cudart = lambda: _NoRuntime()
