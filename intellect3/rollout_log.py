"""The RolloutLog on disk, the only interface between rollouts and trainer: written and read here.

    LOG_DIR/step_000001/worker_0.arrayrecord ...   records: types.TrajectoryRecord
    LOG_DIR/step_000001/manifest.json              types.Manifest; absent until every shard is whole

An ArrayRecord file that was not closed, or was cut off, opens silently with 0 records. So nothing
of a step is believed before its manifest is there, and no record before its shard's size, checksum
and record count agree with the manifest.
"""

import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Collection, Iterable

import msgspec
from array_record.python import array_record_module

from intellect3 import types

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{6,})$")
_BLOCK = 1 << 20


def step_directory(log_dir: str | os.PathLike[str], step: int) -> pathlib.Path:
  """The directory of one step's batch."""
  return pathlib.Path(log_dir) / f"step_{step:06d}"


def write_shard(
  path: str | os.PathLike[str], records: Iterable[types.TrajectoryRecord]
) -> types.ShardEntry:
  """Writes one shard, closed and flushed to disk, and returns its manifest entry.

  Raises:
    ValueError: a record is not sound, or names other components than the ones before it.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lengths: list[int] = []
  loss_tokens: list[int] = []
  component_tokens: dict[str, list[int]] = {}
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  try:
    for record in records:
      record.check()
      counts = record.component_tokens()
      if lengths and set(counts) != set(component_tokens):
        raise ValueError(
          f"rollout {record.rollout_id}: token_weights: expected the components of the other "
          f"records, {sorted(component_tokens)}, got {sorted(counts)}"
        )
      writer.write(types.encode(record))
      for key, count in counts.items():
        component_tokens.setdefault(key, []).append(count)
      lengths.append(len(record.trajectory.tokens))
      loss_tokens.append(int(record.trajectory.loss_mask.sum()))
  finally:
    writer.close()
  with path.open("rb") as file:
    data = file.read()
    os.fsync(file.fileno())
  return types.ShardEntry(
    file=path.name,
    bytes=len(data),
    crc32=zlib.crc32(data),
    lengths=lengths,
    loss_tokens=loss_tokens,
    component_tokens=component_tokens,
  )


def commit_manifest(log_dir: str | os.PathLike[str], manifest: types.Manifest) -> pathlib.Path:
  """Publishes a batch: the manifest appears whole, or not at all."""
  path = step_directory(log_dir, manifest.step) / MANIFEST
  if path.exists():
    raise ValueError(f"{path}: step {manifest.step} is already committed")
  temporary = path.with_suffix(".tmp")
  with temporary.open("wb") as file:
    file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    file.flush()
    os.fsync(file.fileno())
  temporary.rename(path)
  return path


def committed_steps(log_dir: str | os.PathLike[str]) -> list[int]:
  """The committed steps, ascending."""
  log_dir = pathlib.Path(log_dir)
  if not log_dir.is_dir():
    return []
  steps = []
  for entry in log_dir.iterdir():
    match = _STEP.match(entry.name)
    if match and (entry / MANIFEST).exists():
      steps.append(int(match.group(1)))
  return sorted(steps)


def remove_uncommitted(log_dir: str | os.PathLike[str]) -> list[str]:
  """Deletes step directories without a manifest (left by a crash); returns their names."""
  log_dir = pathlib.Path(log_dir)
  removed = []
  for entry in sorted(log_dir.iterdir()) if log_dir.is_dir() else []:
    if _STEP.match(entry.name) and not (entry / MANIFEST).exists():
      shutil.rmtree(entry)
      removed.append(entry.name)
  return removed


def read_manifest(log_dir: str | os.PathLike[str], step: int) -> types.Manifest | None:
  """The manifest of a step; None while it is not committed.

  Raises:
    ValueError: the manifest is not one, or is of another step or schema.
  """
  path = step_directory(log_dir, step) / MANIFEST
  try:
    manifest = msgspec.json.decode(path.read_bytes(), type=types.Manifest)
  except FileNotFoundError:
    return None
  except msgspec.DecodeError as error:
    raise ValueError(f"{path}: {error}") from error
  check_manifest(manifest, step)
  return manifest


def check_manifest(manifest: types.Manifest, step: int) -> None:
  """Raises ValueError where a manifest is not a sound one of this step."""
  for field, expected, given in (
    ("schema", types.LOG_SCHEMA, manifest.schema),
    ("step", step, manifest.step),
    ("loss_tokens", sum(sum(entry.loss_tokens) for entry in manifest.shards), manifest.loss_tokens),
  ):
    if given != expected:
      raise ValueError(f"manifest of step {step}: {field}: expected {expected}, got {given}")
  if manifest.loss_tokens < 1:
    raise ValueError(f"manifest of step {step}: loss_tokens: expected at least 1, got 0")
  for entry in manifest.shards:
    if pathlib.Path(entry.file).name != entry.file:
      raise ValueError(f"manifest of step {step}: file: expected a bare name, got {entry.file!r}")
    if len(entry.lengths) != len(entry.loss_tokens):
      raise ValueError(
        f"manifest of step {step}: {entry.file}: expected as many loss_tokens as lengths, "
        f"got {len(entry.loss_tokens)} and {len(entry.lengths)}"
      )
    for key, counts in entry.component_tokens.items():
      if key not in types.COMPONENTS or len(counts) != len(entry.lengths):
        raise ValueError(
          f"manifest of step {step}: {entry.file}: component_tokens: expected one number a record "
          f"for components of {types.COMPONENTS}, got {len(counts)} for {key!r}"
        )
  weighted = [set(entry.component_tokens) for entry in manifest.shards if entry.lengths]
  if any(keys != weighted[0] for keys in weighted):
    raise ValueError(
      f"manifest of step {step}: component_tokens: expected the same components in every shard, "
      f"got {[sorted(keys) for keys in weighted]}"
    )


def read_records(
  log_dir: str | os.PathLike[str],
  manifest: types.Manifest,
  wanted: Collection[int],
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> dict[int, types.TrajectoryRecord]:
  """Reads the wanted trajectories of a step.

  Trajectories are numbered through the shards in the manifest's order. On a cluster each process
  reads only its own; shard i's checksum is computed by process i modulo the process count, so that
  the files are read over once in all and not once per host.

  Args:
    log_dir: the RolloutLog.
    manifest: the step's.
    wanted: trajectory numbers.
    process_index: which process this is.
    process_count: of how many.

  Returns:
    The records by trajectory number.

  Raises:
    ValueError: a shard's size, checksum, record count, or a record's step, length, loss-masked
      tokens or components' tokens differ from the manifest.
  """
  records: dict[int, types.TrajectoryRecord] = {}
  first = 0
  for index, entry in enumerate(manifest.shards):
    path = step_directory(log_dir, manifest.step) / entry.file
    here = sorted(n - first for n in wanted if first <= n < first + len(entry.lengths))
    owner = index % process_count == process_index
    if owner or here:
      _check_file(path, entry, checksum=owner)
      for offset, record in zip(here, _read(path, entry, here), strict=True):
        _check_record(path, entry, offset, record, manifest.step)
        records[first + offset] = record
    first += len(entry.lengths)
  missing = sorted(set(wanted) - set(records))
  if missing:
    raise ValueError(f"wanted: expected trajectory numbers below {first}, got {missing[0]}")
  return records


def _check_file(path: pathlib.Path, entry: types.ShardEntry, *, checksum: bool) -> None:
  size = path.stat().st_size if path.exists() else 0
  if size != entry.bytes:
    raise ValueError(f"{path}: bytes: expected {entry.bytes}, got {size}")
  if checksum:
    crc = 0
    with open(path, "rb") as file:
      while block := file.read(_BLOCK):
        crc = zlib.crc32(block, crc)
    if crc != entry.crc32:
      raise ValueError(f"{path}: crc32: expected {entry.crc32}, got {crc}")


def _read(
  path: pathlib.Path, entry: types.ShardEntry, offsets: list[int]
) -> list[types.TrajectoryRecord]:
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    if reader.num_records() != len(entry.lengths):
      raise ValueError(
        f"{path}: records: expected {len(entry.lengths)}, got {reader.num_records()}"
      )
    if not offsets:
      return []
    return [types.decode(data, types.TrajectoryRecord) for data in reader.read(offsets)]
  finally:
    reader.close()


def _check_record(
  path: pathlib.Path,
  entry: types.ShardEntry,
  offset: int,
  record: types.TrajectoryRecord,
  step: int,
) -> None:
  for field, expected, given in (
    ("step", step, record.step),
    ("length", entry.lengths[offset], len(record.trajectory.tokens)),
    ("loss tokens", entry.loss_tokens[offset], int(record.trajectory.loss_mask.sum())),
    (
      "component tokens",
      {key: counts[offset] for key, counts in entry.component_tokens.items()},
      record.component_tokens(),
    ),
  ):
    if given != expected:
      raise ValueError(f"{path}: record {offset}: {field}: expected {expected}, got {given}")
