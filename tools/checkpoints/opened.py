"""A checkpoint directory of either kind: its config, and its tensors in Hugging Face's layout.

Hugging Face's kind is a directory with `config.json` and safetensors. Of Orbax's kind there are:
what `hf-to-orbax` writes (`params/`, `model/`, `extras/`); the checkpoints of a run, or one of its
steps (config and tokenizer come from the run's exported model or its newest published weights); and
the parameters alone, for which the model's directory must be given.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from intellect3.models.config import ModelConfig
from intellect3.models.hf import companions, layout, names
from intellect3.models.hf.source import Source, check_head, count_extra_layers, open_source
from intellect3.models.stored import directory as stored
from intellect3.models.stored.shards import Deferred
from intellect3.weights import manifest
from tools.checkpoints import orbax

PARAMS, MODEL, EXTRAS = "params", "model", "extras"


class Opened(NamedTuple):
  """A checkpoint whose tensors fit its config.

  Attributes:
    root: the directory.
    config: the model's; `param_dtype` is the embedding's.
    companions: the directory of its `config.json` and tokenizer.
    tensors: of the model, by name, those of one leaf after each other.
    extras: of layers past the last, by name.
    extra_layers: how many layers those are.
    source: of Hugging Face's kind only: what `read.read` takes.
  """

  root: pathlib.Path
  config: ModelConfig
  companions: pathlib.Path
  tensors: Mapping[str, Deferred]
  extras: Mapping[str, Deferred]
  extra_layers: int
  source: Source | None = None


def either(directory: str, *, step: int | None = None, model: str | None = None) -> Opened:
  """Opens a directory of either kind.

  Args:
    directory: its path.
    step: which checkpoint of a run; None is the newest.
    model: a directory with `config.json` and tokenizer, where the checkpoint has none.

  Raises:
    ValueError: it is of neither kind, or not whole.
  """
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise ValueError(f"{directory}: expected a directory, found none")
  if (root / "config.json").is_file():
    if step is not None or model is not None:
      raise ValueError(f"{directory}: --step and --model are for Orbax checkpoints")
    return hugging_face(directory)
  return of_orbax(directory, step=step, model=model)


def hugging_face(directory: str) -> Opened:
  """Opens a directory of Hugging Face's kind.

  Raises:
    ValueError: as `hf.check`; or it is of Orbax's kind.
  """
  root = pathlib.Path(directory)
  if not (root / "config.json").is_file() and root.is_dir() and _checkpoints(root):
    raise ValueError(
      f"{directory}: expected a directory of Hugging Face's kind, got an Orbax checkpoint"
    )
  source = open_source(directory)
  of_model = {
    slot.name: companions.stored_tensor(source, slot.name) for slot in names.slots(source.config)
  }
  extras = {name: companions.stored_tensor(source, name) for name in source.extras}
  if source.repeated_head:
    check_head(source, 0, source.config.vocab_size)
  layers = count_extra_layers(source.raw)
  return Opened(source.root, source.config, source.root, of_model, extras, layers, source)


def of_orbax(directory: str, *, step: int | None = None, model: str | None = None) -> Opened:
  """Opens a directory of Orbax's kind; arguments as of `either`.

  Raises:
    ValueError: it holds no Orbax checkpoint, or one whose arrays do not fit the config.
  """
  root = pathlib.Path(directory)
  place, prefix, beside = _find(root, step)
  beside = pathlib.Path(model) if model is not None else beside
  if beside is None or not (beside / "config.json").is_file():
    raise ValueError(
      f"{directory}: expected a config.json of its model, found none: give its directory as --model"
    )
  tree = orbax.tree(place)
  found = {
    path[len(prefix) :]: tree.open(path) for path in tree.names if path[: len(prefix)] == prefix
  }
  raw = stored.read_json(beside / "config.json")
  config = ModelConfig.from_hf(raw)
  entries = {entry.path: entry for entry in names.entries(config)}
  problems = [f"missing: {'/'.join(path)}" for path in entries if path not in found]
  for path, array in found.items():
    if path not in entries:
      problems.append(f"unexpected: {'/'.join(path)}")
    elif array.shape != layout.leaf_shape(config, entries[path]):
      expected = list(layout.leaf_shape(config, entries[path]))
      problems.append(f"misshapen: {'/'.join(path)}: expected {expected}, got {list(array.shape)}")
  if problems:
    listed = "\n  ".join(problems)
    raise ValueError(f"{place}: the arrays do not fit {beside / 'config.json'}:\n  {listed}")
  tensors = {
    slot.name: _deferred(config, slot, found[slot.entry.path]) for slot in names.slots(config)
  }
  dtype = str(found["embedding",].dtype)
  extras = _extras(root)
  extra_layers = count_extra_layers(raw) if extras else 0
  config = ModelConfig.from_hf(raw, param_dtype=dtype, dtype=dtype)
  return Opened(root, config, beside, tensors, extras, extra_layers)


def _deferred(config: ModelConfig, slot: names.Slot, array: orbax.Array) -> Deferred:
  shape = names.stored_shape(slot.entry, layout.slot_shape(config, slot.entry))

  def make() -> np.ndarray:
    return np.ascontiguousarray(layout.to_stored(slot.entry, array.read(slot.at))).reshape(shape)

  return Deferred(shape, array.dtype, make)


def _extras(root: pathlib.Path) -> dict[str, Deferred]:
  """The extra tensors that `hf-to-orbax` kept."""
  place = root / EXTRAS
  if not place.is_dir():
    return {}
  places, faults = stored.scan(place)
  if faults:
    raise ValueError(f"{place}: " + "; ".join(faults.values()))

  def deferred(name: str) -> Deferred:
    entry = places[name]
    return Deferred(entry.shape, entry.dtype, lambda: stored.mapped(place, entry).copy())

  return {name: deferred(name) for name in places}


def _checkpoints(root: pathlib.Path) -> bool:
  """Whether a directory holds an Orbax checkpoint, or is a run with some."""
  try:
    _find(root, None)
  except ValueError:
    return False
  return True


def _find(
  root: pathlib.Path, step: int | None
) -> tuple[pathlib.Path, tuple[str, ...], pathlib.Path | None]:
  """The Orbax checkpoint, the path of the parameters in its tree, and the model's directory."""
  if step is None:
    if (root / PARAMS / orbax.METADATA).is_file():
      return root / PARAMS, (), root / MODEL
    if (root / orbax.METADATA).is_file():
      return root, (), None
    if (root / "state" / orbax.METADATA).is_file():
      return root / "state", ("params",), _of_run(root.absolute().parent.parent)
  checkpoints = root / "checkpoints" if (root / "checkpoints").is_dir() else root
  steps = sorted(
    int(path.name)
    for path in checkpoints.iterdir()
    if path.name.isdigit() and (path / "state" / orbax.METADATA).is_file()
  )
  if not steps:
    of_step = "" if step is None else f" with step {step}"
    raise ValueError(f"{root}: expected an Orbax checkpoint{of_step}, found none")
  if step is not None and step not in steps:
    raise ValueError(f"{root}: --step: expected one of {steps}, got {step}")
  chosen = steps[-1] if step is None else step
  state = checkpoints / str(chosen) / "state"
  return state, ("params",), _of_run(checkpoints.absolute().parent)


def _of_run(run: pathlib.Path) -> pathlib.Path | None:
  """Where a run has its model's config and tokenizer."""
  if (run / MODEL / "config.json").is_file():
    return run / MODEL
  version = manifest.latest(run / "weights")
  return None if version is None else manifest.version_directory(run / "weights", version)


def total_bytes(values: Mapping[str, Any]) -> int:
  """Bytes of some tensors."""
  return sum(tensor.nbytes for tensor in values.values())
