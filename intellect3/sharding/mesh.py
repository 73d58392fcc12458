"""The device mesh: always the same five axes.

Place in the ring: the trainer makes one at start; every sharding is written in its axis names.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Replicas; shards of the parameters across nodes; shards of the experts; of the sequence; of the
heads and widths."""


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  expert: int = 1,
  context: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with the axes `AXES`, all of type Auto.

  Args:
    data, fsdp, expert, context, tensor: sizes of the axes.
    devices: as many devices as the product of the sizes; None takes all of the process's backend,
      laid out by jax so that the last axes are the closest neighbours.

  Raises:
    ValueError: where a size is below 1 or the product is not the number of devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, expert, context, tensor), strict=True))
  for axis, size in sizes.items():
    if size < 1:
      raise ValueError(f"{axis}: expected at least 1, got {size}")
  available = jax.device_count() if devices is None else len(devices)
  needed = math.prod(sizes.values())
  if needed != available:
    raise ValueError(f"mesh: expected {needed} devices for {sizes}, got {available}")
  types = (AxisType.Auto,) * len(AXES)
  if devices is None:
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types)
  return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=types)
