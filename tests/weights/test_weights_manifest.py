"""A version's manifest: seen only when whole, and a changed byte names its tensor."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from intellect3.weights import manifest


def _version(root, version, *, tensors=None):
  directory = manifest.version_directory(root, version)
  directory.mkdir(parents=True)
  rng = np.random.default_rng(version)
  tensors = tensors or {name: rng.random((3, 4), np.float32) for name in ("a.weight", "b.weight")}
  path = directory / "model.safetensors"
  save_file(tensors, path)
  record = manifest.WeightsManifest(
    version=version,
    files=[manifest.WeightsFile(file=path.name, bytes=path.stat().st_size)],
    fingerprints=manifest.tensor_fingerprints(path),
    dtype="F32",
    canary_ids=[1, 2],
    canary_logprobs=[0.0, -0.5],
  )
  (directory / manifest.MANIFEST).write_bytes(msgspec.json.encode(record))
  return directory


def test_versions_without_a_manifest_or_with_another_name_are_invisible(tmp_path):
  assert manifest.latest(tmp_path / "none") is None
  _version(tmp_path, 2)
  _version(tmp_path, 10)
  (tmp_path / "v_000011").mkdir()
  (tmp_path / ".writing_000012").mkdir()
  (tmp_path / ".writing_000012" / manifest.MANIFEST).write_text("{}")
  assert manifest.versions(tmp_path) == [2, 10]
  assert manifest.latest(tmp_path) == 10
  assert manifest.read(tmp_path, 10).canary_ids == [1, 2]
  with pytest.raises(FileNotFoundError):
    manifest.read(tmp_path, 11)


def test_a_changed_byte_names_its_tensor(tmp_path):
  directory = _version(tmp_path, 0)
  assert manifest.verify(directory) == []
  path = directory / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[-2] ^= 1  # the last tensor in the file
  path.write_bytes(data)
  assert manifest.verify(directory) == ["b.weight"]
  path.write_bytes(data[:-1])
  assert set(manifest.verify(directory)) == {"model.safetensors", "a.weight", "b.weight"}


def test_fingerprints_are_those_of_the_bytes(tmp_path):
  import zlib

  tensors = {"x": np.arange(7, dtype=np.int16), "y": np.ones((2, 2), np.float64)}
  save_file(tensors, tmp_path / "t.safetensors")
  expected = {name: zlib.crc32(array.tobytes()) for name, array in tensors.items()}
  assert manifest.tensor_fingerprints(tmp_path / "t.safetensors") == expected


def test_a_manifest_of_another_version_is_refused(tmp_path):
  directory = _version(tmp_path, 1)
  directory.rename(manifest.version_directory(tmp_path, 2))
  with pytest.raises(ValueError, match="version: expected 2, got 1"):
    manifest.read(tmp_path, 2)
  path = manifest.version_directory(tmp_path, 2) / manifest.MANIFEST
  path.write_bytes(b'{"version": "one"}')
  with pytest.raises(ValueError, match=r"manifest\.json"):
    manifest.read(tmp_path, 2)


def test_the_manifest_loads_no_jax():
  code = "import sys, intellect3.weights.manifest; print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "False"
