"""A checkpoint directory, opened: its config, and every tensor checked against it by the headers.

Place in the ring: under reading, and under whoever must know that a directory is fit before
anything starts. No tensor is read here.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from intellect3.models.config import ModelConfig
from intellect3.models.hf import fused, layout, names
from intellect3.models.stored import directory as stored
from intellect3.models.stored.directory import Directory
from intellect3.models.stored.formats import Place

logger = logging.getLogger(__name__)

EXTRA_LAYERS = "num_nextn_predict_layers"
_ROWS = 4096
"""Rows that are compared at a time."""


class Source(NamedTuple):
  """A directory whose tensors fit its config.

  Attributes:
    root: the directory.
    config: the model's.
    raw: `config.json` as it is.
    places: where every tensor is, by name; those of the model and the others.
    extras: names of the tensors of multi-token prediction layers, which our model does not have.
    repeated_head: whether there is a head that must equal the embedding.
  """

  root: pathlib.Path
  config: ModelConfig
  raw: Mapping[str, Any]
  places: Mapping[str, Place]
  extras: tuple[str, ...]
  repeated_head: bool

  @property
  def extra_bytes(self) -> int:
    """Size of the extra tensors."""
    return sum(self.places[name].bytes for name in self.extras)


def check(directory: Directory, **run_options: Any) -> ModelConfig:
  """Reads only `config.json` and the files' headers; raises as `load` does.

  Args:
    directory: its path.
    **run_options: fields of ModelConfig that the file does not hold, or that are to differ from it,
      as in `ModelConfig.from_hf`.

  Returns:
    The config; its dtypes are the stored embedding's, unless given.
  """
  return open_source(directory, **run_options).config


def open_source(directory: Directory, **run_options: Any) -> Source:
  """Reads `config.json` and the headers, and checks every tensor's name, shape and bytes.

  Raises:
    ValueError: for a missing or broken file, or an unknown family; and one that lists every
      missing, unexpected, misshapen, truncated and otherwise broken tensor.
  """
  root = pathlib.Path(directory)
  try:
    raw = stored.read_json(root / "config.json")
    config = ModelConfig.from_hf(raw, **run_options)
    extra_layers = count_extra_layers(raw)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{root}: {error}") from error
  places, faults = stored.scan(root)
  places = fused.split(places, config)
  limit = config.num_layers + extra_layers
  extras = []
  slots = {slot.name: slot for slot in names.slots(config)}
  problems = list(faults.values())
  problems += [f"missing: {name}" for name in slots if name not in places and name not in faults]
  for name, place in places.items():
    if name in slots:
      entry = slots[name].entry
      expected = names.stored_shape(entry, layout.slot_shape(config, entry))
      if place.shape != expected:
        problems.append(f"misshapen: {name}: expected {list(expected)}, got {list(place.shape)}")
    elif names.is_extra(name, config) and int(name.split(".")[2]) < limit:
      extras.append(name)
    # transformers writes an MLP of width 0 where a model has no shared experts.
    elif 0 not in place.shape and not names.repeats_embedding(name, config):
      past = f" ({EXTRA_LAYERS} is {extra_layers})" if names.is_extra(name, config) else ""
      problems.append(f"unexpected: {name}{past}")
  repeated = names.HEAD in places and names.HEAD not in slots
  if repeated and places[names.HEAD].shape != (config.vocab_size, config.embed_dim):
    problems.append(f"misshapen: {names.HEAD}: expected the embedding's shape, as it is tied to it")
  if names.EMBEDDING in places:
    stored_as = str(places[names.EMBEDDING].dtype)
    dtypes = {"param_dtype": stored_as, "dtype": stored_as, **run_options}
    config = dataclasses.replace(config, **{key: dtypes[key] for key in ("param_dtype", "dtype")})
  if problems:
    raise ValueError(f"{root}: the tensors do not fit the config:\n  " + "\n  ".join(problems))
  return Source(root, config, raw, places, tuple(extras), repeated)


def count_extra_layers(raw: Mapping[str, Any]) -> int:
  """How many layers past the last a `config.json` says there are.

  Raises:
    ValueError: it says no number.
  """
  count = raw.get(EXTRA_LAYERS)
  if count is None:
    return 0
  if type(count) is not int or count < 0:
    raise ValueError(
      f"config.json: {EXTRA_LAYERS}: expected an integer of at least 0, got {count!r}"
    )
  return count


def check_head(source: Source, first: int, last: int) -> None:
  """Compares some rows of a repeated head with the embedding's.

  Raises:
    ValueError: they differ.
  """
  head, embedding = (source.places[name] for name in (names.HEAD, names.EMBEDDING))
  rows = (slice(start, min(start + _ROWS, last)) for start in range(first, last, _ROWS))
  if not stored.same(source.root, head, embedding, rows):
    raise ValueError(
      f"{source.root}: {names.HEAD}: expected the embedding's values (tie_word_embeddings), "
      "got others"
    )
