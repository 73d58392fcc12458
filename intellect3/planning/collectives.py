"""What a compiled program sends between devices: kind, dtype, mesh axes, bytes, link.

Place in the ring: beside it, over the records of `hlo`.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from intellect3.planning.hardware import Hardware
from intellect3.planning.hlo import Computation, Instruction, Module, Shape

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "ragged-all-to-all",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]

_EXPLICIT = re.compile(r"(?:replica_groups|source_target_pairs)=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(
  r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
)
_MESH = re.compile(
  r"replica_groups=(?:@\w+|mesh)\[(?P<sizes>[^\]]*)\](?P<more>[^{]*)\{(?P<axes>[^}]*)\}"
)


class Collective(NamedTuple):
  """One collective of a program, on one device.

  Attributes:
    name: the instruction's (the starting one's).
    kind: one of `KINDS`.
    arrays: what it is about, whole: gathered, reduced, or sent.
    groups: the devices that take part together, by their place in the mesh.
    axes: mesh axes along which the members of a group differ, outermost first.
    start: whether it only begins here; a `-done` instruction waits for it.
    partial: whether a group is only a part of what these axes join.
  """

  name: str
  kind: str
  arrays: tuple[Shape, ...]
  groups: Groups
  axes: tuple[str, ...]
  start: bool
  partial: bool = False

  @property
  def bytes(self) -> int:
    """Size of what it is about."""
    return sum(array.bytes for array in self.arrays)

  @property
  def dtype(self) -> str:
    """That of most of its bytes."""
    sizes: dict[str, int] = {}
    for array in self.arrays:
      sizes[array.dtype] = sizes.get(array.dtype, 0) + array.bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="")

  @property
  def group_size(self) -> int:
    """Devices of the largest group."""
    return max((len(group) for group in self.groups), default=1)

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device receives, at the least that the best algorithm needs."""
    size = self.group_size
    if self.kind == "collective-permute":
      return float(self.bytes)
    share = (size - 1) / size
    return (2.0 if self.kind == "all-reduce" else 1.0) * share * self.bytes


def find(
  instruction: Instruction, computation: Computation, axes: Mapping[str, int], module: Module
) -> Collective | None:
  """The collective that an instruction is or begins; None where it is none.

  Args:
    instruction: one of the computation's.
    computation: where it stands; its operands' shapes are looked up there.
    axes: sizes of the mesh axes, outermost first: devices are numbered in their order.
    module: for a collective that an `async-start` wraps.
  """
  opcode, start = instruction.opcode, False
  if opcode == "async-start":
    body = module.computations[instruction.called("calls")[0]]
    wrapped = next((i for i in body.instructions if i.opcode in KINDS), None)
    if wrapped is None:
      return None
    found = find(wrapped, body, axes, module)
    return found and found._replace(name=instruction.name, start=True)
  if opcode.endswith("-start"):
    opcode, start = opcode.removesuffix("-start"), True
  if opcode not in KINDS:
    return None
  operands = tuple(
    shape
    for name in instruction.operands
    if name in computation.by_name
    for shape in computation.by_name[name].shapes
  )
  devices = math.prod(axes.values())
  groups = groups_of(instruction.attributes, devices)
  arrays = operands
  if opcode == "all-gather":  # the whole is the result; a start's holds its operands too
    arrays = instruction.shapes[len(operands) :] if start else instruction.shapes
  if opcode == "ragged-all-to-all":
    # Data, where to, and four lists of sizes, which only the run knows: the smaller of the two
    # buffers bounds what is sent, and is it where the other one is cut to measure.
    arrays = (min(operands[:2], key=lambda shape: shape.bytes),)
  spanned = axes_of(groups, axes)
  return Collective(
    name=instruction.name,
    kind=opcode,
    arrays=arrays,
    groups=groups,
    axes=spanned,
    start=start,
    partial=opcode != "collective-permute" and not joins_all(groups, axes, spanned),
  )


def groups_of(attributes: str, devices: int) -> Groups:
  """The groups of devices of a collective, from its attributes.

  XLA writes lists of lists, `[groups,size]<=[dims]T(order)`, or axes of a mesh.

  Raises:
    ValueError: groups in another form.
  """
  if (found := _IOTA.search(attributes)) is not None:
    dims = _numbers(found["dims"])
    order = _numbers(found["order"]) if found["order"] else tuple(range(len(dims)))
    count, size = _numbers(found["shape"])
    flat = _transposed(dims, order)
    return tuple(tuple(flat[i * size : (i + 1) * size]) for i in range(count))
  if (found := _MESH.search(attributes)) is not None:
    return _mesh_groups(found["sizes"], found["more"], found["axes"])
  if (found := _EXPLICIT.search(attributes)) is not None:
    groups = tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found["groups"]))
    return groups or (tuple(range(devices)),)
  if "replica_groups={}" in attributes or "replica_groups" not in attributes:
    return (tuple(range(devices)),)
  raise ValueError(f"replica_groups: expected a known form, got {attributes[:200]!r}")


def _mesh_groups(sizes: str, more: str, chosen: str) -> Groups:
  """Groups along axes of a mesh: `'x'=2,'y'=4`, its devices' order, `'x','y':(1)2`.

  An axis named with `:(before)size` is the part of that size after a part of size `before`.
  """
  axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
  place_to_device = list(range(math.prod(axes.values())))
  if (ordered := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", more)) is not None:
    dims = _numbers(ordered[1])
    place_to_device = _transposed(dims, _numbers(ordered[2] or "") or tuple(range(len(dims))))
  elif (listed := re.search(r"device_ids=\(([\d,]+)\)", more)) is not None:
    place_to_device = list(_numbers(listed[1]))
  elif more.strip(" ,"):
    raise ValueError(f"replica_groups: expected a mesh and its device_ids, got {more!r}")
  parts = [
    (name, int(before or 1), int(size or axes[name]))
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
  ]
  groups: dict[tuple[int, ...], list[int]] = {}
  for place, device in enumerate(place_to_device):
    key = dict(zip(axes, _place(place, axes), strict=True))
    for name, before, size in parts:
      after = axes[name] // (before * size)
      key[name] -= key[name] // after % size * after
    groups.setdefault(tuple(key.values()), []).append(device)
  return tuple(tuple(group) for group in groups.values())


def axes_of(groups: Groups, axes: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which members of one group differ, outermost first.

  Args:
    groups: places in the mesh; or (source, target) pairs of a permutation.
    axes: sizes of the mesh axes, outermost first.
  """
  differ: set[str] = set()
  for group in groups:
    places = [_place(device, axes) for device in group]
    differ |= {name for name, *sizes in zip(axes, *places, strict=True) if len(set(sizes)) > 1}
  return tuple(name for name in axes if name in differ)


def joins_all(groups: Groups, axes: Mapping[str, int], chosen: Sequence[str]) -> bool:
  """Whether each group is all the devices that differ only along the chosen axes."""
  wanted = {frozenset(group) for group in groups}
  return {frozenset(group) for group in _axis_groups(axes, chosen)} == wanted


def seconds(collective: Collective, hardware: Hardware, nodes: Sequence[int]) -> float:
  """How long a collective takes alone: its bytes over the slowest link that its groups need.

  A ring's bytes cross between nodes over the adapters of all members that a node has; of an
  all-to-all, only what goes to other nodes does.

  Args:
    collective: of the program.
    hardware: the device.
    nodes: the node of each device, by its place in the mesh.
  """
  if collective.group_size < 2:
    return 0.0
  inside = min(
    max(members.values())
    for members in (_members(group, nodes) for group in collective.groups if len(group) > 1)
  )
  whole = collective.group_size
  crosses = any(len(_members(group, nodes)) > 1 for group in collective.groups)
  wire = collective.wire_bytes
  inner, outer = hardware.inner * hardware.link_share, hardware.outer * hardware.link_share
  if not crosses:
    return hardware.latency + wire / inner
  if collective.kind in ("all-to-all", "ragged-all-to-all"):
    away = collective.bytes * (whole - inside) / whole
    return hardware.latency + max(away / outer, (wire - away) / inner)
  return hardware.latency + max(wire / (outer * inside), wire / inner)


def crosses_nodes(collective: Collective, nodes: Sequence[int]) -> bool:
  """Whether any of its groups spans nodes."""
  return any(len(_members(group, nodes)) > 1 for group in collective.groups)


def _members(group: Sequence[int], nodes: Sequence[int]) -> dict[int, int]:
  count: dict[int, int] = {}
  for device in group:
    count[nodes[device]] = count.get(nodes[device], 0) + 1
  return count


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number)


def _transposed(dims: Sequence[int], order: Sequence[int]) -> list[int]:
  strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
  places = itertools.product(*(range(dims[axis]) for axis in order))
  return [sum(i * strides[axis] for i, axis in zip(place, order, strict=True)) for place in places]


def _axis_groups(axes: Mapping[str, int], chosen: Sequence[str]) -> Groups:
  """The groups of devices that differ only along the chosen axes."""
  groups: dict[tuple[int, ...], list[int]] = {}
  for device in range(math.prod(axes.values())):
    rest = zip(axes, _place(device, axes), strict=True)
    groups.setdefault(tuple(i for name, i in rest if name not in chosen), []).append(device)
  return tuple(tuple(group) for group in groups.values())


def _place(device: int, axes: Mapping[str, int]) -> tuple[int, ...]:
  place = []
  for size in reversed(tuple(axes.values())):
    device, index = divmod(device, size)
    place.append(index)
  return tuple(reversed(place))
