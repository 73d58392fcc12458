"""Publishing beside training: what is written, when the trainer waits, what servers will read."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.models import hf, presets, transformer
from intellect3.rl import publisher as publishers
from intellect3.rl.roles import Shared
from intellect3.sharding.mesh import make_mesh
from intellect3.sharding.rules import TRAIN_FSDP
from intellect3.training import scoring
from intellect3.training.state import TrainState
from intellect3.weights import manifest, publish

CONFIG = presets.tiny(
  embed_dim=8, head_dim=4, num_heads=2, num_kv_heads=1, mlp_dim=8, expert_mlp_dim=4, vocab_size=16
)
IDS = np.asarray([1, 2, 3, 4], np.int32)


def shared(run_dir):
  return Shared(
    run_dir=run_dir,
    steps=9,
    seed=0,
    max_off_policy_steps=2,
    model_path=run_dir,
    renderer=None,
    environments={},
    environment_weights={},
    resume=False,
    num_workers=0,
    orchestrator_url="http://127.0.0.1:9",
    server_urls=(),
  )


def make(run_dir, **changes):
  options = {
    "head_chunk_size": 8,
    "keep": 9,
    "dtype": None,
    "shard_bytes": 1 << 20,
    "threads": 2,
    "mesh": make_mesh(devices=jax.devices()[:1]),
    "rules": TRAIN_FSDP,
  }
  return publishers.Publisher(shared(run_dir), CONFIG, canary_ids=IDS, **{**options, **changes})


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: transformer.init(CONFIG, jax.random.key(0)))()


def state(params, step):
  return TrainState(step=jnp.asarray(step), params=params, opt_state=())


@jax.jit
def scaled(params):
  return jax.tree.map(lambda array: array * 2.0, params)


def test_training_goes_on_while_a_version_is_written(tmp_path, params, monkeypatch):
  gate = threading.Event()
  really = publish.publish

  def held(*arguments, **options):
    assert gate.wait(20)
    return really(*arguments, **options)

  monkeypatch.setattr(publish, "publish", held)
  publisher = make(tmp_path)
  params = jax.tree.map(jnp.copy, params)
  expected = jax.tree.map(np.array, params)
  told = publisher.publish(state(params, 1))
  assert set(told) == {
    "weights/wait_seconds",
    "weights/gather_seconds",
    "weights/gather_seconds_per_gb",
  }
  # The next step takes the memory of these weights; what is written is what they were.
  donated = jax.jit(lambda p: jax.tree.map(lambda a: a * 0.0, p), donate_argnums=0)(params)
  jax.block_until_ready(donated)
  assert manifest.latest(tmp_path / "weights") is None
  gate.set()
  publisher.close()
  assert manifest.latest(tmp_path / "weights") == 1
  _, loaded = hf.load(tmp_path / "weights" / "v_000001")
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_one_version_is_written_at_a_time_and_each_is_told_of(tmp_path, params):
  publisher = make(tmp_path)
  publisher.publish(state(params, 0))
  told = publisher.publish(state(scaled(params), 1))
  publisher.close()
  size = sum(path.stat().st_size for path in (tmp_path / "weights/v_000000").glob("*.safetensors"))
  assert told["weights/gigabytes"] == size / 1e9
  assert told["weights/write_seconds"] > 0 and told["weights/wait_seconds"] >= 0
  per_gb = told["weights/write_seconds"] / told["weights/gigabytes"]
  assert told["weights/write_seconds_per_gb"] == pytest.approx(per_gb)
  assert manifest.versions(tmp_path / "weights") == [0, 1]


def test_versions_that_are_there_are_left_alone(tmp_path, params):
  publisher = make(tmp_path)
  publisher.publish(state(params, 3))
  publisher.close()
  again = make(tmp_path)
  assert again.publish(state(scaled(params), 2)) == {} == again.publish(state(scaled(params), 3))
  again.publish(state(scaled(params), 4))
  again.close()
  assert manifest.versions(tmp_path / "weights") == [3, 4]


def test_a_failed_write_is_heard_at_the_next_version_or_the_end(tmp_path, params, monkeypatch):
  def broken(*arguments, **options):
    raise OSError("disk full")

  monkeypatch.setattr(publish, "publish", broken)
  publisher = make(tmp_path)
  publisher.publish(state(params, 1))
  with pytest.raises(OSError, match="disk full"):
    publisher.publish(state(params, 2))
  publisher.close()
  last = make(tmp_path)
  last.publish(state(params, 3))
  with pytest.raises(OSError, match="disk full"):
    last.close()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_canary_scores_what_servers_will_read(tmp_path, params, dtype):
  publisher = make(tmp_path, dtype=dtype)
  publisher.publish(state(params, 1))
  publisher.close()
  told = manifest.read(tmp_path / "weights", 1)
  assert told.canary_ids == IDS.tolist()
  _, loaded = hf.load(tmp_path / "weights" / "v_000001")
  loaded = jax.tree.map(lambda array: np.asarray(array, np.float32), loaded)
  expected = scoring.make_logprob_fn(CONFIG, head_chunk_size=8)(loaded, IDS)
  np.testing.assert_allclose(told.canary_logprobs, expected, atol=1e-6)
  if dtype is not None:
    rough = scoring.make_logprob_fn(CONFIG, head_chunk_size=8)(params, IDS)
    assert np.max(np.abs(np.asarray(told.canary_logprobs) - rough)) > 1e-5


def test_rounding_is_that_of_the_dtype_and_spares_the_correction_bias(params):
  bias = ("moe_layers", "moe", "router", "correction_bias")
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), params)
  rounded = jax.jit(lambda p: publishers.as_published(p, "bfloat16"))(params)

  def check(path, before, after):
    kept = tuple(entry.key for entry in path) == bias
    expected = before if kept else before.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(after, expected)
    return kept

  kept = jax.tree_util.tree_map_with_path(check, params, rounded)
  assert sum(jax.tree.leaves(kept)) == 1
  assert publishers.as_published(params, None) is params
