"""Some of a checkpoint's tensors in the place of those that are held.

Place in the ring: a server that is sent tensors, and not a directory.
"""

from collections.abc import Mapping

import jax
import numpy as np

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.models.hf import layout, names
from intellect3.models.stored import directory, overflow


def merge(
  config: ModelConfig, params: transformer.Params, tensors: Mapping[str, np.ndarray]
) -> transformer.Params:
  """Puts some of a checkpoint's tensors in the place of those that params hold.

  Args:
    config: of the model.
    params: nested dict of NumPy arrays; not changed.
    tensors: by the checkpoint's names; converted to the dtype of what they replace. Those of layers
      past the last, and a head that is the embedding, are passed over.

  Returns:
    New params; leaves that no tensor belongs to are shared with the old ones.

  Raises:
    ValueError: one that lists every unknown and misshapen tensor, or every one with finite values
      that the dtype of what it replaces cannot hold.
  """
  slots = {slot.name: slot for slot in names.slots(config)}
  problems = []
  for name, tensor in tensors.items():
    if name in slots:
      entry = slots[name].entry
      expected = names.stored_shape(entry, layout.slot_shape(config, entry))
      if tensor.shape != expected:
        problems.append(f"misshapen: {name}: expected {list(expected)}, got {list(tensor.shape)}")
    elif not (names.is_extra(name, config) or names.repeats_embedding(name, config)):
      problems.append(f"unexpected: {name}")
  if problems:
    raise ValueError("the tensors do not fit the config:\n  " + "\n  ".join(problems))
  merged = jax.tree.map(lambda leaf: leaf, params)
  overflows: list[str] = []
  own: set[tuple[str, ...]] = set()
  for name, tensor in tensors.items():
    if name not in slots:
      continue
    _, entry, at = slots[name]
    if entry.path not in own:
      layout.put(merged, entry.path, np.array(layout.leaf(merged, entry.path)))
      own.add(entry.path)
    value = layout.to_ours(entry, tensor, layout.slot_shape(config, entry))
    held = layout.leaf(merged, entry.path)[at]
    largest = directory.copy(held, value)
    if largest:
      overflows.append(overflow.line(name, held.dtype, largest))
  overflow.refuse(overflows)
  return merged
