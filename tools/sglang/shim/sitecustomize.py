"""Run by Python at its start, since the launcher puts this directory on the path.

torchvision's usual wheel is built for CUDA and cannot load its operators beside a CPU torch; its
Python then fails to import because it describes operators that nobody declared. This declares them,
without code behind them, just before torchvision is imported for the first time. Importing torch
here at once would slow down every Python that starts.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
DESCRIBED = ("nms", "qnms")


class BeforeTorchvision(importlib.abc.MetaPathFinder):
  """Finds nothing; sees the first import of torchvision coming."""

  declared: object = None

  def find_spec(
    self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
  ) -> importlib.machinery.ModuleSpec | None:
    if fullname == "torchvision":
      sys.meta_path.remove(self)
      spec = importlib.util.find_spec("torchvision")
      if spec is not None and not _operators_load(spec):
        BeforeTorchvision.declared = _declare()
    return None


def _operators_load(spec: importlib.machinery.ModuleSpec) -> bool:
  import torch

  libraries = [
    str(library)
    for directory in spec.submodule_search_locations or []
    for library in pathlib.Path(directory).glob("_C*.so")
  ]
  try:
    for library in libraries:
      torch.ops.load_library(library)
  except OSError:
    return False
  return bool(libraries)


def _declare() -> object:
  import torch

  library = torch.library.Library("torchvision", "DEF")
  for name in DESCRIBED:
    library.define(name + SIGNATURE)
  return library


sys.meta_path.insert(0, BeforeTorchvision())
