"""The inference role: the command line of one server. The server is a process of its own."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

from intellect3.inference import launch
from intellect3.rl.roles import Shared


def embedded_server(
  shared: Shared, index: int, *, options: Mapping[str, Any] | None = None
) -> Sequence[str]:
  """The embedded engine, on the port of the index-th server url.

  Args:
    shared: what the roles share.
    index: of this server.
    options: flags of `python -m intellect3.inference.engine`, dashes as underscores.
  """
  return launch.embedded_command(shared.model_path, _port(shared, index), **(options or {}))


def sglang_server(
  shared: Shared, index: int, *, options: Mapping[str, Any] | None = None
) -> Sequence[str]:
  """A real SGLang server, from its own environment or container."""
  return launch.sglang_command(shared.model_path, _port(shared, index), **(options or {}))


def _port(shared: Shared, index: int) -> int:
  port = urlparse(shared.server_urls[index]).port
  if port is None:
    raise ValueError(f"server_urls[{index}]: expected a port, got {shared.server_urls[index]}")
  return port
