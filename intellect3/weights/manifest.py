"""What a published version of the weights says about itself, and how to check it. No jax.

    WEIGHTS_DIR/v_000001/*.safetensors, config.json, tokenizer files, manifest.json

Written by the trainer (`publish`), read by the orchestrator, which tells the servers to load it and
compares their logprobs on the canary prompt with the trainer's. A version appears by the rename of
its whole directory: one that is being written has another name and is invisible.
"""

import concurrent.futures
import os
import pathlib
import re
import zlib
from collections.abc import Sequence

import msgspec

from intellect3.models.stored.formats import read_header

MANIFEST = "manifest.json"
WEIGHTS_SCHEMA = 1
_NAME = re.compile(r"v_(\d{6,})")
_BLOCK = 1 << 20
READERS = 8
"""Files that are read at a time."""


class WeightsFile(msgspec.Struct, frozen=True, kw_only=True):
  """One file of a version.

  Attributes:
    file: its name in the directory.
    bytes: its size.
  """

  file: str
  bytes: int


class WeightsManifest(msgspec.Struct, frozen=True, kw_only=True):
  """The manifest of a published version.

  Attributes:
    version: which weights these are; v0 are the initial ones.
    files: every file of the directory but the manifest.
    fingerprints: crc32 of each tensor's bytes as stored, by its Hugging Face name.
    dtype: of the stored tensors, in safetensors' spelling (`F32`, `BF16`); all but exceptions.
    canary_ids: the token ids of the canary prompt.
    canary_logprobs: the trainer's logprobs of those ids, 0.0 for the first.
    schema: version of this record.
  """

  version: int
  files: Sequence[WeightsFile]
  fingerprints: dict[str, int]
  dtype: str
  canary_ids: Sequence[int]
  canary_logprobs: Sequence[float]
  schema: int = WEIGHTS_SCHEMA


def version_directory(weights_dir: str | os.PathLike[str], version: int) -> pathlib.Path:
  """The directory of a version."""
  return pathlib.Path(weights_dir) / f"v_{version:06d}"


def versions(weights_dir: str | os.PathLike[str]) -> list[int]:
  """The published versions, ascending."""
  root = pathlib.Path(weights_dir)
  if not root.is_dir():
    return []
  matches = ((entry, _NAME.fullmatch(entry.name)) for entry in root.iterdir())
  return sorted(int(match[1]) for entry, match in matches if match and (entry / MANIFEST).exists())


def latest(weights_dir: str | os.PathLike[str]) -> int | None:
  """The newest published version, or None."""
  return max(versions(weights_dir), default=None)


def read(weights_dir: str | os.PathLike[str], version: int) -> WeightsManifest:
  """The manifest of a version.

  Raises:
    FileNotFoundError: the version is not published (or pruned already).
    ValueError: the manifest is not one, or of another version or schema.
  """
  path = version_directory(weights_dir, version) / MANIFEST
  manifest = _parse(path)
  if manifest.version != version:
    raise ValueError(f"{path}: version: expected {version}, got {manifest.version}")
  return manifest


def verify(directory: str | os.PathLike[str]) -> list[str]:
  """Compares a version's files with its manifest.

  Args:
    directory: one version's directory.

  Returns:
    What is wrong: names of tensors whose bytes, and of files whose size or header, are not what the
    manifest says; empty where all is right.
  """
  directory = pathlib.Path(directory)
  manifest = _parse(directory / MANIFEST)
  wrong = []
  found: dict[str, int] = {}
  readable: list[pathlib.Path] = []
  for entry in manifest.files:
    path = directory / entry.file
    if not path.is_file() or path.stat().st_size != entry.bytes:
      wrong.append(entry.file)
    elif path.suffix == ".safetensors":
      readable.append(path)
  for path, fingerprints in zip(readable, _read_at_once(readable), strict=True):
    if fingerprints is None:
      wrong.append(path.name)
    else:
      found |= fingerprints
  for name in sorted(set(manifest.fingerprints) | set(found)):
    if manifest.fingerprints.get(name) != found.get(name):
      wrong.append(name)
  return wrong


def _read_at_once(paths: Sequence[pathlib.Path]) -> list[dict[str, int] | None]:
  if len(paths) == 1:  # no thread where there is nothing to share out
    return [_fingerprints_or_none(paths[0])]
  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    return list(pool.map(_fingerprints_or_none, paths))


def _fingerprints_or_none(path: pathlib.Path) -> dict[str, int] | None:
  try:
    return tensor_fingerprints(path)
  except ValueError:
    return None


def tensor_fingerprints(path: str | os.PathLike[str]) -> dict[str, int]:
  """The crc32 of each tensor's bytes in a safetensors file, by name.

  Raises:
    ValueError: the file is no safetensors file.
  """
  fingerprints = {}
  with open(path, "rb") as file:
    header, start = read_header(file)
    for name, entry in header.items():
      first, last = entry["data_offsets"]
      file.seek(start + first)
      rest, crc = last - first, 0
      while rest:
        block = file.read(min(rest, _BLOCK))
        if not block:
          raise ValueError(f"{path}: {name}: the file ends inside the tensor")
        crc = zlib.crc32(block, crc)
        rest -= len(block)
      fingerprints[name] = crc
  return fingerprints


def _parse(path: pathlib.Path) -> WeightsManifest:
  try:
    manifest = msgspec.json.decode(path.read_bytes(), type=WeightsManifest)
  except msgspec.DecodeError as error:
    raise ValueError(f"{path}: {error}") from error
  if manifest.schema != WEIGHTS_SCHEMA:
    raise ValueError(f"{path}: schema: expected {WEIGHTS_SCHEMA}, got {manifest.schema}")
  return manifest
