"""Reading a committed step of the RolloutLog, believing nothing its manifest does not confirm.

    LOG_DIR/step_000001/manifest.json and the shards (ArrayRecord) beside it

An ArrayRecord file that was cut off opens silently with 0 records, so size, checksum and record
count are compared with the manifest before a record is used.
"""

import os
import pathlib
import zlib
from collections.abc import Collection

import msgspec
from array_record.python import array_record_module

from intellect3 import types

_BLOCK = 1 << 20


def step_directory(log_dir: str | os.PathLike[str], step: int) -> pathlib.Path:
  """The directory of one step's batch."""
  return pathlib.Path(log_dir) / f"step_{step:06d}"


def read_manifest(log_dir: str | os.PathLike[str], step: int) -> types.Manifest | None:
  """The manifest of a step; None while it is not committed.

  Raises:
    ValueError: the manifest is not one, or is of another step or schema.
  """
  path = step_directory(log_dir, step) / "manifest.json"
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
    ValueError: a shard's size, checksum, record count, or a record's step, length or loss-masked
      tokens differ from the manifest.
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
  ):
    if given != expected:
      raise ValueError(f"{path}: record {offset}: {field}: expected {expected}, got {given}")
