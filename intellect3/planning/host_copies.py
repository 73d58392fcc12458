"""What a compiled program moves between a device's memory and its host's: activations offloaded.

Place in the ring: beside it, over the records of `hlo`.
"""

from typing import Literal, NamedTuple

from intellect3.planning.hlo import HOST, Computation, Instruction, Module, Shape

_COPIES = frozenset(
  ("copy", "fusion", "dynamic-slice", "dynamic-update-slice", "slice", "async", "custom-call")
)
ALLOCATES = 'custom_call_target="AllocateBuffer"'
"""Of an instruction that names memory and does nothing."""


class HostCopy(NamedTuple):
  """One copy over the bus between a device and its host.

  Attributes:
    name: the instruction's (the starting one's).
    kind: `d2h`, from the device to the host, or `h2d`.
    bytes: that travel.
    start: whether it only begins here; a `-done` instruction waits for it.
  """

  name: str
  kind: Literal["d2h", "h2d"]
  bytes: int
  start: bool


def find(instruction: Instruction, computation: Computation, module: Module) -> HostCopy | None:
  """The copy that an instruction is or begins; None where it is none.

  Of an array on the host that is only sliced, or updated in place, the slice travels.

  Args:
    instruction: one of the computation's.
    computation: where it stands; its operands' memories are looked up there.
    module: for what a fusion or an `async-start` wraps.
  """
  opcode = instruction.opcode.removesuffix("-start")
  start = opcode != instruction.opcode
  if opcode not in _COPIES or ALLOCATES in instruction.attributes:
    return None
  operands = [
    shape
    for name in instruction.operands
    if name in computation.by_name
    for shape in computation.by_name[name].shapes
  ]
  results = _results(instruction, len(operands)) if start else list(instruction.shapes)
  to_host = [shape for shape in results if shape.space == HOST]
  from_host = [shape for shape in operands if shape.space == HOST]
  here = [shape for shape in results if shape.space != HOST]
  if to_host:
    update = _update(instruction, computation, module)
    whole = sum(shape.bytes for shape in to_host)
    size = whole if update is None else update.bytes
    return HostCopy(instruction.name, "d2h", size, start)
  if from_host and here:
    size = min(sum(shape.bytes for shape in here), sum(shape.bytes for shape in from_host))
    return HostCopy(instruction.name, "h2d", size, start)
  return None


def _results(instruction: Instruction, operands: int) -> list[Shape]:
  """What a starting instruction will have made: `copy-start` names it first, others last."""
  if instruction.opcode == "copy-start":
    return list(instruction.shapes[:1])
  return [shape for shape in instruction.shapes[operands:] if shape.dims]


def _update(instruction: Instruction, computation: Computation, module: Module) -> Shape | None:
  """The part of an array that an instruction writes in place."""
  if instruction.opcode.removesuffix("-start") == "dynamic-update-slice":
    made = computation.by_name.get(instruction.operands[1])
    return made.shapes[0] if made else None
  for name in instruction.called("calls"):
    inner = module.computations[name]
    if inner.root.opcode == "dynamic-update-slice":
      made = inner.by_name.get(inner.root.operands[1])
      return made.shapes[0] if made else None
  return None
