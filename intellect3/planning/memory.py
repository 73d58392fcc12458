"""What a compiled program holds on one device, and where its biggest buffers were written.

Place in the ring: beside it, over a compiled program and the records of `hlo`.
"""

import math
from typing import Any, NamedTuple

import jax

from intellect3.planning.hlo import HOST, PACKAGE, Computation, Instruction, Module
from intellect3.planning.programs import Program
from intellect3.training.state import TrainState

_NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "call")


class Memory(NamedTuple):
  """Bytes on one device.

  Attributes:
    parameters: the model's.
    optimizer: the optimizer's state.
    batch: the step's rows.
    reference: the reference model's parameters, which lie beside the step; set by the caller.
    activations: what loops of the forward pass keep for the backward pass; part of `temporaries`.
    temporaries: what the program allocates beside its arguments and results.
    arguments: parameters, optimizer, batch, and how XLA pads them.
    outputs: results that do not take an argument's place.
    peak: the most at one time, with what is donated counted once: arguments, outputs, temporaries
      and reference.
    host: in the host's memory, for this device: activations that are offloaded.
  """

  parameters: int
  optimizer: int
  batch: int
  reference: int
  activations: int
  temporaries: int
  arguments: int
  outputs: int
  peak: int
  host: int = 0


class Buffer(NamedTuple):
  """One of the biggest values of a program: its array, what made it, and where it was written."""

  bytes: int
  array: str
  opcode: str
  source: str


def measure(program: Program, compiled: Any, module: Module) -> Memory:
  """Reads a compiled program's memory.

  Args:
    program: what was compiled.
    compiled: of `jax.stages.Lowered.compile`.
    module: its text, parsed.
  """
  stats = compiled.memory_analysis()
  trains = isinstance(program.first, TrainState)
  params = program.first.params if trains else program.first
  arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return Memory(
    parameters=tree_bytes(params),
    optimizer=tree_bytes(program.first.opt_state) if trains else 0,
    batch=tree_bytes(program.batch),
    reference=0,
    activations=saved_bytes(module),
    temporaries=temporaries,
    arguments=arguments,
    outputs=outputs,
    peak=arguments + outputs + temporaries,
    host=stats.host_argument_size_in_bytes
    + stats.host_temp_size_in_bytes
    + stats.host_output_size_in_bytes
    - stats.host_alias_size_in_bytes,
  )


def tree_bytes(tree: Any) -> int:
  """Bytes of a tree of sharded shapes on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def saved_bytes(module: Module) -> int:
  """Bytes of what the loops of a forward pass stack up, one entry an iteration.

  With `jax.grad` over a scan of layers these are the residuals: what the remat policy saves.
  """
  return max(
    (
      sum(_stacked(loop, module) for loop in computation.instructions if _is_forward(loop))
      for computation, _ in module.walk()
    ),
    default=0,
  )


def biggest(module: Module, count: int = 12) -> tuple[Buffer, ...]:
  """The largest values that some kernel of the program writes, one for each place in the source.

  A value that is updated in place counts with its whole array.
  """
  found: dict[tuple[str, str], Buffer] = {}
  for computation, _ in module.walk():
    for instruction in computation.instructions:
      if instruction.opcode in _NO_BUFFER or instruction.opcode.endswith("-done"):
        continue
      for shape in instruction.shapes:
        if shape.space == HOST:
          continue
        array = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
        source = module.source(instruction, PACKAGE)
        found.setdefault((array, source), Buffer(shape.bytes, array, instruction.opcode, source))
  return tuple(sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count])


def _is_forward(loop: Instruction) -> bool:
  return loop.opcode == "while" and "jvp(" in loop.op_name and "transpose(" not in loop.op_name


def _stacked(loop: Instruction, module: Module) -> int:
  body = module.computations[loop.called("body")[0]]
  carried = zip(loop.shapes, body.root.operands, strict=False)
  return sum(
    shape.bytes
    for index, (shape, value) in enumerate(carried)
    if shape.dims[:1] == (loop.trip_count,)
    and shape.space != HOST
    and not _unchanged(value, index, body)
  )


def _unchanged(value: str, index: int, body: Computation) -> bool:
  """Whether a loop hands an element of its carry on as it is."""
  made = body.by_name.get(value)
  if (
    made is None
    or made.opcode != "get-tuple-element"
    or f"index={index}" not in (made.attributes.replace(" ", "").split(","))
  ):
    return False
  taken_from = body.by_name.get(made.operands[0])
  return taken_from is not None and taken_from.opcode == "parameter"
