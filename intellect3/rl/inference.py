"""The inference role: the command line of one server. The server is a process of its own."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

from intellect3.inference import launch
from intellect3.inference.engine import flags
from intellect3.rl.roles import NotStarted, Shared

_EXPERTS = "enable_return_routed_experts"


def embedded_server(
  shared: Shared, index: int, *, options: Mapping[str, Any] | None = None
) -> Sequence[str]:
  """The embedded engine, on the port of the index-th server url.

  Args:
    shared: what the roles share.
    index: of this server.
    options: flags of `python -m intellect3.inference.engine`, dashes as underscores.

  Raises:
    NotStarted: an option is not a flag of the engine, or its value is not fit.
  """
  options = _with_experts(shared, "embedded_server", _mapping("embedded_server", options))
  host = urlparse(shared.server_urls[index]).hostname
  command = launch.embedded_command(
    shared.model_path, _port(shared, index), **{"host": host, **options}
  )
  field = "inference.embedded_server.options"
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      flags.parse(command[command.index("--model") :])
  except SystemExit as error:
    lines = said.getvalue().strip().splitlines() if error.code else ["help is no setting"]
    reason = lines[-1].partition("cannot start: ")[2] or lines[-1]
    raise NotStarted(
      f"{field}: expected flags of the engine, got {dict(options)}: {reason}"
    ) from error
  return command


def sglang_server(
  shared: Shared, index: int, *, options: Mapping[str, Any] | None = None
) -> Sequence[str]:
  """A real SGLang server, from its own environment or container."""
  options = _with_experts(shared, "sglang_server", _mapping("sglang_server", options))
  return launch.sglang_command(shared.model_path, _port(shared, index), **options)


def _mapping(function: str, options: Any) -> Mapping[str, Any]:
  if options is None:
    return {}
  reserved = {"model", "model_path", "port", "weight_version"}
  if not isinstance(options, Mapping) or not all(
    isinstance(name, str) and name not in reserved for name in options
  ):
    raise NotStarted(
      f"inference.{function}.options: expected names and values, none of {sorted(reserved)}, "
      f"got {options!r}"
    )
  return options


def _with_experts(shared: Shared, function: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
  """The options of a server that tells routed experts, where the run replays them."""
  if shared.router is None:
    return options
  given = options.get(_EXPERTS, True)
  if given is not True:
    raise NotStarted(
      f"inference.{function}.options: {_EXPERTS}: expected True with rl.run.replay_routed_experts, "
      f"got {given!r}"
    )
  return {**options, _EXPERTS: True}


def _port(shared: Shared, index: int) -> int:
  port = urlparse(shared.server_urls[index]).port
  if port is None:
    raise NotStarted(f"server_urls[{index}]: expected a port, got {shared.server_urls[index]}")
  return port
