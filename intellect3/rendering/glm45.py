"""What a GLM-4.5 model says, taken apart: reasoning, content, tool calls; whole or as it arrives.

Place in the ring: between sampled text and the messages of a chat. The format is

    <think>reasoning</think>content
    <tool_call>name
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

The model may leave out `<think>` where the prompt has opened it. Values of parameters whose schema
says string are taken as they stand; others are read as JSON, else as a Python literal, else they
are strings too. Calls of tools that were not offered, calls that were cut off, and text after the
first call are dropped. Arguments come as JSON text in the form that `json.dumps` writes.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from intellect3.rendering.markers import Scanner

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"

Tool = Mapping[str, Any]
"""A tool in the OpenAI form: `{"type": "function", "function": {"name", "parameters", ..}}`."""


class Call(NamedTuple):
  """A whole tool call; `arguments` is the text of a JSON object."""

  name: str
  arguments: str


class Piece(NamedTuple):
  """What a piece of text brought.

  Attributes:
    content: text for the user, or empty.
    call: number of the tool call that the rest is about, from 0.
    name: of the tool, where the call begins; else None.
    arguments: further text of the call's arguments.
  """

  content: str = ""
  call: int = -1
  name: str | None = None
  arguments: str = ""


def split_reasoning(text: str, *, thinking: bool) -> tuple[str, str]:
  """Reasoning and the rest of a whole output.

  Args:
    text: what was sampled.
    thinking: whether the output begins in the reasoning even without `<think>`.
  """
  begun = text.lstrip()
  if begun.startswith(THINK):
    text = begun[len(THINK) :]
  elif not thinking:
    return "", text
  reasoning, end, rest = text.partition(END_THINK)
  if not end:
    reasoning, end, rest = text.partition(CALL)
    rest = end + rest
  return reasoning, rest


def parse_calls(text: str, tools: Sequence[Tool]) -> tuple[str, list[Call]]:
  """Content and whole tool calls of an output without its reasoning."""
  stream = CallStream(tools)
  pieces = [*stream.feed(text), *stream.end()]
  content = "".join(piece.content for piece in pieces)
  calls: list[Call] = []
  for piece in pieces:
    if piece.name is not None:
      calls.append(Call(piece.name, ""))
    if piece.arguments:
      calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + piece.arguments)
  if not stream.complete:
    calls = calls[: stream.whole_calls]
  return (content.strip() if CALL in text else content), calls


class ReasoningStream:
  """`split_reasoning` of an output that arrives in pieces.

  A tool call ends the reasoning even if `</think>` is still to come: that cannot be known.
  """

  def __init__(self, *, thinking: bool):
    self._thinking = thinking
    self._beginning: str | None = ""
    self._reasoning = True
    self._scanner = Scanner()

  def feed(self, text: str) -> tuple[str, str]:
    """Takes a piece; returns the further reasoning and the further rest."""
    if self._beginning is not None:
      self._beginning += text
      begun = self._beginning.lstrip()
      if len(begun) < len(THINK) and THINK.startswith(begun):
        return "", ""
      text = self._begin()
    if not self._reasoning:
      return "", text
    self._scanner.feed(text)
    reasoning, marker = self._scanner.until(END_THINK, CALL)
    if marker is None:
      return reasoning, ""
    self._reasoning = False
    return reasoning, (CALL if marker == CALL else "") + self._scanner.rest()

  def end(self) -> tuple[str, str]:
    """What still waited when the output ended."""
    text = self._scanner.rest() if self._beginning is None else self._begin()
    return (text, "") if self._reasoning else ("", text)

  def _begin(self) -> str:
    assert self._beginning is not None
    text, self._beginning = self._beginning, None
    begun = text.lstrip()
    if begun.startswith(THINK):
      return begun[len(THINK) :]
    self._reasoning = self._thinking
    return text


class CallStream:
  """`parse_calls` of an output that arrives in pieces; arguments come as they are sampled."""

  def __init__(self, tools: Sequence[Tool]):
    self._parameters = {
      tool["function"]["name"]: _properties(tool["function"].get("parameters")) for tool in tools
    }
    self._scanner = Scanner()
    self._step = self._content
    self._tool: str | None = None
    self._held = ""
    self._key = ""
    self._empty = self._quoted = False
    self._call = -1
    self.whole_calls = 0

  @property
  def complete(self) -> bool:
    """Whether no call is half said."""
    return self._step == self._content

  def feed(self, text: str) -> list[Piece]:
    """Takes a piece of text; returns what it brought, in order."""
    self._scanner.feed(text)
    pieces: list[Piece] = []
    while self._step(pieces):
      pass
    return pieces

  def end(self) -> list[Piece]:
    """What still waited when the output ended."""
    if not self.complete or self.whole_calls:
      return []
    rest = self._scanner.rest()
    return [Piece(rest)] if rest else []

  # Each step reads to its next marker; it returns whether it got there.

  def _content(self, pieces: list[Piece]) -> bool:
    text, marker = self._scanner.until(CALL)
    if text and not self.whole_calls:
      pieces.append(Piece(text))
    if marker is None:
      return False
    self._held, self._tool, self._empty = "", None, True
    self._step = self._name
    return True

  def _name(self, pieces: list[Piece]) -> bool:
    text, marker = self._scanner.until("\n", KEY, END_CALL)
    self._held += text
    name = self._held.strip()
    if marker is None or (marker == "\n" and not name):
      return marker is not None
    if name in self._parameters:
      self._tool = name
      self._call += 1
      pieces.append(Piece(call=self._call, name=name))
    if marker == END_CALL:
      return self._close(pieces)
    self._held = ""
    self._step = self._argument_name if marker == KEY else self._between
    return True

  def _between(self, pieces: list[Piece]) -> bool:
    _, marker = self._scanner.until(KEY, END_CALL)
    if marker == END_CALL:
      return self._close(pieces)
    if marker == KEY:
      self._held = ""
      self._step = self._argument_name
    return marker is not None

  def _argument_name(self, pieces: list[Piece]) -> bool:
    text, marker = self._scanner.until(END_KEY)
    self._held += text
    if marker is None:
      return False
    self._key = self._held.strip()
    self._say(pieces, ("{" if self._empty else ", ") + _json(self._key) + ": ")
    self._empty = False
    self._step = self._before_value
    return True

  def _before_value(self, pieces: list[Piece]) -> bool:
    _, marker = self._scanner.until(VALUE)
    if marker is None:
      return False
    properties = self._parameters.get(self._tool or "", {})
    self._held = ""
    self._quoted = _is_string(properties.get(self._key))
    if self._quoted:
      self._say(pieces, '"')
    self._step = self._value
    return True

  def _value(self, pieces: list[Piece]) -> bool:
    text, marker = self._scanner.until(END_VALUE)
    if self._quoted:
      self._say(pieces, _json(text)[1:-1])
    else:
      self._held += text
    if marker is None:
      return False
    self._say(pieces, '"' if self._quoted else _json(_read(self._held)))
    self._step = self._between
    return True

  def _close(self, pieces: list[Piece]) -> bool:
    self._say(pieces, "{}" if self._empty else "}")
    if self._tool is not None:
      self.whole_calls += 1
    self._step = self._content
    return True

  def _say(self, pieces: list[Piece], arguments: str) -> None:
    if arguments and self._tool is not None:
      pieces.append(Piece(call=self._call, arguments=arguments))


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)


def _read(text: str) -> Any:
  """A value that its schema does not call a string."""
  try:
    return json.loads(text)
  except ValueError:
    pass
  try:
    value = ast.literal_eval(text.strip())
    json.dumps(value, allow_nan=False)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text
  return value


def _properties(parameters: Any) -> Mapping[str, Any]:
  properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
  return properties if isinstance(properties, Mapping) else {}


def _is_string(schema: Any) -> bool:
  """Whether a JSON schema admits strings, and besides them nothing but null."""
  if not isinstance(schema, Mapping):
    return False
  for name in ("anyOf", "oneOf"):
    if isinstance(schema.get(name), list):
      options = [option for option in schema[name] if option != {"type": "null"}]
      return bool(options) and all(map(_is_string, options))
  if "type" not in schema and isinstance(schema.get("enum"), list):
    return bool(schema["enum"]) and all(isinstance(value, str) for value in schema["enum"])
  kinds = schema.get("type")
  kinds = set(kinds) if isinstance(kinds, list) else {kinds}
  return kinds - {"null"} == {"string"}
