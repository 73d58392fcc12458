"""Hugging Face safetensors checkpoints, in and out.

Place in the ring: runs start from one, weights are published as one, servers load one.
Bitwise: what `save` wrote, `load` gives back.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

from intellect3.models import hf_names, transformer
from intellect3.models.config import ModelConfig

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "chat_template.jinja",
  "generation_config.json",
)

Directory = str | os.PathLike[str]


def load(
  directory: Directory, *, dtype: str | None = None, **run_options: Any
) -> tuple[ModelConfig, transformer.Params]:
  """Reads a checkpoint directory: `config.json` and safetensors, single or sharded.

  Args:
    directory: its path.
    dtype: dtype to convert the tensors to; None keeps the file's. The router's correction bias is
      always float32.
    **run_options: fields of ModelConfig that the file does not hold, as in `ModelConfig.from_hf`.

  Returns:
    The config, its `param_dtype` being the tensors' (also its `dtype`, unless given), and the
    params with NumPy leaves.

  Raises:
    ValueError: for a missing or broken file, or an unknown family; and one that lists every
      missing, unexpected and misshapen tensor.
  """
  directory = pathlib.Path(directory)
  config, files, handles = _opened(directory, run_options)
  shapes, _ = transformer.abstract(config)
  slots = {slot.name: slot for slot in hf_names.slots(config)}

  flat: dict[tuple[str, ...], np.ndarray] = {}
  for name, slot in slots.items():
    try:
      tensor = handles[files[name]].get_tensor(name)
    except safetensors.SafetensorError as error:
      raise ValueError(f"{directory / files[name]}: cannot read {name}: {error}") from error
    path = _path(slot.entry)
    shape = _shape(shapes, slot)
    if slot.entry.inputs is not None:
      tensor = tensor.T
    kind = np.float32 if path[-1] == "correction_bias" else np.dtype(dtype or tensor.dtype)
    if path not in flat:
      flat[path] = np.empty(_leaf(shapes, path).shape, kind)
    elif np.result_type(flat[path].dtype, kind) != flat[path].dtype:
      raise ValueError(f"{directory}: {name}: expected {flat[path].dtype} as its stack, got {kind}")
    flat[path][slot.at] = tensor.reshape(shape)
  params: transformer.Params = {}
  for path, array in flat.items():
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = array
  name = str(flat[("embedding",)].dtype)
  computed = config.dtype if "dtype" in run_options else name
  return dataclasses.replace(config, param_dtype=name, dtype=computed), params


def check(directory: Directory, **run_options: Any) -> ModelConfig:
  """Reads only `config.json` and the files' headers; raises as `load` does.

  Args:
    directory: its path.
    **run_options: as in `load`.

  Returns:
    The config; its dtypes are those of `config.json`.
  """
  return _opened(pathlib.Path(directory), run_options)[0]


def _opened(
  directory: pathlib.Path, run_options: dict[str, Any]
) -> tuple[ModelConfig, dict[str, str], dict[str, Any]]:
  """The config, the file of each tensor, and the files opened, all checked against each other."""
  try:
    config = ModelConfig.from_hf(_read_json(directory / "config.json"), **run_options)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{directory}: {error}") from error
  files = _files(directory)
  shapes, _ = transformer.abstract(config)
  slots = {slot.name: slot for slot in hf_names.slots(config)}
  handles = {file: _open(directory / file) for file in sorted(set(files.values()))}
  problems = _problems(config, shapes, slots, files, handles)
  if problems:
    raise ValueError(f"{directory}: the tensors do not fit the config:\n  " + "\n  ".join(problems))
  return config, files, handles


def to_hf(config: ModelConfig, params: transformer.Params) -> Iterator[tuple[str, np.ndarray]]:
  """The checkpoint's tensors, one at a time, by name; contiguous NumPy arrays.

  Args:
    config: of the model.
    params: nested dict of NumPy or (addressable) JAX arrays.
  """
  fetched: tuple[tuple[str, ...], np.ndarray] | None = None
  shapes, _ = transformer.abstract(config)
  for slot in hf_names.slots(config):
    path = _path(slot.entry)
    if fetched is None or fetched[0] != path:
      fetched = (path, np.asarray(jax.device_get(_leaf(params, path))))
    if fetched[1].shape != _leaf(shapes, path).shape:
      expected = list(_leaf(shapes, path).shape)
      raise ValueError(f"{'/'.join(path)}: expected {expected}, got {list(fetched[1].shape)}")
    tensor = fetched[1][slot.at]
    shape = hf_names.stored_shape(slot.entry, tensor.shape)
    if slot.entry.inputs is not None:
      tensor = tensor.reshape(shape[::-1]).T
    yield slot.name, np.ascontiguousarray(tensor).reshape(shape)


def merge(
  config: ModelConfig, params: transformer.Params, tensors: Mapping[str, np.ndarray]
) -> transformer.Params:
  """Puts some of a checkpoint's tensors in the place of those that params hold.

  Args:
    config: of the model.
    params: nested dict of NumPy arrays; not changed.
    tensors: by the checkpoint's names; converted to the dtype of what they replace.

  Returns:
    New params; leaves that no tensor belongs to are shared with the old ones.

  Raises:
    ValueError: one that lists every unknown and misshapen tensor.
  """
  shapes, _ = transformer.abstract(config)
  slots = {slot.name: slot for slot in hf_names.slots(config)}
  problems = []
  for name, tensor in tensors.items():
    if name not in slots:
      if not hf_names.is_ignored(name, config):
        problems.append(f"unexpected: {name}")
      continue
    expected = hf_names.stored_shape(slots[name].entry, _shape(shapes, slots[name]))
    if tensor.shape != expected:
      problems.append(f"misshapen: {name}: expected {list(expected)}, got {list(tensor.shape)}")
  if problems:
    raise ValueError("the tensors do not fit the config:\n  " + "\n  ".join(problems))
  merged = jax.tree.map(lambda leaf: leaf, params)
  own: set[tuple[str, ...]] = set()
  for name, tensor in tensors.items():
    if name not in slots:
      continue
    slot = slots[name]
    path = _path(slot.entry)
    parent = _leaf(merged, path[:-1])
    if path not in own:
      parent[path[-1]] = np.array(parent[path[-1]])
      own.add(path)
    value = tensor.T if slot.entry.inputs is not None else tensor
    parent[path[-1]][slot.at] = value.reshape(_shape(shapes, slot))
  return merged


def save(
  directory: Directory,
  config: ModelConfig,
  params: transformer.Params,
  *,
  dtype: str | None = None,
  tokenizer_from: Directory | None = None,
) -> None:
  """Writes `config.json`, `model.safetensors` and, from another directory, the tokenizer's files.

  Args:
    directory: made if it is not there.
    config: of the model.
    params: nested dict of arrays.
    dtype: dtype to convert to, e.g. `bfloat16`; None keeps the leaves'. The router's correction
      bias stays float32.
    tokenizer_from: a checkpoint directory whose tokenizer, template and generation config are
      copied, those of them that it has.

  Raises:
    ValueError: where a leaf's shape does not fit the config, or tokenizer_from is no directory.
  """
  directory = pathlib.Path(directory)
  if tokenizer_from is not None and not pathlib.Path(tokenizer_from).is_dir():
    raise ValueError(f"tokenizer_from: expected a directory, got {str(tokenizer_from)!r}")
  tensors = {}
  for name, tensor in to_hf(config, params):
    keep = dtype is None or name.endswith("e_score_correction_bias")
    tensors[name] = tensor if keep else tensor.astype(dtype)
  stored = str(tensors["model.embed_tokens.weight"].dtype)
  directory.mkdir(parents=True, exist_ok=True)
  hf = dataclasses.replace(config, param_dtype=stored).to_hf()
  (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  if tokenizer_from is not None:
    for file in TOKENIZER_FILES:
      source = pathlib.Path(tokenizer_from) / file
      if source.is_file() and source.resolve() != (directory / file).resolve():
        shutil.copyfile(source, directory / file)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f"{path.name}: cannot be read: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"{path.name}: no valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path.name}: expected a JSON object, got {type(value).__name__}")
  return value


def _files(directory: pathlib.Path) -> dict[str, str]:
  """The file of each tensor: from the index, or from the single file's header."""
  index = directory / "model.safetensors.index.json"
  if index.is_file():
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
      raise ValueError(f"{index}: expected an object `weight_map`, got {weight_map!r}")
    return weight_map
  single = directory / "model.safetensors"
  if not single.is_file():
    raise ValueError(
      f"{directory}: expected model.safetensors or model.safetensors.index.json, found neither"
    )
  return dict.fromkeys(_open(single).keys(), single.name)


def _open(path: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(path, "np")
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f"{path}: no readable safetensors file: {error}") from error


def _problems(config, shapes, slots, files, handles) -> list[str]:
  """Every way in which the tensors of the files differ from those that the model needs."""
  held = {file: set(handle.keys()) for file, handle in handles.items()}
  problems = [f"missing: {name}" for name in slots if name not in files]
  for name, file in files.items():
    if name not in slots:
      if not hf_names.is_ignored(name, config):
        problems.append(f"unexpected: {name}")
    elif name not in held[file]:
      problems.append(f"missing: {name} (the index says it is in {file})")
    else:
      expected = hf_names.stored_shape(slots[name].entry, _shape(shapes, slots[name]))
      given = tuple(handles[file].get_slice(name).get_shape())
      if given != expected:
        problems.append(f"misshapen: {name}: expected {list(expected)}, got {list(given)}")
  return problems


def _path(entry: hf_names.Entry) -> tuple[str, ...]:
  return entry.path if entry.stack is None else (entry.stack, *entry.path)


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _shape(shapes: transformer.Params, slot: hf_names.Slot) -> tuple[int, ...]:
  return _leaf(shapes, _path(slot.entry)).shape[len(slot.at) :]
