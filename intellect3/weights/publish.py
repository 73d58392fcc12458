"""Publishing a version of the weights: written aside, flushed to disk, then renamed into place.

Between the train step and the inference servers. Whoever sees `v_000001` sees all of it.
"""

import os
import pathlib
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from intellect3.distributed.processes import ALONE, Processes
from intellect3.models import config as model_configs
from intellect3.models.hf import companions, write
from intellect3.models.stored import shards
from intellect3.weights import gather
from intellect3.weights import manifest as manifests

SHARD_BYTES = 2 << 30
THREADS = 8
_ASIDE = ".writing_"


def publish(
  weights_dir: str | os.PathLike[str],
  version: int,
  config: model_configs.ModelConfig,
  params: Any,
  *,
  canary_ids: Sequence[int],
  canary_logprobs: Sequence[float],
  keep: int,
  dtype: str | None = None,
  tokenizer_from: str | os.PathLike[str] | None = None,
  shard_bytes: int = SHARD_BYTES,
  threads: int = THREADS,
  processes: Processes = ALONE,
) -> pathlib.Path:
  """Publishes the weights as Hugging Face safetensors with a manifest, and prunes old versions.

  Args:
    weights_dir: where the versions live.
    version: of these weights. One that is there already (a resumed run does its steps again) is
      replaced.
    config: the model's.
    params: the model's parameters, jax or NumPy arrays; or, of several processes, what each of
      them gathered (`weights.gather`).
    canary_ids: a prompt on which servers are compared with the trainer.
    canary_logprobs: the trainer's logprobs of those ids under these weights.
    keep: how many versions to keep, this one included, at least 1.
    dtype: of the stored tensors; None keeps each as it is. The router's correction bias stays
      float32.
    tokenizer_from: the checkpoint directory that the model came from: its tokenizer files are
      copied along, and what its `config.json` holds that our config does not say.
    shard_bytes: most bytes of a file of more than one tensor.
    threads: files written at a time.
    processes: that publish together, each its own files; the first makes the directory, waits for
      all, and renames it.

  Returns:
    The version's directory.

  Raises:
    ValueError: a negative version, `keep` below 1, or a canary whose lengths differ.
  """
  if version < 0:
    raise ValueError(f"version: expected at least 0, got {version}")
  if keep < 1:
    raise ValueError(f"keep: expected at least 1, got {keep}")
  if len(canary_ids) != len(canary_logprobs):
    raise ValueError(
      f"canary_logprobs: expected {len(canary_ids)}, one per canary id, got {len(canary_logprobs)}"
    )
  root = pathlib.Path(weights_dir)
  root.mkdir(parents=True, exist_ok=True)
  name = f"{_ASIDE}{version:06d}_{uuid.uuid4().hex[:8]}"
  aside = root / processes.broadcast("weights/directory", name)
  target = manifests.version_directory(root, version)
  gathered = params if isinstance(params, gather.Gathered) else None
  try:
    aside.mkdir(exist_ok=processes.count > 1)
    written = shards.write(
      aside,
      gathered.tensors if gathered is not None else write.tensors(config, params, dtype),
      shard_bytes=shard_bytes,
      threads=threads,
      part=(processes.index, processes.count),
    )
    told = processes.gather("weights/written", [dict(written.fingerprints), dict(written.files)])
    if not processes.is_first:
      return target
    for fingerprints, files in told[1:]:
      written.fingerprints.update(fingerprints)
      written.files.update(files)
    stored = gathered.dtype if gathered is not None else dtype or str(params["embedding"].dtype)
    companions.write_config(aside, config, stored, tokenizer_from, extra_layers=0)
    if tokenizer_from is not None:
      companions.copy_files(tokenizer_from, aside)
    _write_manifest(aside, version, canary_ids, canary_logprobs, written)
    for path in aside.rglob("*"):
      if path.suffix != ".safetensors":  # those are on disk already
        shards.flush(path)
    shards.flush(aside)
    _move_into_place(aside, target)
  except BaseException:
    shutil.rmtree(aside, ignore_errors=True)
    raise
  shards.flush(root)
  prune(root, keep=keep)
  return target


def prune(weights_dir: str | os.PathLike[str], *, keep: int) -> list[int]:
  """Removes all but the newest `keep` versions, and what crashed writers left; returns the removed.

  Call it only from the one process that publishes.
  """
  root = pathlib.Path(weights_dir)
  old = manifests.versions(root)[:-keep]
  _remove(root, old)
  return old


def _remove(root: pathlib.Path, versions: Sequence[int]) -> None:
  for version in versions:
    # Renamed first: nobody may see a version with half of its files.
    gone = root / f"{_ASIDE}{version:06d}_{uuid.uuid4().hex[:8]}"
    os.rename(manifests.version_directory(root, version), gone)
  for left in root.glob(f"{_ASIDE}*"):
    shutil.rmtree(left)


def _write_manifest(
  directory: pathlib.Path,
  version: int,
  ids: Sequence[int],
  logprobs: Sequence[float],
  written: shards.Written,
) -> None:
  sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
  sizes |= written.files  # a shared file system may not show yet what other hosts wrote
  manifest = manifests.WeightsManifest(
    version=version,
    files=[manifests.WeightsFile(file=name, bytes=sizes[name]) for name in sorted(sizes)],
    fingerprints={name: written.fingerprints[name] for name in written.dtypes},
    dtype=Counter(written.dtypes.values()).most_common(1)[0][0],
    canary_ids=[int(token) for token in ids],
    canary_logprobs=[float(logprob) for logprob in logprobs],
  )
  data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
  (directory / manifests.MANIFEST).write_bytes(data)


def _move_into_place(aside: pathlib.Path, target: pathlib.Path) -> None:
  if target.exists():
    os.rename(target, target.parent / f"{_ASIDE}{target.name}_{uuid.uuid4().hex[:8]}")
  os.rename(aside, target)
