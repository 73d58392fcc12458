"""A compiled program's text, read into records: computations of instructions, as scheduled.

Place in the ring: beside it; text in, values out. What a program moves (`collectives`), keeps
(`memory`) and takes (`schedule`) is read off these records. The format is that of
`jax.stages.Compiled.as_text()`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_BITS = {
  "pred": 8,
  **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
  **dict.fromkeys(("s8", "u8"), 8),
  **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
  **dict.fromkeys(("s32", "u32", "f32"), 32),
  **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
  "c128": 128,
}
_ARRAY = re.compile(
  r"\b(?P<dtype>[a-z][a-z0-9]*)\[(?P<dims>[\d,<=]*)\](?:\{[^{}]*?S\((?P<space>\d+)\)[^{}]*\})?"
)
PACKAGE = "intellect3/"
"""Where what is planned is written: of stack frames the innermost in it is named."""
HOST = 5
"""XLA's number for the host's memory, as a layout names it: `f32[8]{0:S(5)}`."""
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_CALLED = re.compile(
  r"(?P<role>calls|body|condition|to_apply|true_computation|false_computation|called_computations|"
  r"branch_computations)=(?:%(?P<one>[\w.\-]+)|\{(?P<many>[^}]*)\})"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NOMINAL = re.compile(r'"nominal_trip_count":\{"n":"(\d+)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TABLE_ROW = re.compile(r"^(?P<id>\d+) (?P<row>.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")


class Shape(NamedTuple):
  """One array: its dtype as XLA names it (f32, bf16, ..), its dimensions, and its memory.

  The memory is 0 for the device's main one, `HOST` for the host's.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def elements(self) -> int:
    """Number of entries."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Size in bytes; 0 for tokens and opaque values."""
    bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
    return -(-self.elements * bits // 8)


class Instruction(NamedTuple):
  """One instruction.

  Attributes:
    name: without the percent sign.
    shapes: of its result, a tuple's arrays in order; nested tuples are flattened.
    opcode: `fusion`, `all-gather-start`, ..
    operands: names, in order.
    literal: what stands between its parentheses, for parameters and constants.
    attributes: what follows them.
    result: the result's type as it is written.
    root: whether its computation returns it.
  """

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  literal: str
  attributes: str
  result: str
  root: bool

  @property
  def bytes(self) -> int:
    """Size of the result."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def trip_count(self) -> int | None:
    """How often a `while` runs; None where the data decides it."""
    found = _TRIPS.search(self.attributes)
    return int(found[1]) if found else None

  @property
  def nominal_trip_count(self) -> int | None:
    """How often a `while` runs as far as is known, or was told by `with_nominal`."""
    found = _NOMINAL.search(self.attributes)
    return int(found[1]) if found else self.trip_count

  @property
  def op_name(self) -> str:
    """The traced function's path; empty where XLA keeps none."""
    found = _OP_NAME.search(self.attributes)
    return found[1] if found else ""

  def called(self, *roles: str) -> tuple[str, ...]:
    """Computations that it refers to in one of the roles (`calls`, `body`, ..)."""
    names: list[str] = []
    for match in _CALLED.finditer(self.attributes):
      if match["role"] in roles:
        names += [match["one"]] if match["one"] else _NAME.findall(match["many"])
    return tuple(names)


class Computation(NamedTuple):
  """Instructions in their order, which is the schedule where the module is scheduled."""

  name: str
  instructions: tuple[Instruction, ...]
  by_name: Mapping[str, Instruction]

  @property
  def root(self) -> Instruction:
    """What it returns."""
    return next((i for i in self.instructions if i.root), self.instructions[-1])


class Module(NamedTuple):
  """A program.

  Attributes:
    computations: by name.
    entry: the name of the first.
    scheduled: whether the order of instructions is that of execution.
    frames: stack frame -> (`file`, line, the frame that called it or 0).
  """

  computations: Mapping[str, Computation]
  entry: str
  scheduled: bool
  frames: Mapping[int, tuple[str, int, int]]

  def walk(self) -> Iterator[tuple[Computation, int]]:
    """Every computation that runs by itself, with how often: the entry, loop bodies, branches.

    A `while` without a known or nominal trip count counts once; `unknown_loops` names those.
    """
    yield from self._walk(self.entry, 1)

  def _walk(self, name: str, times: int) -> Iterator[tuple[Computation, int]]:
    computation = self.computations[name]
    yield computation, times
    for instruction in computation.instructions:
      for body, trips in runs(instruction):
        yield from self._walk(body, times * trips)

  def unknown_loops(self) -> tuple[str, ...]:
    """The op names of the loops whose trip count XLA does not know."""
    return tuple(
      instruction.op_name or instruction.name
      for computation, _ in self.walk()
      for instruction in computation.instructions
      if instruction.opcode == "while" and instruction.nominal_trip_count is None
    )

  def source(self, instruction: Instruction, inside: str) -> str:
    """Where it was written: the innermost frame whose file's path holds `inside`, as `file:line`.

    Falls back to the op name; empty where there is neither.
    """
    found = _FRAME.search(instruction.attributes)
    frame = int(found[1]) if found else 0
    while frame in self.frames:
      file, line, caller = self.frames[frame]
      if inside in file:
        return f"{file[file.rindex(inside) :]}:{line}"
      frame = caller if caller != frame else 0
    return instruction.op_name


def runs(instruction: Instruction) -> tuple[tuple[str, int], ...]:
  """The computations that an instruction runs by themselves, with how often."""
  if instruction.opcode == "while":
    trips = instruction.nominal_trip_count
    return tuple((body, 1 if trips is None else trips) for body in instruction.called("body"))
  if instruction.opcode == "conditional":
    roles = ("true_computation", "false_computation", "branch_computations")
    return tuple((branch, 1) for branch in instruction.called(*roles))
  if instruction.opcode == "call":
    return tuple((called, 1) for called in instruction.called("to_apply", "called_computations"))
  return ()


def with_nominal(module: Module, trips: Callable[[Instruction], int | None]) -> Module:
  """The module with what is expected of loops whose trip count the data decides.

  Args:
    module: a program.
    trips: of a `while` without a count; None leaves it unknown.
  """

  def told(instruction: Instruction) -> Instruction:
    if instruction.opcode != "while" or instruction.trip_count is not None:
      return instruction
    count = trips(instruction)
    if count is None:
      return instruction
    more = f', "nominal_trip_count":{{"n":"{count}"}}'
    return instruction._replace(attributes=instruction.attributes + more)

  computations = {}
  for name, computation in module.computations.items():
    made = tuple(told(one) for one in computation.instructions)
    computations[name] = Computation(name, made, {one.name: one for one in made})
  return module._replace(computations=computations)


def parse(text: str) -> Module:
  """Reads a module's text.

  Raises:
    ValueError: no computation is marked as the entry.
  """
  computations: dict[str, Computation] = {}
  entry, name = None, None
  lines: list[str] = []
  tables: dict[str, dict[int, str]] = {}
  table: dict[int, str] | None = None
  for line in text.splitlines():
    if name is not None:
      if line.startswith("}"):
        computations[name] = _computation(name, lines)
        name = None
      else:
        lines.append(line)
      continue
    header = _HEADER.match(line)
    if header is not None:
      name, lines, table = header["name"], [], None
      entry = name if header["entry"] else entry
    elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      table = tables.setdefault(line, {})
    elif table is not None and (row := _TABLE_ROW.match(line)) is not None:
      table[int(row["id"])] = row["row"]
  if entry is None:
    raise ValueError("module: expected a computation marked ENTRY, got none")
  scheduled = "is_scheduled=true" in text[: text.find("\n")]
  counted = {name: _with_trips(made, computations) for name, made in computations.items()}
  return Module(counted, entry, scheduled, _frames(tables))


def shapes_of(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, a tuple's in order."""
  return tuple(
    Shape(
      match["dtype"],
      tuple(int(size.removeprefix("<=")) for size in match["dims"].split(",") if size),
      int(match["space"] or 0),
    )
    for match in _ARRAY.finditer(text)
  )


def _computation(name: str, lines: list[str]) -> Computation:
  instructions = tuple(
    _instruction(match) for line in lines if (match := _INSTRUCTION.match(line)) is not None
  )
  return Computation(name, instructions, {i.name: i for i in instructions})


def _instruction(match: re.Match[str]) -> Instruction:
  rest = match["rest"]
  if rest.startswith("("):
    end = _closing(rest, 0)
  else:
    end = rest.index(" ") if " " in rest else len(rest)
    while rest.count("{", 0, end) != rest.count("}", 0, end):  # a layout may hold a space
      end = rest.index(" ", end + 1)
  result, rest = rest[: end + 1].strip(), rest[end + 1 :].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  inner = rest[opening + 1 : closing]
  return Instruction(
    name=match["name"],
    shapes=shapes_of(result),
    opcode=rest[:opening],
    operands=tuple(_NAME.findall(inner)),
    literal=inner,
    attributes=rest[closing + 1 :],
    result=result,
    root=match["root"] is not None,
  )


def _with_trips(computation: Computation, computations: Mapping[str, Computation]) -> Computation:
  """The computation with the trip counts that XLA left out where its loops show them (on TPUs)."""
  changed = [_counted(i, computation, computations) for i in computation.instructions]
  return Computation(computation.name, tuple(changed), {i.name: i for i in changed})


def _counted(
  loop: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> Instruction:
  """A loop from a constant by a constant step to below a constant says how often it runs."""
  if loop.opcode != "while" or loop.trip_count is not None:
    return loop
  condition = computations.get(loop.called("condition")[0])
  body = computations.get(loop.called("body")[0])
  if condition is None or body is None:
    return loop
  test = condition.root
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return loop
  index = _element(condition.by_name.get(test.operands[0]))
  start = computation.by_name.get(loop.operands[0])
  if index is None or start is None or start.opcode != "tuple":
    return loop
  step = body.by_name.get(body.root.operands[index]) if body.root.opcode == "tuple" else None
  if step is None or step.opcode != "add":
    return loop
  counter, by = (body.by_name.get(name) for name in step.operands)
  if _element(counter) != index:
    return loop
  limit = condition.by_name.get(test.operands[1])
  first = computation.by_name.get(start.operands[index])
  while first is not None and first.opcode == "copy":
    first = computation.by_name.get(first.operands[0])
  numbers = [_whole(one) for one in (first, limit, by)]
  if any(number is None for number in numbers) or not numbers[2]:
    return loop
  low, high, stride = (number or 0 for number in numbers)
  trips = max(0, -(-(high - low) // stride))
  return loop._replace(attributes=f'{loop.attributes}, "known_trip_count":{{"n":"{trips}"}}')


def _element(value: Instruction | None) -> int | None:
  """Which element of a loop's carry a value is."""
  if value is None or value.opcode != "get-tuple-element":
    return None
  found = re.search(r"index=(\d+)", value.attributes)
  return int(found[1]) if found else None


def _whole(value: Instruction | None) -> int | None:
  """The number that a constant holds."""
  if value is None or value.opcode != "constant" or not value.literal.lstrip("-").isdigit():
    return None
  return int(value.literal)


def _closing(text: str, opening: int) -> int:
  depth = 0
  for index in range(opening, len(text)):
    if text[index] == "(":
      depth += 1
    elif text[index] == ")":
      depth -= 1
      if depth == 0:
        return index
  return len(text) - 1


def _frames(tables: Mapping[str, Mapping[int, str]]) -> dict[int, tuple[str, int, int]]:
  def fields(name: str) -> dict[int, dict[str, str]]:
    return {number: dict(_FIELD.findall(row)) for number, row in tables.get(name, {}).items()}

  files = {number: row.strip('"') for number, row in tables.get("FileNames", {}).items()}
  frames, places = fields("StackFrames"), fields("FileLocations")
  # Callers are written one too high, so that 1 is no caller: the first frame shows which it is.
  shift = 1 if frames.get(1, {}).get("parent_frame_id") == "1" else 0
  result = {}
  for number, frame in frames.items():
    place = places.get(int(frame.get("file_location_id", 0)), {})
    file = files.get(int(place.get("file_name_id", 0)), "")
    caller = int(frame.get("parent_frame_id", shift)) - shift
    result[number] = (file, int(place.get("line", 0)), caller)
  return result
