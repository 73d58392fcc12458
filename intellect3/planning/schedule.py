"""How long a compiled schedule takes: every instruction by a roofline, collectives beside compute.

Place in the ring: beside it, over `hlo` and `collectives`. A device runs one kernel after the
other; a collective that only starts runs beside them, after those started before it, and its
`-done` waits. What is waited for is exposed.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from intellect3.planning import collectives, host_copies
from intellect3.planning.collectives import Collective
from intellect3.planning.hardware import Hardware
from intellect3.planning.hlo import PACKAGE, Computation, Instruction, Module, runs
from intellect3.planning.host_copies import ALLOCATES, HostCopy

# No kernel: names for values, or bookkeeping on the host.
_FREE = frozenset(
  (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "domain", "iota"),
  )
)
_CONTRACTED = re.compile(r"lhs_contracting_dim(?:s=|ensions\":\[\")(?:\{)?(?P<dims>[\d,\"]*)")
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "convert", "copy", "reshape", "transpose")


class Copied(NamedTuple):
  """A copy between device and host in the schedule; fields as `Event`'s."""

  copy: HostCopy
  times: int
  seconds: float
  exposed_seconds: float


class Event(NamedTuple):
  """A collective of the schedule.

  Attributes:
    collective: what is sent.
    times: how often a step.
    seconds: alone, each time.
    exposed_seconds: that the device waits for it, each time.
    in_unknown_loop: whether it runs in a loop whose trip count XLA does not know.
    source: the traced function's path.
    file: where it was written, as `hlo.Module.source` says it.
  """

  collective: Collective
  times: int
  seconds: float
  exposed_seconds: float
  in_unknown_loop: bool
  source: str
  file: str = ""


@dataclasses.dataclass
class Timeline:
  """What a schedule takes on one device; sums over the whole step.

  Attributes:
    seconds: from begin to end.
    matrix_flops: of the matrix products that XLA shows (custom kernels hide theirs).
    matrix_seconds: bound by matrix products.
    memory_bytes: read and written.
    memory_seconds: bound by memory.
    launch_seconds: of starting kernels.
    kernel_seconds: of custom kernels beyond their memory traffic, as `timeline` was told.
    kernels: instructions that start one.
    custom: how often each custom call runs.
    custom_bytes: read and written by custom kernels, by part of the model (`PARTS`).
    events: the collectives, in the order of the schedule.
    copies: those between device and host.
    slowness: seconds a byte of custom kernels, by part of the model.
  """

  seconds: float = 0.0
  matrix_flops: float = 0.0
  matrix_seconds: float = 0.0
  memory_bytes: float = 0.0
  memory_seconds: float = 0.0
  launch_seconds: float = 0.0
  kernel_seconds: float = 0.0
  kernels: int = 0
  custom: dict[str, int] = dataclasses.field(default_factory=dict)
  custom_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
  events: list[Event] = dataclasses.field(default_factory=list)
  copies: list[Copied] = dataclasses.field(default_factory=list)
  slowness: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def exposed_seconds(self) -> float:
    """Of all collectives."""
    return sum(event.times * event.exposed_seconds for event in self.events)

  @property
  def host_seconds(self) -> float:
    """That the device waits for copies to or from its host."""
    return sum(copied.times * copied.exposed_seconds for copied in self.copies)

  def add(self, event: "Event | Copied") -> None:
    """Adds a collective or a copy."""
    if isinstance(event, Event):
      self.events.append(event)
    else:
      self.copies.append(event)


PARTS = ("attention", "experts")
"""Parts of the model whose custom kernels are told apart, by the traced function's path."""

_KERNELS = ("mosaic", "triton", "tpu_custom_call")


def timeline(
  module: Module,
  hardware: Hardware,
  axes: Mapping[str, int],
  nodes: Sequence[int],
  *,
  kernel_seconds: Mapping[str, float] | None = None,
) -> Timeline:
  """Runs the schedule in thought.

  Args:
    module: a scheduled program.
    hardware: the device.
    axes: sizes of the mesh axes, outermost first.
    nodes: the node of each device, by its place in the mesh.
    kernel_seconds: of a step's custom kernels, by part of the model; they are shared out by the
      bytes that each reads and writes. None: kernels take the time of their memory traffic.
  """
  line = Timeline()
  line.seconds = _run(module, module.entry, 1, False, line, hardware, axes, nodes)
  if not kernel_seconds:
    return line
  moved = line.custom_bytes
  slow = {part: kernel_seconds.get(part, 0.0) / size for part, size in moved.items() if size}
  line = Timeline(slowness=slow)
  line.seconds = _run(module, module.entry, 1, False, line, hardware, axes, nodes)
  return line


def _run(
  module: Module,
  name: str,
  times: int,
  unknown: bool,
  line: Timeline,
  hardware: Hardware,
  axes: Mapping[str, int],
  nodes: Sequence[int],
) -> float:
  """Adds one computation that runs so often to the line; returns the seconds of one run."""
  computation = module.computations[name]
  clock = 0.0
  free = {"network": 0.0, "d2h": 0.0, "h2d": 0.0}  # when each way is
  pending: dict[str, tuple[Event | Copied, float]] = {}

  def wait(event: Event | Copied, ends: float) -> float:
    waited = max(0.0, ends - clock)
    line.add(event._replace(exposed_seconds=waited))
    return clock + waited

  for instruction in computation.instructions:
    parts = runs(instruction)
    if parts:
      loop = instruction.opcode == "while" and instruction.nominal_trip_count is None
      took = [
        trips * _run(module, body, times * trips, unknown or loop, line, hardware, axes, nodes)
        for body, trips in parts
      ]
      clock += max(took)  # of branches, the longest
      continue
    began = _begun(instruction, computation, module, hardware, axes, nodes)
    if began is not None:
      event = (
        Event(
          *(began.what, times, began.seconds, began.seconds, unknown, instruction.op_name),
          module.source(instruction, PACKAGE),
        )
        if isinstance(began.what, Collective)
        else Copied(began.what, times, began.seconds, began.seconds)
      )
      way = "network" if isinstance(began.what, Collective) else began.what.kind
      free[way] = max(clock, free[way]) + began.seconds
      if began.what.start and '"is_sync":true' not in instruction.attributes:
        pending[instruction.name] = (event, free[way])
      else:
        clock = wait(event, free[way])
      continue
    started = next((pending.pop(o) for o in instruction.operands if o in pending), None)
    if started is not None:
      clock = wait(*started)
      continue
    clock += _kernel(instruction, computation, module, times, line, hardware)
  # What is still on its way when a computation ends is waited for there.
  for event, ends in pending.values():
    clock = wait(event, ends)
  return clock


class _Begun(NamedTuple):
  what: Collective | HostCopy
  seconds: float


def _begun(
  instruction: Instruction,
  computation: Computation,
  module: Module,
  hardware: Hardware,
  axes: Mapping[str, int],
  nodes: Sequence[int],
) -> _Begun | None:
  """The collective or copy that an instruction is or begins, and how long it takes alone."""
  copied = host_copies.find(instruction, computation, module)
  if copied is not None:
    return _Begun(copied, hardware.host_seconds(copied.bytes))
  found = collectives.find(instruction, computation, axes, module)
  if found is not None:
    return _Begun(found, collectives.seconds(found, hardware, nodes))
  return None


def _kernel(
  instruction: Instruction,
  computation: Computation,
  module: Module,
  times: int,
  line: Timeline,
  hardware: Hardware,
) -> float:
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done") or ALLOCATES in instruction.attributes:
    return 0.0
  flops, dtype = matrix_flops(instruction, computation, module)
  moved = memory_bytes(instruction, computation, module)
  by_matrix, by_memory = hardware.matrix_seconds(flops, dtype), hardware.memory_seconds(moved)
  line.matrix_flops += times * flops
  line.memory_bytes += times * moved
  if by_matrix >= by_memory:
    line.matrix_seconds += times * by_matrix
  else:
    line.memory_seconds += times * by_memory
  line.launch_seconds += times * hardware.launch
  line.kernels += times
  by_kernel = 0.0
  if opcode.removesuffix("-start") == "custom-call":
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    key = target[1] if target else instruction.name
    line.custom[key] = line.custom.get(key, 0) + times
    part = next((part for part in PARTS if f"/{part}/" in instruction.op_name), None)
    if part is not None and any(kind in key for kind in _KERNELS):
      line.custom_bytes[part] = line.custom_bytes.get(part, 0.0) + times * moved
      by_kernel = max(0.0, line.slowness.get(part, 0.0) * moved - by_memory)
      line.kernel_seconds += times * by_kernel
  return hardware.launch + max(by_matrix, by_memory) + by_kernel


def matrix_flops(
  instruction: Instruction, computation: Computation, module: Module
) -> tuple[float, str]:
  """Floating-point operations of the matrix products that an instruction does, and their dtype.

  Two per multiply and add. A fusion does those inside it; of custom calls only XLA's own matrix
  products are known, any other counts as none.
  """
  if instruction.opcode in ("fusion", "fusion-start", "async-start"):
    total, dtype = 0.0, "f32"
    for name in instruction.called("calls"):
      inner = module.computations[name]
      for part in inner.instructions:
        flops, of = matrix_flops(part, inner, module)
        if flops:
          total, dtype = total + flops, of
    return total, dtype
  product = instruction.opcode in ("dot", "scaled-dot") or "$gemm" in instruction.attributes
  found = _CONTRACTED.search(instruction.attributes) if product else None
  left = computation.by_name.get(instruction.operands[0]) if instruction.operands else None
  if found is None or left is None or not left.shapes or not instruction.shapes:
    return 0.0, "f32"
  contracted = 1
  for dim in re.findall(r"\d+", found["dims"]):
    contracted *= left.shapes[0].dims[int(dim)]
  return 2.0 * instruction.shapes[0].elements * contracted, left.shapes[0].dtype


def memory_bytes(instruction: Instruction, computation: Computation, module: Module) -> int:
  """Bytes that a kernel reads and writes, once each.

  Of an array that it only slices, the slice; of one that it updates in place, the update.
  """
  operands = [
    computation.by_name[name] for name in instruction.operands if name in computation.by_name
  ]
  if instruction.opcode == "copy-start":
    return 2 * instruction.shapes[0].bytes
  if instruction.opcode in ("fusion", "fusion-start", "async-start"):
    return sum(_fused_bytes(module.computations[name]) for name in instruction.called("calls"))
  if instruction.opcode in _SLICES:
    return 2 * instruction.bytes
  if instruction.opcode == "dynamic-update-slice":
    return 2 * operands[1].bytes
  return instruction.bytes + sum(operand.bytes for operand in operands)


def _fused_bytes(fused: Computation) -> int:
  users: dict[str, list[Instruction]] = {}
  for instruction in fused.instructions:
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  read = sum(
    _read_bytes(instruction, fused, users)
    for instruction in fused.instructions
    if instruction.opcode == "parameter"
  )
  root = fused.root
  outputs = [fused.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
  return read + sum(_written_bytes(output, fused) for output in outputs)


def _read_bytes(
  value: Instruction, fused: Computation, users: Mapping[str, list[Instruction]]
) -> int:
  """Bytes of a value that a fusion reads: of what it only slices or updates, that part."""
  parts = 0
  for user in users.get(value.name, ()):
    first = user.operands and user.operands[0] == value.name
    if user.opcode in _SLICES and first:
      parts += user.bytes
    elif user.opcode == "dynamic-update-slice" and first:
      continue  # in place: nothing of it is read
    elif user.opcode in _VIEWS and user.name in users:
      parts += _read_bytes(user, fused, users)
    else:
      return value.bytes
  return min(parts, value.bytes)


def _written_bytes(output: Instruction, fused: Computation) -> int:
  while output.opcode in _VIEWS and output.operands and output.operands[0] in fused.by_name:
    inner = fused.by_name[output.operands[0]]
    if inner.opcode not in (*_VIEWS, "dynamic-update-slice"):
      break
    output = inner
  if output.opcode == "dynamic-update-slice":
    return fused.by_name[output.operands[1]].bytes
  return output.bytes
