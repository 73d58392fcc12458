"""Checkpoint directories that are whole or not there: written aside, flushed, moved into place.

Place in the ring: round whatever writes a checkpoint that is not a published version (those have a
manifest, and rules of their own). No jax.
"""

import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable

from intellect3.models.stored import formats, shards

LAST = "config.json"
"""The file without which a directory is no checkpoint; it is moved last."""
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


def write(directory: str | os.PathLike[str], fill: Callable[[pathlib.Path], None]) -> None:
  """Fills a directory beside the one that is meant, and puts it in its place.

  Args:
    directory: where the files belong. If it is there, the checkpoint in it is replaced and other
      files stay.
    fill: writes the files into the directory that it is given. Where it raises, nothing is left.

  Raises:
    ValueError: the directory is a file, or cannot be made.
  """
  target = pathlib.Path(directory).absolute()
  if target.exists() and not target.is_dir():
    raise ValueError(f"directory: expected a directory, got the file {directory}")
  aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir()
  except OSError as error:
    raise ValueError(f"{directory}: cannot be made: {error.strerror}") from error
  try:
    fill(aside)
    for path in aside.rglob("*"):
      shards.flush(path)
    shards.flush(aside)
    if not target.exists() or not any(target.iterdir()):
      os.rename(aside, target)
    else:
      _replace(aside, target)
  finally:
    shutil.rmtree(aside, ignore_errors=True)
  shards.flush(target.parent)


def _replace(aside: pathlib.Path, target: pathlib.Path) -> None:
  (target / LAST).unlink(missing_ok=True)
  for path in target.iterdir():
    if _WEIGHTS.fullmatch(path.name) or path.name == formats.INDEX:
      path.unlink()
  for path in sorted(aside.iterdir(), key=lambda path: path.name == LAST):
    if path.is_dir() and (target / path.name).is_dir():
      shutil.rmtree(target / path.name)  # a rename replaces files, and no directory with any
    os.replace(path, target / path.name)
  shards.flush(target)
