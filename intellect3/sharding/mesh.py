"""The device mesh: always the same five axes.

Place in the ring: the trainer makes one at start; every sharding is written in its axis names.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from intellect3.sharding import topology

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Replicas; shards of the parameters across nodes; shards of the experts; of the sequence; of the
heads and widths. From the outermost, whose devices may be far apart, to the innermost."""


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
    devices: as many devices as the product of the sizes; None takes all of the backend. They are
      laid out so that the last axes are the closest neighbours (`topology.arrange`): with 8 GPUs a
      node, `fsdp` 16 and `expert` 8, experts are exchanged inside nodes; with `data` 4 besides,
      parameters are gathered inside groups of 16 nodes and replicas summed between the groups.

  Raises:
    ValueError: where a size is no integer of at least 1, the product is not the number of devices,
      or an axis would straddle nodes.
  """
  sizes = dict(zip(AXES, (data, fsdp, expert, context, tensor), strict=True))
  for axis, size in sizes.items():
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise ValueError(f"{axis}: expected an integer >= 1, got {size!r}")
  given = jax.devices() if devices is None else devices
  needed = math.prod(sizes.values())
  if needed != len(given):
    raise ValueError(f"mesh: expected {needed} devices for {sizes}, got {len(given)}")
  return Mesh(topology.arrange(sizes, given), AXES, axis_types=(AxisType.Auto,) * len(AXES))
