"""Checks of a run before anything of it is started. No jax.

Each raises `NotStarted` with one line that names the field, what was expected and what was given.
"""

import contextlib
import json
import math
import os
import pathlib
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from intellect3 import rollout_log, telemetry, types
from intellect3.environments import base
from intellect3.models.config import ModelConfig

# What the roles write into a run directory; `logs` alone is no run.
_RUN_FILES = ("config.gin", "metrics", "rollouts", "weights", "checkpoints")


class NotStarted(ValueError):
  """The run cannot start: the configuration or the machine is not fit. Nothing was begun."""


def integer(field: str, value: Any, least: int, most: int | None = None) -> None:
  """Refuses what is no whole number from `least` to `most`."""
  fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
  if not fits or (most is not None and value > most):
    bound = f">= {least}" if most is None else f"from {least} to {most}"
    raise NotStarted(f"{field}: expected an integer {bound}, got {value!r}")


def number(field: str, value: Any, least: float, *, above: bool = False) -> None:
  """Refuses what is no finite number of at least `least`, or above it."""
  fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  if not fits or value < least or (above and value == least):
    raise NotStarted(f"{field}: expected a number {'>' if above else '>='} {least}, got {value!r}")


def path(field: str, value: Any) -> None:
  """Refuses what is no path."""
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise NotStarted(f"{field}: expected a path, got {value!r}")


def rules(field: str, table: Any) -> None:
  """Refuses what is no table of `sharding.rules`: pairs of a logical axis and its mesh axes."""
  fits = isinstance(table, tuple) and all(
    isinstance(pair, tuple)
    and len(pair) == 2
    and isinstance(pair[0], str)
    and (pair[1] is None or isinstance(pair[1], str) or _are_names(pair[1]))
    for pair in table
  )
  if not fits or not table:
    raise NotStarted(
      f"{field}: expected a table of sharding.rules, a tuple of (logical axis, mesh axis) pairs, "
      f"got {table!r}"
    )


def _are_names(value: Any) -> bool:
  return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def router_shape(model_path: pathlib.Path) -> types.RouterShape:
  """What the model's routers choose of; refuses a model that has none."""
  file = model_path / "config.json"
  try:
    config = ModelConfig.from_hf(json.loads(file.read_text()))
  except (OSError, ValueError) as error:
    raise NotStarted(f"model_path: expected a model's directory, got {model_path}: {error}") from (
      error
    )
  if not config.num_moe_layers:
    raise NotStarted(
      "replay_routed_experts: expected False for a model without experts, "
      f"got True with {config.family}, {config.num_layers} dense layers ({model_path})"
    )
  if config.num_experts > 65536:
    raise NotStarted(
      f"replay_routed_experts: expected at most 65536 experts, got {config.num_experts}"
    )
  return types.RouterShape(
    num_layers=config.num_layers,
    num_dense_layers=config.num_dense_layers,
    num_experts=config.num_experts,
    num_experts_per_token=config.num_experts_per_token,
  )


def run_directory(directory: pathlib.Path, *, resume: bool, role: str) -> None:
  """Refuses to write over what a run has written, or to resume what is not there.

  The roles of one run share the directory, so a role that is started by itself looks for its own
  output; workers and servers keep none that matters. A run that was broken off before its first
  checkpoint can be resumed: its configuration is there.
  """
  for ancestor in (directory, *directory.parents):
    if ancestor.exists() or ancestor.is_symlink():
      if not ancestor.is_dir():
        raise NotStarted(f"run_dir: expected a directory, got {directory} ({ancestor} is a file)")
      if not os.access(ancestor, os.W_OK | os.X_OK):
        raise NotStarted(f"run_dir: expected one that can be written to, got {directory}")
      break
  run = [name for name in _RUN_FILES if (directory / name).exists()]
  if role in ("worker", "inference"):
    return
  if resume:
    if not run:
      raise NotStarted(f"run_dir: expected a run, got {directory}: there is no run to resume")
    return
  found = run if role == "all" else _own_output(directory, role)
  if found:
    raise NotStarted(
      f"run_dir: expected none of {role}, got {directory} with {', '.join(found)}: "
      "a run is there already; give --resume, or another --out"
    )


def _own_output(directory: pathlib.Path, role: str) -> list[str]:
  files = [telemetry.metrics_path(directory, role)]
  if role == "trainer":
    files += [directory / "weights", directory / "checkpoints"]
  found = [str(file.relative_to(directory)) for file in files if file.exists()]
  if role == "orchestrator" and rollout_log.committed_steps(directory / "rollouts"):
    found.append("rollouts")
  return found


def by_name(environments: Sequence[base.Environment]) -> dict[str, base.Environment]:
  """The environments by name; refuses none, what is no environment, and a name given twice."""
  listed = isinstance(environments, list | tuple)
  names = [getattr(each, "name", None) for each in environments] if listed else []
  if not names or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
    raise NotStarted(
      "environments: expected a list of at least one, each name once, "
      f"got {names if listed else environments!r}"
    )
  return {environment.name: environment for environment in environments}


def environment_weights(weights: Any, names: Collection[str]) -> None:
  """Refuses weights that do not give every environment, and no other, a positive share."""
  if not isinstance(weights, Mapping) or set(weights) != set(names):
    given = sorted(map(str, weights)) if isinstance(weights, Mapping) else weights
    raise NotStarted(f"environment_weights: expected for each of {sorted(names)}, got {given!r}")
  for name, weight in weights.items():
    number(f"environment_weights[{name!r}]", weight, 0, above=True)


def host(name: Any) -> None:
  """Refuses what does not resolve to an address."""
  try:
    socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError, TypeError) as error:
    reason = error.strerror if isinstance(error, OSError) else error
    raise NotStarted(f"host: expected one that resolves, got {name!r} ({reason})") from error


def addresses(orchestrator_url: str, server_urls: Sequence[str]) -> None:
  """Refuses server urls that are none, and two services at one address."""
  for position, url in enumerate(server_urls):
    field = f"server_urls[{position}]"
    try:
      parts = urlsplit(url)
      fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except (ValueError, AttributeError, TypeError):
      fits = False
    if not fits:
      raise NotStarted(f"{field}: expected http://HOST:PORT, got {url!r}")
    if url.rstrip("/") == orchestrator_url:
      raise NotStarted(f"{field}: expected a port other than the orchestrator's, got {url}")
    if url in server_urls[:position]:
      raise NotStarted(f"{field}: expected each server once, got {url} again")


def free_ports(name: str, count: int) -> list[int]:
  """Distinct ports of this machine that nothing listens on now."""
  family = socket.AF_INET6 if ":" in name else socket.AF_INET
  with contextlib.ExitStack() as stack:
    probes = [stack.enter_context(socket.socket(family)) for _ in range(count)]
    for probe in probes:
      try:
        probe.bind((name, 0))
      except OSError as error:
        raise NotStarted(
          f"host: expected an address of this machine, got {name!r} ({error.strerror})"
        ) from error
    return [probe.getsockname()[1] for probe in probes]
