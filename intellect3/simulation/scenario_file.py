"""A scenario from a TOML or JSON file, with errors that name file, field, expected and given; and
back into TOML.

A table for each record of `scenario`; two keys stand for data elsewhere, relative to the file:
`trainer.plan` (JSON of `tools.plan_run`) and `environments.NAME.lengths.rollout_log` (a run's
RolloutLog).
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from intellect3 import rollout_log, types
from intellect3.simulation import scenario as scenarios

T = TypeVar("T")


def load(path: str | os.PathLike[str]) -> scenarios.Scenario:
  """Reads a scenario.

  Args:
    path: ends in `.toml` or `.json`.

  Raises:
    ValueError: it cannot be read, or a field is not fit; one line that begins with the path.
  """
  file = pathlib.Path(path)
  try:
    return parse(_read(file), file.parent)
  except (OSError, ValueError) as error:  # decoding errors are ValueErrors
    message = error.strerror if isinstance(error, OSError) and error.strerror else error
    raise ValueError(f"{file}: {message}") from error


def _read(file: pathlib.Path) -> Any:
  if file.suffix not in (".toml", ".json"):
    raise ValueError(f"expected a name that ends in .toml or .json, got {file.name!r}")
  text = file.read_text(encoding="utf-8")
  return tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)


def parse(given: Any, directory: pathlib.Path) -> scenarios.Scenario:
  """A scenario from the tables of a file.

  Args:
    given: what the file holds.
    directory: that paths in it are relative to.

  Raises:
    ValueError: a field is not fit.
  """
  tables = dict(_table(given, "the file"))
  named = _table(tables.pop("environments", {}), "environments")
  trainer = dict(_table(tables.pop("trainer", {}), "trainer"))
  if "plan" in trainer:
    trainer["seconds_per_token"] = _planned(directory, trainer)
  parts = {
    "servers": _record(scenarios.Servers, tables.pop("servers", {}), "servers"),
    "sync": _record(scenarios.Sync, tables.pop("sync", {}), "sync"),
    "clients": _record(scenarios.Clients, tables.pop("clients", {}), "clients"),
    "failures": _record(scenarios.Failures, tables.pop("failures", {}), "failures"),
    "trainer": _record(scenarios.Trainer, trainer, "trainer"),
    "environments": {
      name: _environment(table, f"environments.{name}", directory) for name, table in named.items()
    },
  }
  return _record(scenarios.Scenario, {**tables, **parts}, "")


def _environment(given: Any, where: str, directory: pathlib.Path) -> scenarios.Environment:
  table = dict(_table(given, where))
  lengths = dict(_table(table.pop("lengths", {}), f"{where}.lengths"))
  if "rollout_log" in lengths:
    name = _path(lengths.pop("rollout_log"), f"{where}.lengths.rollout_log")
    lengths["empirical"] = sampled_lengths(directory / name)
  made = _record(scenarios.Lengths, lengths, f"{where}.lengths")
  return _record(scenarios.Environment, {**table, "lengths": made}, where)


def sampled_lengths(log_dir: pathlib.Path, *, first: int = 1, last: int | None = None) -> list[int]:
  """Sampled tokens of each trained rollout of a RolloutLog, ascending.

  Args:
    log_dir: the log.
    first: step from which on.
    last: step to which; None for all.

  Raises:
    ValueError: it holds no step of these.
  """
  steps = [s for s in rollout_log.committed_steps(log_dir) if first <= s <= (last or s)]
  lengths: collections.Counter[int] = collections.Counter()
  for step in steps:
    manifest = rollout_log.read_manifest(log_dir, step)
    assert manifest is not None
    trajectories = range(sum(len(shard.lengths) for shard in manifest.shards))
    for record in rollout_log.read_records(log_dir, manifest, trajectories).values():
      versions = record.trajectory.policy_versions
      lengths[record.rollout_id] += int((versions != types.NOT_SAMPLED).sum())
  if not lengths:
    raise ValueError(f"{log_dir}: expected a RolloutLog with committed steps, got none")
  return sorted(lengths.values())


def _planned(directory: pathlib.Path, trainer: dict[str, Any]) -> float:
  plan = directory / _path(trainer.pop("plan"), "trainer.plan")
  if "seconds_per_token" in trainer:
    raise ValueError("trainer: expected one of plan and seconds_per_token, got both")
  try:
    report = _table(json.loads(plan.read_text(encoding="utf-8")), "trainer.plan")
  except (OSError, ValueError) as error:
    raise ValueError(f"trainer.plan: expected the JSON of a plan, got {plan}: {error}") from error
  try:
    return float(report["predicted_step_seconds"]) / float(report["tokens_per_step"])
  except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
    raise ValueError(
      f"trainer.plan: expected predicted_step_seconds and tokens_per_step in {plan}, got {error!r}"
    ) from error


def _path(value: Any, field: str) -> str:
  if not isinstance(value, str) or not value:
    raise ValueError(f"{field}: expected a path, got {value!r}")
  return value


def _table(value: Any, field: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise ValueError(f"{field}: expected a table, got {value!r}")
  return value


def _record(kind: type[T], given: Any, where: str) -> T:
  """A dataclass from a table; unknown and missing keys are errors."""
  table = _table(given, where)
  fields: Sequence[dataclasses.Field[Any]] = dataclasses.fields(kind)  # type: ignore[arg-type]
  prefix = f"{where}." if where else ""
  for key in table:
    if key not in {field.name for field in fields}:
      known = ", ".join(field.name for field in fields)
      raise ValueError(f"{prefix}{key}: expected one of {known}, got an unknown key")
  for field in fields:
    missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if missing and field.name not in table:
      raise ValueError(f"{prefix}{field.name}: expected a value, got none")
  values = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
  try:
    return kind(**values)
  except ValueError as error:
    # A record names its own table; a table among many needs its whole name.
    name = where.split(".")[0]
    message = str(error)
    if where and where != name and not message.startswith(where):
      message = f"{where}.{message.split('.', 1)[-1]}"
    raise ValueError(message) from error


def dump(given: scenarios.Scenario, notes: Mapping[str, str]) -> str:
  """A scenario as TOML that `parse` reads again, without what is at its default and has no note.

  Args:
    given: the scenario.
    notes: what to say beside a field, by `table.field`.
  """
  lines: list[str] = []
  _dump(dataclasses.asdict(given), given, "", notes, lines)
  return "\n".join(lines) + "\n"


def _dump(
  table: Mapping[str, Any], record: Any, where: str, notes: Mapping[str, str], lines: list[str]
) -> None:
  """Adds a record's own fields, then the tables in it."""
  defaults = {}
  if dataclasses.is_dataclass(record):
    defaults = {field.name: field.default for field in dataclasses.fields(record)}
  own = []
  for key, value in table.items():
    path = f"{where}.{key}" if where else key
    if not isinstance(value, Mapping) and (path in notes or value != defaults.get(key)):
      own.append(f"{key} = {_toml(value)}" + (f"  # {notes[path]}" if path in notes else ""))
  if where and own:
    lines += ["", f"[{where}]"]
  lines += own
  for key, value in table.items():
    if isinstance(value, Mapping):
      below = record[key] if isinstance(record, Mapping) else getattr(record, key)
      name = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)
      _dump(value, below, f"{where}.{name}" if where else name, notes, lines)


def _toml(value: Any) -> str:
  """A number, string, bool or list of them: what JSON and TOML write alike."""
  return json.dumps(list(value) if isinstance(value, tuple) else value)
