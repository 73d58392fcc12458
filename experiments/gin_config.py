"""Reads gin files for a run: one self-contained text, checked whole before anything starts.

gin's dynamic registration imports the modules that a file names. The roles without jax
(orchestrator and workers) read the same file: there the modules that need jax are stood in for by
placeholders that accept any binding and refuse to be called. The process that starts a run reads
the file without placeholders first, so a misspelling anywhere is found there.
"""

import importlib
import io
import pathlib
import re
import sys
import tokenize
import types
from collections.abc import Callable, Sequence
from typing import Any

import gin

_INCLUDE = re.compile(r"""^include\s+['"](?P<file>[^'"]+)['"]\s*$""")
_IMPORT = re.compile(r"^(?:from\s+(?P<package>[\w.]+)\s+)?import\s+(?P<name>[\w.]+)")
_AT_LINE = re.compile(r"\s*\(line (?P<number>\d+)\)$")
_TOKEN = re.compile(r"Failed to parse token '(?P<token>.*)'")
# How gin begins what it appends to an error; whatever follows is about gin's state.
_GIN_SAYS = ("In call to configurable", "No values supplied by Gin")
_MAX_MESSAGE = 600


class ConfigError(ValueError):
  """A gin file or binding that is wrong; the message is one line."""


def read(files: Sequence[str], bindings: Sequence[str]) -> str:
  """The run's configuration as one text: includes inlined, `--set` bindings last."""
  lines: list[str] = []
  for file in files:
    lines.extend(_inline(pathlib.Path(file), ()))
  imports = [line for line in lines if _IMPORT.match(line)]
  rest = [line for line in lines if not _IMPORT.match(line)]
  for binding in bindings:
    if "=" not in binding:
      raise ConfigError(f"--set: expected name.parameter=value, got {binding!r}")
    rest.append(binding)
  return "\n".join([*dict.fromkeys(imports), *rest]) + "\n"


def _inline(path: pathlib.Path, parents: tuple[pathlib.Path, ...]) -> list[str]:
  if path in parents:
    raise ConfigError(f"{path}: includes itself")
  try:
    text = path.read_text()
  except OSError as error:
    raise ConfigError(f"{path}: {error.strerror}") from error
  lines: list[str] = []
  for line in text.splitlines():
    match = _INCLUDE.match(line)
    if match is None:
      lines.append(line)
    else:
      included = path.parent / match["file"]
      if not included.exists():
        included = pathlib.Path(match["file"])
      lines.extend(_inline(included, (*parents, path)))
  return lines


def parse(text: str, *, without_jax: bool) -> None:
  """Binds the configuration; raises ConfigError with one line that says what is wrong.

  Args:
    text: what `read` returned.
    without_jax: block the import of jax in this process and put placeholders where it is needed.
  """
  if without_jax:
    _block_jax(text)
  gin.clear_config()
  try:
    gin.parse_config(text)
  except tokenize.TokenError as error:
    raise ConfigError(
      f"{_binding_at(text, error.args[1][0])}: expected brackets and quotes to be closed"
    ) from error
  except SyntaxError as error:
    raise ConfigError(_unreadable(text, str(error))) from error
  except (ValueError, NameError, ImportError, AttributeError, TypeError) as error:
    # gin adds "In bindings string line N"; the line itself follows and says more than the number.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("In bindings string")]
    message = ": ".join(dict.fromkeys(lines)).replace(".: ", ": ")
    raise ConfigError(message or repr(error)) from error


def call(function: Callable[..., Any], **arguments: Any) -> Any:
  """Calls a configured function that checks its parameters and returns what does the work.

  Raises:
    ConfigError: a parameter is missing or wrong; one line.
  """
  try:
    return gin.get_configurable(function)(**arguments)
  except (ValueError, TypeError, OSError) as error:
    raise ConfigError(_one_line(str(error)) or repr(error)) from error


def _one_line(message: str) -> str:
  """An error's own lines, joined and bounded, without what gin appends to them."""
  joined = ""
  for line in map(str.strip, message.splitlines()):
    if line.startswith(_GIN_SAYS):
      break
    if line:
      joined += ("" if not joined else " " if joined.endswith(":") else "; ") + line
  return joined if len(joined) <= _MAX_MESSAGE else joined[: _MAX_MESSAGE - 4] + " ..."


def _unreadable(text: str, message: str) -> str:
  """What gin says of a statement that it cannot read, with the statement itself."""
  last = message.strip().splitlines()[-1].strip()
  at, token = _AT_LINE.search(last), _TOKEN.search(last)
  if at is None:
    return _one_line(message)
  reason = last[: at.start()]
  if token is not None:
    reason = f"expected a number, a quoted string, a list or a @reference, got {token['token']}"
  return _one_line(f"{_binding_at(text, int(at['number']))}: {reason}")


def _binding_at(text: str, number: int) -> str:
  """The first line of the statement that line `number`, counted from 1, belongs to."""
  begins, at_start = number, True
  layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
  try:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      if token.start[0] > number or token.type == tokenize.ENDMARKER:
        break
      if at_start and token.type not in layout:
        begins, at_start = token.start[0], False
      at_start = at_start or token.type == tokenize.NEWLINE
  except (tokenize.TokenError, SyntaxError):
    pass  # the statement that is never closed is the last one that began
  lines = text.splitlines()
  return lines[min(begins, len(lines)) - 1].strip()


def _block_jax(text: str) -> None:
  if "jax" in sys.modules and sys.modules["jax"] is not None:
    raise RuntimeError("jax is imported already; this role must run without it")
  sys.modules["jax"] = None  # type: ignore[assignment]
  for line in text.splitlines():
    match = _IMPORT.match(line)
    if match is None or match["package"] == "__gin__":
      continue
    name = f"{match['package']}.{match['name']}" if match["package"] else match["name"]
    try:
      importlib.import_module(name)
    except ImportError as error:
      if error.name is None or error.name.split(".")[0] != "jax":
        raise ConfigError(f"{line.strip()}: {error}") from error
      placeholder = _Placeholder(name)
      sys.modules[name] = placeholder
      if match["package"]:
        setattr(importlib.import_module(match["package"]), match["name"], placeholder)


class _Placeholder(types.ModuleType):
  """A module of the trainer, seen from a process without jax."""

  def __getattr__(self, name: str):
    if name.startswith("__"):
      raise AttributeError(name)

    def placeholder(*args, **kwargs):
      raise RuntimeError(f"{self.__name__}.{name} needs jax, which this role runs without")

    placeholder.__name__ = placeholder.__qualname__ = name
    placeholder.__module__ = self.__name__
    setattr(self, name, placeholder)
    return placeholder
