"""Which device comes where in a mesh: inner axes among close neighbours, outer ones between nodes.

Place in the ring: under `mesh.make_mesh`. A domain is what a fast network joins: a node of GPUs
(NVLink), a slice of TPUs (ICI); between domains lies a slower one (InfiniBand, DCN). The mesh axes
are ordered from the outermost to the innermost, so domains are filled from the last axis on.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def domains(devices: Sequence[Any]) -> list[tuple[int, ...]]:
  """The domain of each device.

  Where the devices know of several slices (`slice_index`, newer `partition_index`: TPU slices; the
  nodes or NVLink domains that a multi-process run of GPUs finds), it is that; on one slice of TPUs
  there is one; else it is the process, which holds a node's devices.

  Args:
    devices: with `platform` and `process_index`, and either index where the platform has it.
  """
  slices = [_slice(device) for device in devices]
  if len(set(slices)) > 1 or all(device.platform == "tpu" for device in devices):
    return [(index,) for index in slices]
  return [(0, device.process_index) for device in devices]


def arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
  """Lays devices out.

  GPUs and CPUs domain by domain, in the order of the slices and processes and, in a domain, as
  given; TPUs as jax lays an axis on the torus of a slice.

  Args:
    sizes: of the mesh axes, outermost first; their product is the number of devices.
    devices: the devices.

  Returns:
    An array of the devices of the shape `sizes`.

  Raises:
    ValueError: naming the axis whose groups neither divide nor fill domains, or domains of several
      sizes.
  """
  keys = domains(devices)
  shape = tuple(sizes.values())
  if all(device.platform == "tpu" for device in devices):
    outer, inner = split(sizes, len(set(keys)))
    if len(set(keys)) == 1:
      return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, allow_split_physical_axes=True
    )
  _check_fit(sizes, Counter(keys))
  order = sorted(range(len(devices)), key=lambda i: (keys[i], devices[i].process_index))
  placed = np.empty(len(devices), dtype=object)
  placed[:] = [devices[index] for index in order]
  return placed.reshape(shape)


def split(sizes: Mapping[str, int], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Parts of the axes between and inside `count` domains; the outermost axes go between first.

  Args:
    sizes: of the mesh axes, outermost first.
    count: number of domains.

  Returns:
    The sizes between domains, of the product `count`, and those inside one.

  Raises:
    ValueError: where no such parts are found.
  """
  outer: list[int] = []
  left = count
  for size in sizes.values():
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  if left > 1:
    raise ValueError(f"mesh: expected axes that divide over {count} slices, got {dict(sizes)}")
  return tuple(outer), tuple(s // o for s, o in zip(sizes.values(), outer, strict=True))


def _slice(device: Any) -> int:
  indices = (getattr(device, name, None) for name in ("slice_index", "partition_index"))
  return next((index for index in indices if index is not None), 0)


def _check_fit(sizes: Mapping[str, int], counts: Counter[tuple[int, ...]]) -> None:
  """Refuses groups of an axis and those inside it that would straddle domains."""
  if len(counts) == 1:
    return
  if len(set(counts.values())) > 1:
    raise ValueError(f"devices: expected as many in every domain, got {dict(counts)}")
  domain, group = next(iter(counts.values())), 1
  for axis, size in reversed(list(sizes.items())):
    group *= size
    if group % domain and domain % group:
      raise ValueError(
        f"{axis}: expected groups of {group} devices to divide or fill domains of {domain}, "
        f"got the axes {dict(sizes)}"
      )
