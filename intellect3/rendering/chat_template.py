"""Chat messages to text by the Jinja template that a model directory brings.

Place in the ring: a server's chat route renders prompts with it, so that any model is prompted as
its makers meant. Templates are data from a model directory: they run in a sandbox.
"""

import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Entries of `tokenizer_config.json` that templates may use."""


RESERVED = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})
"""Names that no further variable of a rendering may have: `render` gives them their meaning."""


class ChatTemplate:
  """A compiled template. Immutable; may be used on any thread.

  Attributes:
    takes_parts: whether a message's content may be a list of parts; else it must be text.
  """

  def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
    """Compiles a template.

    Args:
      source: Jinja text.
      special_tokens: variables of every rendering.

    Raises:
      ValueError: the template has an error.
    """
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    try:
      self._template = environment.from_string(source)
      loops = environment.parse(source).find_all(nodes.For)
    except jinja2.TemplateError as error:
      raise ValueError(f"chat template: {error}") from error
    self.takes_parts = any(_is_content(loop.iter) for loop in loops)
    self._special_tokens = dict(special_tokens or {})

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> str:
    """The text of a conversation.

    Args:
      messages: in the OpenAI form; the arguments of tool calls are objects, not text.
      tools: offered, in the OpenAI form.
      add_generation_prompt: whether the opening of the assistant's turn comes last.
      **variables: further variables of the template, such as `enable_thinking`; none of RESERVED.

    Raises:
      ValueError: the template refused, or it could not be rendered with these messages.
    """
    try:
      return self._template.render(
        **(self._special_tokens | variables),
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
      )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
      raise ValueError(f"chat template: {error}") from error


def load(
  directory: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> ChatTemplate | None:
  """The template of a model directory: `chat_template.jinja`, else `tokenizer_config.json`'s.

  Args:
    directory: of the model.
    path: of another template, or None.

  Returns:
    None where there is none.

  Raises:
    ValueError: a template or file that cannot be read.
  """
  directory = pathlib.Path(directory)
  config_path = directory / "tokenizer_config.json"
  config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
  source = config.get("chat_template")
  if isinstance(source, list):
    source = {entry["name"]: entry["template"] for entry in source}.get("default")
  file = pathlib.Path(path) if path is not None else directory / "chat_template.jinja"
  if path is not None and not file.is_file():
    raise ValueError(f"chat_template: expected a file, got {path}")
  if file.is_file():
    source = file.read_text(encoding="utf-8")
  if source is None:
    return None
  return ChatTemplate(source, _special_tokens(config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
  tokens = {}
  for name in SPECIAL_TOKENS:
    token = config.get(name)
    if isinstance(token, dict):
      token = token.get("content")
    if isinstance(token, str):
      tokens[name] = token
  return tokens


def _is_content(node: nodes.Node) -> bool:
  """Whether an expression is a message's content: `content`, `m.content` or `m['content']`."""
  if isinstance(node, nodes.Getitem):
    node = node.arg
    return isinstance(node, nodes.Const) and node.value == "content"
  if isinstance(node, nodes.Getattr):
    return node.attr == "content"
  return isinstance(node, nodes.Name) and node.name == "content"


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
  # Jinja's own filter escapes what is special in HTML, which no model was trained on.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
