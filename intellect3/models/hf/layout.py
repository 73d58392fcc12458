"""One tensor between a checkpoint's layout and ours: transposition and head split, both ways.

Place in the ring: between `names` (which says how) and reading and writing. Both ways are views.
"""

from typing import Any

import numpy as np

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.models.hf import names


def to_ours(entry: names.Entry, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A stored tensor in our layout.

  Args:
    entry: what it is.
    stored: as in the file.
    shape: of ours, stack axes taken off.
  """
  if entry.inputs is None:
    return stored.reshape(shape)
  outputs_first = stored.reshape(*shape[entry.inputs :], *shape[: entry.inputs])
  outputs = len(shape) - entry.inputs
  return outputs_first.transpose(*range(outputs, len(shape)), *range(outputs))


def to_stored(entry: names.Entry, ours: np.ndarray) -> np.ndarray:
  """A tensor of ours, stack axes taken off, in the layout of the file."""
  shape = names.stored_shape(entry, ours.shape)
  return ours.reshape(shape) if entry.inputs is None else ours.reshape(shape[::-1]).T


def leaf(tree: Any, path: tuple[str, ...]) -> Any:
  """What a nested dict has at a path."""
  for key in path:
    tree = tree[key]
  return tree


def put(tree: Any, path: tuple[str, ...], value: Any) -> None:
  """Sets what a nested dict has at a path, making the dicts on the way."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def leaf_shape(config: ModelConfig, entry: names.Entry) -> tuple[int, ...]:
  """The shape of our array, stack axes included."""
  return tuple(leaf(transformer.abstract(config)[0], entry.path).shape)


def slot_shape(config: ModelConfig, entry: names.Entry) -> tuple[int, ...]:
  """The shape of one tensor of our array, stack axes taken off."""
  return leaf_shape(config, entry)[entry.stack_axes :]
