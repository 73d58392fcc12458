"""What travels along with a model's tensors from one checkpoint directory to the next.

Place in the ring: beside `write`. Tokenizer and template are files; of `config.json` all that our
config does not say (end-of-sequence ids and the like) is kept; the tensors of multi-token
prediction layers, which our model does not have, are copied or left, as asked.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from intellect3.models import hf_config
from intellect3.models.config import ModelConfig
from intellect3.models.hf.source import EXTRA_LAYERS, Source, count_extra_layers
from intellect3.models.stored import directory as stored
from intellect3.models.stored.directory import Directory
from intellect3.models.stored.shards import Deferred

logger = logging.getLogger(__name__)

MOST_BYTES = 100_000_000
"""Larger files stay behind."""
_FOLDERS = ("additional_chat_templates",)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
_OF_THE_WEIGHTS = ("config.json", "manifest.json")
"""Files that are written anew with the tensors; and so are safetensors and indices."""
EXTRAS = ("keep", "drop")
_OWN_TO_A_FILE = ("dtype", "torch_dtype", "transformers_version", EXTRA_LAYERS)
"""Keys that are said anew of the tensors that are written, or by whoever writes them."""


def check(source: Directory | None, extras: str) -> None:
  """Raises ValueError where the source is no directory or `extras` is not one of `EXTRAS`."""
  if source is not None and not pathlib.Path(source).is_dir():
    raise ValueError(f"source: expected a directory, got {str(source)!r}")
  if extras not in EXTRAS:
    raise ValueError(f"extras: expected one of {EXTRAS}, got {extras!r}")
  if extras == "keep" and source is None:
    raise ValueError("extras: expected a source to keep them from, got None")


def copy_files(source: Directory, directory: Directory) -> list[str]:
  """Copies what belongs to the model beside its weights: tokenizer, templates, code, licence.

  That is every file but weights, their indices, `config.json` and `manifest.json`, hidden files and
  those above `MOST_BYTES`; of folders only `additional_chat_templates`. What stays behind for good,
  written anew by nobody and not hidden, is said in the log.

  Returns:
    The names of the files copied, relative to the directory.
  """
  root, target = pathlib.Path(source), pathlib.Path(directory)
  copied, left = [], []
  for path in sorted(root.iterdir()):
    if _is_written_anew(path.name) or path.name.startswith("."):
      continue
    if path.is_dir() and path.name in _FOLDERS:
      inside = sorted(path.iterdir())
    else:
      inside = [path]
    for file in inside:
      name = file.relative_to(root).as_posix()
      is_weights = name.endswith(_OTHER_WEIGHTS)
      if is_weights or not file.is_file() or file.stat().st_size > MOST_BYTES:
        left.append(name)
      elif file.resolve() != (target / name).resolve():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
        copied.append(name)
  if left:
    logger.info("%s: not copied along: %s", root, ", ".join(left))
  return copied


def _is_written_anew(name: str) -> bool:
  return name in _OF_THE_WEIGHTS or name.endswith((".index.json", ".safetensors"))


def write_config(
  directory: Directory, config: ModelConfig, dtype: str, source: Directory | None, extra_layers: int
) -> None:
  """Writes `config.json`.

  Args:
    directory: where to.
    config: of the model.
    dtype: of the stored tensors.
    source: a checkpoint directory, whose `config.json` gives what our config does not say.
    extra_layers: layers past the last whose tensors are written too.
  """
  raw: Mapping[str, Any] = {}
  if source is not None and (pathlib.Path(source) / "config.json").is_file():
    raw = stored.read_json(pathlib.Path(source) / "config.json")
  values = config_values(config, dtype, raw, extra_layers)
  text = json.dumps(values, indent=2) + "\n"
  (pathlib.Path(directory) / "config.json").write_text(text)


def config_values(
  config: ModelConfig, dtype: str, raw: Mapping[str, Any], extra_layers: int
) -> dict[str, Any]:
  """The `config.json` of a model that came from a checkpoint with the `config.json` raw.

  Raises:
    ValueError: what the source says besides makes it another model; it names the keys.
  """
  own = dataclasses.replace(config, param_dtype=dtype).to_hf()
  rest = {key: raw[key] for key in raw if key not in _OWN_TO_A_FILE}
  if extra_layers:
    own[EXTRA_LAYERS] = extra_layers
  ours, both = hf_config.read(own), hf_config.read({**rest, **own})
  differ = sorted(field for field in ours if ours[field] != both[field])
  if differ:
    raise ValueError(
      f"config.json: expected a source of the same model, got another {', '.join(differ)}"
    )
  return {**rest, **own}


def has_extras(source: Directory) -> bool:
  """Whether a directory's config says that it has layers past the last; it may hold no tensors."""
  path = pathlib.Path(source) / "config.json"
  return path.is_file() and count_extra_layers(stored.read_json(path)) > 0


def extra_tensors(source: Source, extras: str) -> Iterator[tuple[str, Deferred]]:
  """The extra tensors of a source as they are stored, or none; says in the log how many."""
  if source.extras:
    logger.info(
      "%s: %d extra tensors (%.3f GB) of layers past the last: %s",
      source.root,
      len(source.extras),
      source.extra_bytes / 1e9,
      {"keep": "kept", "drop": "dropped"}[extras],
    )
  for name in source.extras if extras == "keep" else ():
    yield name, stored_tensor(source, name)


def stored_tensor(source: Source, name: str) -> Deferred:
  """A tensor of a source as it is stored, read when it is asked for."""
  place = source.places[name]
  return Deferred(place.shape, place.dtype, lambda: stored.mapped(source.root, place).copy())
