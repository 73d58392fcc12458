"""Checkpoints resume bit for bit, with the data under prefetch, from the last whole one."""

import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.pipeline import sft_source
from intellect3.training import checkpoint, optimizer, state

MADE = optimizer.muon(learning_rate=0.01, weight_decay=0.1)


def _params():
  rng = np.random.default_rng(0)
  return {
    "embedding": rng.normal(size=(16, 4)).astype(np.float32),
    "layer": {"up": {"kernel": rng.normal(size=(4, 6)).astype(np.float32)}},
    "head": rng.normal(size=(4, 16)).astype(np.float32),
  }


@jax.jit
def _step(current, batch):
  def loss(params):
    hidden = params["embedding"][batch.tokens] @ params["layer"]["up"]["kernel"]
    return jnp.mean(jnp.tanh(hidden) ** 2) + jnp.mean(params["head"] ** 2)

  updates, opt_state = MADE.update(
    jax.grad(loss)(current.params), current.opt_state, current.params
  )
  params = jax.tree.map(jnp.add, current.params, updates)
  return state.TrainState(current.step + 1, params, opt_state)


def _batches():
  def example(number):
    rng = np.random.default_rng(number)
    return rng.integers(0, 16, 5, dtype=np.int32), np.arange(5) >= 2

  return sft_source.batches(
    example,
    examples_per_step=3,
    first_step=1,
    last_step=8,
    row_length=8,
    micro_rows=1,
    stop=threading.Event(),
    prefetch=3,
  )


def _assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_resume_is_bit_for_bit_under_prefetch(tmp_path):
  with _batches() as data:
    straight = state.create(_params(), MADE)
    for batch in data:
      straight = _step(straight, batch)
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as saver:
    current = state.create(_params(), MADE)
    for _ in range(5):
      current = _step(current, next(data))
      if int(current.step) in (2, 4):
        saver.save(current, data, {"note": int(current.step)})
    saver.wait()
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as loader:
    assert loader.latest_step() == 4
    restored = loader.restore(state.abstract(_params, MADE), data)
    assert restored.step == 4 and restored.meta == {"note": 4}
    assert data.get_state() == {"next_step": 5}
    current = restored.state
    assert int(current.step) == 4
    for batch in data:
      current = _step(current, batch)
  assert int(current.step) == 8
  _assert_equal(current, straight)


def test_an_unfinished_checkpoint_is_not_there(tmp_path):
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as saver:
    current = state.create(_params(), MADE)
    for _ in range(2):
      current = _step(current, next(data))
      saver.save(current, data)
  # What Orbax leaves when it dies in the middle of step 2: the directory under another name.
  (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp-1")
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as loader:
    assert loader.latest_step() == 1
    assert loader.restore(current, data).step == 1


def test_only_the_last_are_kept(tmp_path):
  with _batches() as data, checkpoint.Checkpointer(tmp_path, keep=2) as saver:
    current = state.create(_params(), MADE)
    for _ in range(3):
      current = _step(current, next(data))
      saver.save(current, data)
  assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]
  with pytest.raises(ValueError, match="keep"):
    checkpoint.Checkpointer(tmp_path, keep=0)


def test_another_machine_warns_and_the_same_does_not(tmp_path, monkeypatch):
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(state.create(_params(), MADE), data)
  target = state.abstract(_params, MADE)
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as loader:
    with warnings.catch_warnings():
      warnings.filterwarnings("error", message="checkpoint")
      loader.restore(target, data)
    here = checkpoint.machine()
    monkeypatch.setattr(checkpoint, "machine", lambda: {**here, "cpu_threads": -1})
    with pytest.warns(UserWarning, match="cpu_threads"):
      loader.restore(target, data)


def test_no_checkpoint_is_an_error(tmp_path):
  with _batches() as data, checkpoint.Checkpointer(tmp_path) as loader:
    assert loader.latest_step() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
      loader.restore(state.abstract(_params, MADE), data)
