"""Reasoning and tool calls of GLM-4.5's output, whole and cut into pieces anywhere."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.rendering import glm45
from intellect3.rendering.glm45 import CallStream, ReasoningStream
from intellect3.rendering.markers import Scanner, longest_beginning


def tool(name, **properties):
  parameters = {"type": "object", "properties": properties}
  return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", city={"type": "string"}, days={"type": "integer"})
TOOLS = [WEATHER, tool("now")]


def call(name, **arguments):
  lines = [f"<tool_call>{name}\n"]
  for key, value in arguments.items():
    lines.append(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n")
  return "".join(lines) + "</tool_call>"


@pytest.mark.parametrize(
  ("text", "thinking", "expected"),
  [
    ("answer", False, ("", "answer")),
    ("thought", True, ("thought", "")),
    ("\n<think>thought</think>\nanswer", False, ("thought", "\nanswer")),
    ("<think>thought</think>answer", True, ("thought", "answer")),
    ("thought</think>answer", True, ("thought", "answer")),
    ("thought<tool_call>x", True, ("thought", "<tool_call>x")),
    ("a<tool_call>b</think>c", True, ("a<tool_call>b", "c")),
    ("say <think> aloud", False, ("", "say <think> aloud")),
    ("</think>answer", True, ("", "answer")),
  ],
)
def test_reasoning_is_split_off(text, thinking, expected):
  assert glm45.split_reasoning(text, thinking=thinking) == expected


def test_calls_are_parsed():
  text = "Let me see.\n" + call("weather", city="Paris", days="2") + "\n" + call("now")
  content, calls = glm45.parse_calls(text, TOOLS)
  assert content == "Let me see."
  assert calls == [("weather", '{"city": "Paris", "days": 2}'), ("now", "{}")]


@pytest.mark.parametrize(
  ("schema", "written", "value"),
  [
    ({"type": "string"}, "007", "007"),
    ({"type": "string"}, '"quoted"', '"quoted"'),
    ({"type": "string"}, "a\nb <x> \\ é", "a\nb <x> \\ é"),
    ({"type": ["string", "null"]}, "3", "3"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "3", "3"),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"type": "integer"}, "3", 3),
    ({"type": "number"}, "1e3", 1000.0),
    ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
    ({"type": "boolean"}, "True", True),
    ({"type": "array"}, "['x', 'y']", ["x", "y"]),
    ({"type": "integer"}, "three", "three"),
    ({}, "[1, 2]", [1, 2]),
    ({}, "plain", "plain"),
  ],
)
def test_values_have_the_type_that_the_schema_says(schema, written, value):
  text = call("f", x=written)
  _, [(_, arguments)] = glm45.parse_calls(text, [tool("f", x=schema)])
  assert json.loads(arguments) == {"x": value}


@pytest.mark.parametrize(
  ("text", "content", "count"),
  [
    ("<tool_call>weather\n<arg_key>city</arg_key>\n<arg_val", "", 0),
    (call("now") + "<tool_call>weather\n", "", 1),
    ("a" + call("unknown", x="1") + call("now"), "a", 1),
    ("no call <tool_", "no call <tool_", 0),
    (" kept ", " kept ", 0),
    (call("now") + " after", "", 1),
    ("<tool_call>\nnow\n</tool_call>", "", 1),
    ("<tool_call>now</tool_call>", "", 1),
  ],
)
def test_half_unknown_and_late_parts_are_dropped(text, content, count):
  assert glm45.parse_calls(text, TOOLS) == (content, [("now", "{}")] * count)


PARTS = st.sampled_from(
  [
    "<think>",
    "</think>",
    "\n",
    " ",
    "words",
    "<",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>city</arg_key>",
    "<arg_value>Paris</arg_value>",
    "weather\n",
    call("weather", city='Pa"ris', days="2"),
    call("now"),
    call("unknown", a="b"),
  ]
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)


def pieces_of(text, seed):
  generator = random.Random(seed)
  while text:
    length = generator.randrange(1, 6)
    yield text[:length]
    text = text[length:]


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 2**32), st.booleans())
def test_pieces_say_what_the_whole_says(text, seed, thinking):
  stream = ReasoningStream(thinking=thinking)
  told = [stream.feed(piece) for piece in pieces_of(text, seed)] + [stream.end()]
  reasoning, rest = ("".join(part) for part in zip(*told, strict=True))
  expected = glm45.split_reasoning(text, thinking=thinking)
  # A stream cannot know that </think> is still to come after a tool call.
  end, begun = text.find("</think>"), text.find("<tool_call>")
  if not 0 <= begun < end:
    assert (reasoning, rest) == expected
  calls = CallStream(TOOLS)
  pieces = [piece for part in pieces_of(rest, seed) for piece in calls.feed(part)] + calls.end()
  whole = CallStream(TOOLS)
  expected = [*whole.feed(rest), *whole.end()]
  assert merged(pieces) == merged(expected)
  assert (calls.whole_calls, calls.complete) == (whole.whole_calls, whole.complete)


def merged(pieces):
  content, calls = "", {}
  for piece in pieces:
    content += piece.content
    if piece.name is not None:
      calls[piece.call] = [piece.name, ""]
    if piece.arguments:
      calls[piece.call][1] += piece.arguments
  return content, calls


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_whole_calls_have_arguments_that_are_json(text):
  for _, arguments in glm45.parse_calls(text, TOOLS)[1]:
    assert isinstance(json.loads(arguments), dict)


def test_arguments_come_as_they_are_sampled():
  stream = CallStream(TOOLS)
  told = [stream.feed(character) for character in call("weather", city="Rome")]
  after = [len(pieces) for pieces in told]
  assert sum(after[: call("weather", city="Rome").index("Rome") + 3]) >= 3


def test_markers_are_found_wherever_they_are_cut():
  assert longest_beginning("abc<to", ["<tool>", "cb"]) == 3
  assert longest_beginning("abc", ["abc"]) == 0
  scanner = Scanner()
  scanner.feed("one <to")
  assert scanner.until("<tool>", "</x>") == ("one ", None)
  scanner.feed("ol>two</x>")
  assert scanner.until("<tool>", "</x>") == ("", "<tool>")
  assert scanner.until("<tool>", "</x>") == ("two", "</x>")
  assert scanner.rest() == ""
