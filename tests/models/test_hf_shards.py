"""Shards: what safetensors reads is what was written; fingerprints and parallel writing."""

import json
import threading
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from intellect3.models.stored import directory, shards
from intellect3.weights import manifest, tensors

RNG = np.random.default_rng(0)
ARRAYS = {
  "a.weight": RNG.standard_normal((8, 3)).astype(np.float32),
  "b.weight": RNG.standard_normal((5, 4)).astype(ml_dtypes.bfloat16),
  "c.transposed": RNG.standard_normal((4, 6)).astype(np.float32).T,
  "d.scalar": np.asarray(2.5, np.float16),
  "e.empty": np.zeros((0, 3), np.float32),
  "f.big": RNG.standard_normal((40, 5)).astype(np.float32),
}


def write(directory, shard_bytes=1 << 20, threads=2, arrays=None):
  items = (ARRAYS if arrays is None else arrays).items()
  return shards.write(directory, items, shard_bytes=shard_bytes, threads=threads)


@pytest.mark.parametrize(("shard_bytes", "files"), [(1 << 20, 1), (240, 2), (1, 6)])
def test_safetensors_reads_what_was_written(tmp_path, shard_bytes, files):
  written = write(tmp_path, shard_bytes)
  paths = sorted(tmp_path.glob("*.safetensors"))
  assert len(paths) == files and not list(tmp_path.glob("*.part"))
  loaded = {}
  for path in paths:
    loaded |= safetensors.numpy.load_file(path)
  assert set(loaded) == set(ARRAYS)
  for name, array in ARRAYS.items():
    assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
    np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    assert written.fingerprints[name] == zlib.crc32(np.ascontiguousarray(array).tobytes())
  assert written.dtypes["b.weight"] == "BF16" and written.dtypes["d.scalar"] == "F16"
  if files == 1:
    assert paths[0].name == "model.safetensors"
  else:
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
      assert name in safetensors.numpy.load_file(tmp_path / file)
    assert set(index["weight_map"]) == set(ARRAYS)


def test_fingerprints_agree_with_those_read_back(tmp_path):
  written = write(tmp_path, 100)
  found = {}
  for path in tmp_path.glob("*.safetensors"):
    found |= manifest.tensor_fingerprints(path)
  assert found == written.fingerprints


def test_single_tensors_are_read_back(tmp_path):
  write(tmp_path, 100)
  places = tensors.index(tmp_path)
  assert set(places) == set(ARRAYS)
  names = ["f.big", "b.weight", "d.scalar", "e.empty"]
  for (name, array), asked in zip(tensors.read(tmp_path, places, names), names, strict=True):
    assert name == asked and array.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(array, ARRAYS[name])
    assert places[name].bytes == array.nbytes


def test_a_file_that_was_cut_or_is_gone(tmp_path):
  write(tmp_path)
  places = tensors.index(tmp_path)
  path = tmp_path / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match=r"f\.big: expected 800 bytes, got 790"):
    tensors.read(tmp_path, places, ["f.big"])
  with pytest.raises(ValueError, match=r"truncated: f\.big: expected model.safetensors to have"):
    tensors.index(tmp_path)
  path.unlink()
  with pytest.raises(FileNotFoundError):
    tensors.read(tmp_path, places, ["f.big"])


def test_shards_are_written_side_by_side_and_only_so_many_wait(tmp_path, monkeypatch):
  together = threading.Barrier(3, timeout=20)
  write_shard = shards._write_shard
  drawn, finished = [], []

  def at_once(path, shard, report):
    together.wait()  # breaks unless three are here at once
    result = write_shard(path, shard, report)
    finished.append(path)
    return result

  def draw():
    for number in range(6):
      # Drawn ahead: one shard for each thread, and the one being put together.
      assert number - len(finished) <= 4
      drawn.append(number)
      yield f"t{number}", np.zeros(4, np.float32)

  monkeypatch.setattr(shards, "_write_shard", at_once)
  shards.write(tmp_path, draw(), shard_bytes=1, threads=3)
  assert len(drawn) == len(finished) == 6


def test_a_thread_that_fails_is_heard(tmp_path, monkeypatch):
  def broken(path, shard, report):
    raise OSError("disk full")

  monkeypatch.setattr(shards, "_write_shard", broken)
  with pytest.raises(OSError, match="disk full"):
    write(tmp_path)


def test_a_deferred_tensor_is_made_once_and_checked(tmp_path):
  asked = []

  def make(name):
    asked.append(name)
    return ARRAYS[name]

  def tensors(shape_of):
    for name, array in ARRAYS.items():
      yield name, shards.Deferred(shape_of(array), array.dtype, lambda name=name: make(name))

  told = []
  shards.write(
    tmp_path, tensors(np.shape), shard_bytes=240, threads=2, report=lambda *one: told.append(one)
  )
  assert sorted(asked) == sorted(ARRAYS)
  assert sorted(told) == sorted((name, array.nbytes) for name, array in ARRAYS.items())
  places, faults = directory.scan(tmp_path)
  assert not faults
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(directory.mapped(tmp_path, places[name]), array)
  with pytest.raises(ValueError, match=r"a.weight: expected float32\[3, 8\], got float32\[8, 3\]"):
    shards.write(tmp_path, tensors(lambda array: array.shape[::-1]), shard_bytes=1, threads=1)


def test_a_name_that_comes_twice_is_an_error(tmp_path):
  twice = [("a", np.zeros(2, np.float32))] * 2
  with pytest.raises(ValueError, match="a: expected each tensor once"):
    shards.write(tmp_path, twice, shard_bytes=1, threads=1)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"shard_bytes": 0}, "shard_bytes"),
    ({"threads": 0}, "threads"),
    ({"arrays": {}}, "at least one"),
    ({"arrays": {"x": np.zeros(2, np.int32)}}, "x: expected one of .* got int32"),
  ],
)
def test_bad_values_are_named(tmp_path, options, says):
  with pytest.raises(ValueError, match=says):
    write(tmp_path, **options)
