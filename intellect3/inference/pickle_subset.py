"""The part of the pickle format that weight payloads need, as plain values.

Neither direction runs anything: what pickle would call is a `Call` to be matched by whoever reads
it, and a name is a `Global` that is never looked up. Operations outside the subset raise.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
  """A name in a module; only a name."""

  module: str
  name: str


@dataclass(frozen=True)
class Call:
  """What pickle calls with which arguments. Written twice, one object is stored once."""

  function: Global
  arguments: tuple


@dataclass(frozen=True)
class Persistent:
  """A persistent id."""

  value: Any


@dataclass(frozen=True)
class Chunks:
  """Bytes in pieces (memoryviews of bytes too), written without being put together first."""

  pieces: Sequence[bytes | memoryview]


def dump(value: Any, *, protocol: int = 4) -> bytes:
  """Writes one pickle.

  Args:
    value: of None, bools, ints, str, bytes, tuples, lists, dicts and the classes above.
    protocol: what the header says; 2 for a value without bytes.

  Raises:
    ValueError: a value of another type.
  """
  parts: list[bytes | memoryview] = [bytes([0x80, protocol])]
  _dump(value, parts, {})
  parts.append(b".")
  return b"".join(parts)


def load(data: bytes | memoryview, position: int = 0) -> tuple[Any, int]:
  """Reads one pickle.

  Args:
    data: what holds it.
    position: where it begins.

  Returns:
    The value, and the position after its end. Bytes come as memoryviews into `data`.

  Raises:
    ValueError: an operation outside the subset, or a pickle that is cut off or inconsistent.
  """
  reader = _Reader(memoryview(data), position)
  try:
    return reader.run(), reader.position
  except (IndexError, KeyError, struct.error, TypeError, UnicodeDecodeError) as error:
    raise ValueError(
      f"pickle: not well formed before byte {reader.position}: {type(error).__name__} {error}"
    ) from error


def _dump(value: Any, parts: list[bytes | memoryview], memo: dict[int, int]) -> None:
  match value:
    case None:
      parts.append(b"N")
    case bool():
      parts.append(b"\x88" if value else b"\x89")
    case int():
      parts.append(_integer(value))
    case str():
      text = value.encode()
      parts += [b"X", struct.pack("<I", len(text)), text]
    case bytes():
      parts += [b"\x8e", struct.pack("<Q", len(value)), value]
    case Chunks(pieces):
      parts += [b"\x8e", struct.pack("<Q", sum(map(len, pieces))), *pieces]
    case tuple():
      parts.append(b"(")
      for item in value:
        _dump(item, parts, memo)
      parts.append(b"t")
    case list():
      parts.append(b"](")
      for item in value:
        _dump(item, parts, memo)
      parts.append(b"e")
    case dict():
      parts.append(b"}(")
      for key, item in value.items():
        _dump(key, parts, memo)
        _dump(item, parts, memo)
      parts.append(b"u")
    case Global(module, name):
      parts.append(f"c{module}\n{name}\n".encode())
    case Persistent(inner):
      _dump(inner, parts, memo)
      parts.append(b"Q")
    case Call(function, arguments):
      if id(value) in memo:
        parts.append(b"j" + struct.pack("<I", memo[id(value)]))
        return
      _dump(function, parts, memo)
      _dump(arguments, parts, memo)
      memo[id(value)] = len(memo)
      parts += [b"R", b"r", struct.pack("<I", memo[id(value)])]
    case _:
      raise ValueError(f"pickle: expected a plain value, got {type(value).__name__}")


def _integer(value: int) -> bytes:
  if -(2**31) <= value < 2**31:
    return b"J" + struct.pack("<i", value)
  data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
  return b"\x8a" + bytes([len(data)]) + data


_MARK = object()


class _Reader:
  """A stack machine of some forty operations over one pickle."""

  def __init__(self, data: memoryview, position: int) -> None:
    self.position = position
    self._data = data
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self) -> Any:
    while True:
      operation = bytes(self._take(1))
      if operation == b".":
        value = self._pop()
        if self._stack:
          raise ValueError(f"pickle: more than one value at byte {self.position}")
        return value
      if operation not in _OPERATIONS:
        raise ValueError(
          f"pickle: operation {operation!r} at byte {self.position - 1} is not in the subset"
        )
      _OPERATIONS[operation](self)

  def _take(self, count: int) -> memoryview:
    end = self.position + count
    if end > len(self._data):
      raise ValueError(f"pickle: expected {count} bytes at {self.position}, got its end")
    piece = self._data[self.position : end]
    self.position = end
    return piece

  def _number(self, form: str) -> int:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _line(self) -> str:
    start = self.position
    while self._take(1) != b"\n":
      if self.position - start > 200:
        raise ValueError(f"pickle: expected a short line at byte {start}")
    return str(self._data[start : self.position - 1], "ascii")

  def _pop(self, kind: type | tuple[type, ...] = object) -> Any:
    value = self._stack.pop()
    if value is _MARK or not isinstance(value, kind):
      raise ValueError(f"pickle: expected {kind} before byte {self.position}")
    return value

  def _pop_to_mark(self) -> list[Any]:
    items = []
    while (value := self._stack.pop()) is not _MARK:
      items.append(value)
    return items[::-1]

  def _top(self, kind: type) -> Any:
    if not isinstance(self._stack[-1], kind):
      raise ValueError(f"pickle: expected a {kind.__name__} before byte {self.position}")
    return self._stack[-1]

  def push(self, value: Any) -> None:
    self._stack.append(value)

  def text(self, form: str) -> None:
    self.push(str(self._take(self._number(form)), "utf-8"))

  def data(self, form: str) -> None:
    self.push(self._take(self._number(form)))

  def integer(self, form: str) -> None:
    self.push(self._number(form))

  def long(self) -> None:
    self.push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

  def tuple(self, count: int) -> None:
    self.push(tuple([self._pop() for _ in range(count)][::-1]))

  def tuple_to_mark(self) -> None:
    self.push(tuple(self._pop_to_mark()))

  def append(self) -> None:
    value = self._pop()
    self._top(list).append(value)

  def appends(self) -> None:
    items = self._pop_to_mark()
    self._top(list).extend(items)

  def set_items(self) -> None:
    items = self._pop_to_mark()
    self._top(dict).update(zip(items[::2], items[1::2], strict=True))

  def set_item(self) -> None:
    value, key = self._pop(), self._pop()
    self._top(dict)[key] = value

  def name(self) -> None:
    module, name = self._line(), self._line()
    self.push(Global(module, name))

  def stack_name(self) -> None:
    name, module = self._pop(str), self._pop(str)
    self.push(Global(module, name))

  def call(self) -> None:
    arguments, function = self._pop(tuple), self._pop(Global)
    self.push(Call(function, arguments))

  def persistent(self) -> None:
    self.push(Persistent(self._pop()))

  def put(self, form: str | None) -> None:
    index = len(self._memo) if form is None else self._number(form)
    if self._stack[-1] is _MARK:
      raise ValueError(f"pickle: nothing to keep before byte {self.position}")
    self._memo[index] = self._stack[-1]

  def get(self, form: str) -> None:
    self.push(self._memo[self._number(form)])

  def header(self) -> None:
    version = self._number("<B")
    if not 2 <= version <= 5:
      raise ValueError(f"pickle: expected protocol 2 to 5, got {version}")

  def frame(self) -> None:
    self._number("<Q")  # frames help those who read from a pipe; this one has all of it


_OPERATIONS: dict[bytes, Callable[[_Reader], None]] = {
  b"\x80": _Reader.header,
  b"\x95": _Reader.frame,
  b"(": lambda reader: reader.push(_MARK),
  b"N": lambda reader: reader.push(None),
  b"\x88": lambda reader: reader.push(True),
  b"\x89": lambda reader: reader.push(False),
  b"K": lambda reader: reader.integer("<B"),
  b"M": lambda reader: reader.integer("<H"),
  b"J": lambda reader: reader.integer("<i"),
  b"\x8a": _Reader.long,
  b"X": lambda reader: reader.text("<I"),
  b"\x8c": lambda reader: reader.text("<B"),
  b"\x8d": lambda reader: reader.text("<Q"),
  b"B": lambda reader: reader.data("<I"),
  b"C": lambda reader: reader.data("<B"),
  b"\x8e": lambda reader: reader.data("<Q"),
  b")": lambda reader: reader.push(()),
  b"\x85": lambda reader: reader.tuple(1),
  b"\x86": lambda reader: reader.tuple(2),
  b"\x87": lambda reader: reader.tuple(3),
  b"t": _Reader.tuple_to_mark,
  b"]": lambda reader: reader.push([]),
  b"a": _Reader.append,
  b"e": _Reader.appends,
  b"}": lambda reader: reader.push({}),
  b"s": _Reader.set_item,
  b"u": _Reader.set_items,
  b"c": _Reader.name,
  b"\x93": _Reader.stack_name,
  b"R": _Reader.call,
  b"Q": _Reader.persistent,
  b"q": lambda reader: reader.put("<B"),
  b"r": lambda reader: reader.put("<I"),
  b"\x94": lambda reader: reader.put(None),
  b"h": lambda reader: reader.get("<B"),
  b"j": lambda reader: reader.get("<I"),
}
