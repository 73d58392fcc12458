"""A checkpoint read straight to the devices: the values of a plain load, and only what is owned."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from intellect3.models import hf, presets, transformer
from intellect3.models.hf import layout, names, read, source
from tests.models import helpers


def test_four_devices_read_their_slices(tmp_path):
  for name, config, dtype in (
    ("glm", presets.tiny(), None),
    ("qwen3", presets.tiny_qwen3(), "bfloat16"),
  ):
    hf.save(tmp_path / name, config, helpers.random_params(config), dtype=dtype, shard_bytes=50_000)
  here = pathlib.Path(__file__).parent
  found = subprocess.run(
    [sys.executable, str(here / "sharded_process.py"), *map(str, tmp_path.iterdir())],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here.parents[1])},
    timeout=280,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  assert found.stdout.strip() == "same"


@pytest.mark.parametrize("config", [helpers.small(qk_norm=True), presets.tiny_qwen3_moe()])
@pytest.mark.parametrize("parallel_bytes", [1 << 30, 0])
def test_any_part_of_any_leaf(tmp_path, config, parallel_bytes, monkeypatch):
  """Slices along every axis, heads and experts included, against the whole array."""
  monkeypatch.setattr(read, "_PARALLEL_BYTES", parallel_bytes)
  params = helpers.random_params(config)
  hf.save(tmp_path, config, params, shard_bytes=20_000)
  opened = source.open_source(tmp_path)
  rng = np.random.default_rng(0)
  for entry in names.entries(config):
    whole = layout.leaf(params, entry.path)
    for _ in range(3):
      index = []
      for size in whole.shape:
        start, stop = sorted(rng.integers(0, size + 1, 2))
        index.append(slice(int(start), int(stop)))
      part = read.read(opened, entry, tuple(index), whole.dtype)
      np.testing.assert_array_equal(part, whole[tuple(index)], err_msg=entry.hf)


def test_another_models_directory_is_refused(tmp_path):
  config = helpers.small()
  hf.save(tmp_path, config, helpers.random_params(config))
  other = helpers.small(num_layers=4)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda shape: place, transformer.abstract(other)[0])
  with pytest.raises(ValueError, match="num_layers: expected 4, got 3"):
    hf.load_sharded(tmp_path, other, shardings)


def test_read_arrays_may_be_donated(tmp_path):
  """A CPU device takes the host's buffer as it is; a donated one must not be freed twice."""
  config = helpers.small()
  params = helpers.random_params(config)
  hf.save(tmp_path, config, params)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda shape: place, transformer.abstract(config)[0])
  loaded = hf.load_sharded(tmp_path, config, shardings)
  double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
  for _ in range(3):
    loaded = double(loaded)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b * 8), loaded, params)
