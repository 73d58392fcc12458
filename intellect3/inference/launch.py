"""Starting servers: command lines, ports, waiting until one answers.

Nothing here starts a process; the supervisor does, with these command lines.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable

from intellect3.inference.transport import Transport, TransportError

PROBE_SECONDS = 0.2
"""Between two looks at a server that is starting."""


class ServerDied(Exception):
  """The server's process ended before it was healthy."""


Option = str | int | float | bool | None


def embedded_command(
  model: str | os.PathLike[str], port: int, *, weight_version: int = 0, **options: Option
) -> list[str]:
  """The command line of the embedded engine, in this interpreter.

  Args:
    model: model directory in Hugging Face's layout.
    port: where it listens.
    weight_version: version of the weights in `model`.
    options: further flags: `slots=8` is `--slots 8`, True a bare flag, None and False none.
  """
  command = [sys.executable, "-m", "intellect3.inference.engine", "--model", os.fspath(model)]
  return [*command, "--port", str(port), "--weight-version", str(weight_version), *_flags(options)]


def sglang_command(
  model: str | os.PathLike[str],
  port: int,
  *,
  python: str = "python",
  weight_version: int = 0,
  **options: Option,
) -> list[str]:
  """The command line of an SGLang server.

  Flags for RL on GPUs: `enable_deterministic_inference` (without it seeds are ignored),
  `rl_on_policy_target="fsdp"`, `enable_return_routed_experts`, `enable_fp32_lm_head`,
  `enable_memory_saver`, `enable_weights_cpu_backup`, `skip_tokenizer_init`, `admin_api_key`.

  Args:
    model: model directory in Hugging Face's layout.
    port: where it listens.
    python: interpreter of the environment that SGLang is installed in.
    weight_version: version of the weights in `model`; SGLang's own default is no number.
    options: further flags, as for embedded_command.
  """
  command = [python, "-m", "sglang.launch_server", "--model-path", os.fspath(model)]
  return [*command, "--port", str(port), "--weight-version", str(weight_version), *_flags(options)]


def check_port_free(host: str, port: int) -> None:
  """Raises ValueError where a server could not listen on this port."""
  if not 0 < port < 65536:
    raise ValueError(f"port: expected 1 to 65535, got {port}")
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind((host, port))
    except OSError as error:
      raise ValueError(
        f"port: expected a free one on {host}, got {port} ({os.strerror(error.errno or 0)})"
      ) from error


async def wait_until_healthy(
  transport: Transport, url: str, timeout_seconds: float, alive: Callable[[], bool]
) -> None:
  """Waits until a server that is starting answers `/health` with 200.

  Args:
    transport: carries the probes.
    url: the server's address.
    timeout_seconds: for the whole wait.
    alive: whether its process still runs.

  Raises:
    ServerDied: it does not.
    TimeoutError: naming the server and what it answered last.
  """
  clock = asyncio.get_running_loop().time
  deadline = clock() + timeout_seconds
  last = "nothing"
  while True:
    if not alive():
      raise ServerDied(f"{url}: the server's process ended before it was healthy")
    left = deadline - clock()
    if left <= 0:
      raise TimeoutError(f"{url}: not healthy after {timeout_seconds:g} s; last answer: {last}")
    try:
      status, _ = await transport.request("GET", f"{url}/health", None, min(5.0, left))
    except TransportError as error:
      last = error.reason
    else:
      if status == 200:
        return
      last = str(status)
    await asyncio.sleep(PROBE_SECONDS)


def _flags(options: dict[str, Option]) -> list[str]:
  flags: list[str] = []
  for name, value in options.items():
    if value is None or value is False:
      continue
    flags.append(f"--{name.replace('_', '-')}")
    if value is not True:
      flags.append(str(value))
  return flags
