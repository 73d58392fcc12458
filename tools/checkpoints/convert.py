"""One kind of checkpoint to the other, one tensor at a time.

What is written appears by one rename when it is whole.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from intellect3.models.hf import companions, layout, names, read, write
from intellect3.models.stored import aside, overflow, shards
from tools.checkpoints import opened, orbax
from tools.checkpoints.opened import Opened
from tools.checkpoints.progress import Progress

DTYPES = ("float32", "bfloat16", "float16")


def check_target(directory: str, source: str | None = None) -> None:
  """Raises ValueError unless the directory is not there, or empty, and not inside of the source."""
  path = pathlib.Path(directory)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{directory}: expected no directory, or an empty one, found files")
  if source is not None and path.resolve().is_relative_to(pathlib.Path(source).resolve()):
    raise ValueError(f"{directory}: expected a directory outside of the source {source}")


def to_orbax(
  source: Opened, directory: str, *, dtype: str | None, extras: str, progress: Progress
) -> None:
  """Writes a Hugging Face checkpoint as Orbax's.

  Args:
    source: of `opened.hugging_face`.
    directory: gets `params/` (Orbax: restore it as it is), `model/` (config and tokenizer) and,
      where extra tensors are kept, `extras/`.
    dtype: to convert to; None keeps the stored ones. The router's correction bias is float32.
    extras: `keep` or `drop`.
    progress: is told of every tensor.
  """
  check_target(directory)
  kept = source.extras if extras == "keep" else {}

  def fill(room: pathlib.Path) -> None:
    overflows: list[str] = []
    leaves = {
      entry.path: _leaf(source, entry, dtype, progress, overflows)
      for entry in names.entries(source.config)
    }
    orbax.write(room / opened.PARAMS, leaves)
    overflow.refuse(overflows)
    model = room / opened.MODEL
    model.mkdir()
    stored = str(leaves["embedding",].dtype)
    layers = source.extra_layers if kept else 0
    companions.write_config(model, source.config, stored, source.root, layers)
    companions.copy_files(source.root, model)
    if kept:
      (room / opened.EXTRAS).mkdir()
      shards.write(room / opened.EXTRAS, kept.items(), threads=1, report=progress.add)

  aside.write(directory, fill)


def _leaf(
  source: Opened,
  entry: names.Entry,
  dtype: str | None,
  progress: Progress,
  overflows: list[str],
) -> orbax.Leaf:
  assert source.source is not None
  of_files, config = source.source, source.config
  shape, axes = layout.leaf_shape(config, entry), entry.stack_axes
  kind = read.leaf_dtype(entry, dtype or read.stored_dtype(of_files, entry))

  def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    for at in np.ndindex(shape[:axes]):
      index = (*(slice(place, place + 1) for place in at), *(slice(None),) * (len(shape) - axes))
      part = read.read(of_files, entry, index, kind, overflows).reshape(shape[axes:])
      yield at, part
      progress.add(names.name(config, entry, at), part.nbytes)

  return orbax.Leaf(shape, kind, axes, parts)


def to_hugging_face(
  source: Opened,
  directory: str,
  *,
  dtype: str | None,
  shard_bytes: int,
  extras: str,
  progress: Progress,
) -> None:
  """Writes an Orbax checkpoint as Hugging Face's.

  Args:
    source: of `opened.of_orbax`.
    directory: gets config, tokenizer and safetensors.
    dtype: as in `to_orbax`.
    shard_bytes: most bytes of a file of more than one tensor.
    extras: `keep` or `drop`.
    progress: is told of every tensor.
  """
  check_target(directory)
  kept = source.extras if extras == "keep" else {}
  kinds = _kinds(source, dtype)
  overflows: list[str] = []

  def tensors() -> Iterator[tuple[str, shards.Deferred]]:
    for name, tensor in source.tensors.items():
      kind = kinds[name]
      same = kind == tensor.dtype
      yield name, tensor if same else write.converted(name, tensor, kind, overflows)
    yield from kept.items()

  def fill(room: pathlib.Path) -> None:
    shards.write(room, tensors(), shard_bytes=shard_bytes, threads=1, report=progress.add)
    overflow.refuse(overflows)
    stored = dtype or source.config.param_dtype
    layers = source.extra_layers if kept else 0
    companions.write_config(room, source.config, stored, source.companions, layers)
    companions.copy_files(source.companions, room)

  aside.write(directory, fill)


def written_bytes(source: Opened, *, dtype: str | None, extras: str) -> int:
  """Bytes of all tensors of a conversion; arguments as of `to_orbax`."""
  kinds = _kinds(source, dtype)
  sizes = (
    tensor.nbytes // tensor.dtype.itemsize * kinds[name].itemsize
    for name, tensor in source.tensors.items()
  )
  return sum(sizes) + (opened.total_bytes(source.extras) if extras == "keep" else 0)


def _kinds(source: Opened, dtype: str | None) -> dict[str, np.dtype]:
  """The dtype of every tensor of the model once it is converted."""
  return {
    slot.name: read.leaf_dtype(slot.entry, dtype or source.tensors[slot.name].dtype)
    for slot in names.slots(source.config)
  }
