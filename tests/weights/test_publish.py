"""Publishing is all or nothing, prunes, and a corrupted tensor is found by name."""

import json

import jax
import numpy as np
import pytest

from intellect3.models import hf, presets, transformer
from intellect3.models.stored import shards
from intellect3.weights import manifest, publish

CONFIG = presets.tiny(
  embed_dim=8, head_dim=4, num_heads=2, num_kv_heads=1, mlp_dim=8, expert_mlp_dim=4, vocab_size=16
)


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: transformer.init(CONFIG, jax.random.key(0)))()


def _publish(root, version, params, keep=2, **changes):
  return publish.publish(
    root,
    version,
    CONFIG,
    params,
    canary_ids=[1, 2, 3],
    canary_logprobs=[0.0, -1.5, -2.5],
    keep=keep,
    **changes,
  )


def test_a_version_reads_back_whole(tmp_path, params):
  directory = _publish(tmp_path, 3, params)
  assert directory == tmp_path / "v_000003"
  record = manifest.read(tmp_path, 3)
  assert (record.canary_ids, record.canary_logprobs) == ([1, 2, 3], [0.0, -1.5, -2.5])
  assert record.dtype == "F32" and "lm_head.weight" in record.fingerprints
  assert {entry.file for entry in record.files} == {
    path.name for path in directory.iterdir() if path.name != "manifest.json"
  }
  config, loaded = hf.load(directory)
  assert config.embed_dim == CONFIG.embed_dim
  jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(params))
  assert manifest.verify(directory) == []


def test_only_the_newest_are_kept(tmp_path, params):
  for version in range(4):
    _publish(tmp_path, version, params, keep=2)
  assert manifest.versions(tmp_path) == [2, 3]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["v_000002", "v_000003"]


def test_a_corrupted_tensor_is_named(tmp_path, params):
  directory = _publish(tmp_path, 1, params)
  path = next(directory.glob("*.safetensors"))
  data = bytearray(path.read_bytes())
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
  name = "model.layers.1.mlp.experts.3.down_proj.weight"
  start = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]
  data[start + 5] ^= 0x40
  path.write_bytes(data)
  assert manifest.verify(directory) == [name]


def test_a_crash_while_writing_leaves_nothing_to_see(tmp_path, params, monkeypatch):
  _publish(tmp_path, 1, params)

  def broken(directory, *args, **kwargs):
    (directory / "model.safetensors").write_bytes(b"half")
    assert manifest.versions(tmp_path) == [1]
    raise OSError("disk full")

  monkeypatch.setattr(shards, "write", broken)
  with pytest.raises(OSError, match="disk full"):
    _publish(tmp_path, 2, params)
  assert manifest.versions(tmp_path) == [1]
  assert [path.name for path in tmp_path.iterdir()] == ["v_000001"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path, params):
  left = tmp_path / ".writing_000009_dead"
  left.mkdir()
  (left / "manifest.json").write_text("{}")
  assert manifest.latest(tmp_path) is None
  _publish(tmp_path, 1, params)
  assert not left.exists()


def test_publishing_a_version_again_replaces_it(tmp_path, params):
  _publish(tmp_path, 1, params, keep=3)
  changed = jax.tree.map(lambda x: x + 1.0, params)
  _publish(tmp_path, 1, changed, keep=3)
  assert manifest.versions(tmp_path) == [1]
  _, loaded = hf.load(tmp_path / "v_000001")
  np.testing.assert_array_equal(loaded["head"], changed["head"])
  assert manifest.verify(tmp_path / "v_000001") == []


@pytest.mark.parametrize(
  ("field", "change"),
  [("version", {"version": -1}), ("keep", {"keep": 0}), ("canary_logprobs", {"canary_ids": [1]})],
)
def test_bad_values_are_named(tmp_path, params, field, change):
  arguments = {"version": 1, "keep": 1, "canary_ids": [1, 2], "canary_logprobs": [0.0, 0.0]}
  arguments |= change
  with pytest.raises(ValueError, match=field):
    publish.publish(tmp_path, config=CONFIG, params=params, **arguments)
  assert list(tmp_path.iterdir()) == []
