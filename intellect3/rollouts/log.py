"""The RolloutLog on disk: ArrayRecord shards and a manifest whose rename commits the batch.

    LOG_DIR/step_000001/worker_0.arrayrecord ...   records: types.TrajectoryRecord
    LOG_DIR/step_000001/manifest.json              types.Manifest; absent until every shard is whole

An ArrayRecord file that was not closed, or was cut off, opens silently with 0 records. Nothing of a
step may therefore be believed before its manifest is there and agrees with the shards.
"""

import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator

import msgspec
from array_record.python import array_record_module

from intellect3 import types

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{6,})$")


class LogError(ValueError):
  """A shard or manifest that does not say what it should."""


def step_directory(log_dir: str | os.PathLike[str], step: int) -> pathlib.Path:
  """The directory of one step's batch."""
  return pathlib.Path(log_dir) / f"step_{step:06d}"


def write_shard(
  path: str | os.PathLike[str], records: Iterable[types.TrajectoryRecord]
) -> types.ShardEntry:
  """Writes one shard, closed and flushed to disk, and returns its manifest entry."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lengths: list[int] = []
  loss_tokens: list[int] = []
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  try:
    for record in records:
      record.trajectory.check()
      writer.write(types.encode(record))
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
  )


def commit_manifest(log_dir: str | os.PathLike[str], manifest: types.Manifest) -> pathlib.Path:
  """Publishes a batch: the manifest appears whole, or not at all."""
  path = step_directory(log_dir, manifest.step) / MANIFEST
  if path.exists():
    raise LogError(f"{path}: step {manifest.step} is already committed")
  temporary = path.with_suffix(".tmp")
  with temporary.open("wb") as file:
    file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    file.flush()
    os.fsync(file.fileno())
  temporary.rename(path)
  return path


def read_manifest(log_dir: str | os.PathLike[str], step: int) -> types.Manifest | None:
  """The manifest of a step, or None while the step is not committed."""
  path = step_directory(log_dir, step) / MANIFEST
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return None
  try:
    manifest = msgspec.json.decode(data, type=types.Manifest)
  except msgspec.DecodeError as error:
    raise LogError(f"{path}: {error}") from error
  if manifest.schema != types.LOG_SCHEMA:
    raise LogError(f"{path}: schema: expected {types.LOG_SCHEMA}, got {manifest.schema}")
  if manifest.step != step:
    raise LogError(f"{path}: step: expected {step}, got {manifest.step}")
  return manifest


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


def read_records(
  log_dir: str | os.PathLike[str], manifest: types.Manifest
) -> Iterator[types.TrajectoryRecord]:
  """All records of a committed step, in the manifest's order.

  Raises:
    LogError: a shard whose size, checksum, record count or lengths differ from the manifest.
  """
  for entry in manifest.shards:
    path = step_directory(log_dir, manifest.step) / entry.file
    data = path.read_bytes() if path.exists() else b""
    if len(data) != entry.bytes or zlib.crc32(data) != entry.crc32:
      raise LogError(
        f"{path}: expected {entry.bytes} bytes with crc32 {entry.crc32}, "
        f"got {len(data)} with {zlib.crc32(data)}"
      )
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
      if reader.num_records() != len(entry.lengths):
        raise LogError(f"{path}: expected {len(entry.lengths)} records, got {reader.num_records()}")
      for length in entry.lengths:
        record = types.decode(reader.read(), types.TrajectoryRecord)
        if len(record.trajectory.tokens) != length:
          raise LogError(
            f"{path}: rollout {record.rollout_id}: expected {length} tokens, "
            f"got {len(record.trajectory.tokens)}"
          )
        yield record
    finally:
      reader.close()
