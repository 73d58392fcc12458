"""One of the processes of test_processes: agreeing, publishing, a checkpoint; or one that is stuck.

python together.py WHAT DIRECTORY
"""

import os
import pathlib
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed

from intellect3.distributed import arrays, cluster, processes, watchdog
from intellect3.models import hf, presets
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing, placement
from intellect3.sharding.mesh import make_mesh
from intellect3.sharding.rules import TRAIN_FSDP
from intellect3.training import checkpoint, layout, optimizer
from intellect3.weights import export, gather, publish

CONFIG: ModelConfig = presets.tiny(
  embed_dim=8, head_dim=4, num_heads=2, num_kv_heads=2, mlp_dim=8, expert_mlp_dim=4, vocab_size=16
)
MADE = optimizer.adamw(learning_rate=0.1)
SHARD_BYTES = 600


def make_state(mesh, seed):
  """A state whose moments are no zeros, so that a checkpoint has something to lose."""
  shardings = layout.state_shardings(CONFIG, MADE, mesh, TRAIN_FSDP)
  state = layout.make_state(CONFIG, MADE, shardings, seed=seed)

  def fill(leaf):
    numbers = jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)
    return (numbers * 0.37 + seed).astype(leaf.dtype)

  filled = jax.jit(lambda tree: jax.tree.map(fill, tree), out_shardings=shardings.opt_state)
  return state._replace(opt_state=filled(state.opt_state))


class Position:
  """Of a data iterator."""

  def __init__(self):
    self.state = {"next_step": 0}

  def get_state(self):
    return self.state

  def set_state(self, state):
    self.state = state


def agree(here):
  """Values travel whole, in order, also long ones and in threads; a name may be used again."""
  for turn in range(3):
    assert here.broadcast("greeting", f"{turn} of {here.index}") == f"{turn} of 0"
    long = "x" * (2 << 20) if turn == 1 else ""
    assert here.gather("all", [here.index, turn, long]) == [[n, turn, long] for n in (0, 1)]
  if here.is_first:
    time.sleep(0.3)
    here.post("batch", {"step": 1})
    here.barrier("met")
  else:
    told = []
    thread = threading.Thread(target=lambda: told.append(here.await_post("batch")))
    thread.start()
    here.barrier("met")
    thread.join(20)
    assert told == [{"step": 1}]
  stop = threading.Event()
  stop.set()
  assert here.await_post("never", stop) is None
  here.barrier("read")
  left = dict(distributed.global_state.client.key_value_dir_get("intellect3/"))
  assert not [key for key in left if "greeting" in key or "batch" in key], left


def place(mesh):
  """Each process's rows find their devices; what is computed of all is on each host."""
  share = placement.own_share(mesh)
  assert share == packing.Share((jax.process_index(),), 2)
  batch = packing.empty_batch(2, 4, step=3, loss_tokens=7)
  batch.tokens[:] = 10 * jax.process_index() + np.arange(8).reshape(2, 4)
  placed = placement.place(batch, mesh)
  assert placed.tokens.shape == (4, 4) and int(placed.loss_tokens) == 7
  expected = np.concatenate([10 * n + np.arange(8).reshape(2, 4) for n in (0, 1)])
  np.testing.assert_array_equal(arrays.fetch(placed.tokens), expected)
  assert int(jax.jit(lambda rows: rows.sum())(placed.tokens)) == expected.sum()


def write(here, directory):
  """The same state from both: published, exported and in a checkpoint."""
  mesh = make_mesh(fsdp=2)
  place(mesh)
  state = make_state(mesh, 0)
  every = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
  own = gather.gather(
    CONFIG, state.params, mesh, dtype=None, shard_bytes=SHARD_BYTES, index=here.index, count=2
  )
  assert 0.3 < own.nbytes / every < 0.7  # no host holds the model
  publish.publish(
    directory / "weights",
    1,
    CONFIG,
    own,
    canary_ids=[1, 2],
    canary_logprobs=[0.0, -1.0],
    keep=1,
    shard_bytes=SHARD_BYTES,
    processes=here,
  )
  export.export(directory / "model", CONFIG, state.params, processes=here, shard_bytes=SHARD_BYTES)
  position = Position()
  position.set_state({"next_step": 8})
  with checkpoint.Checkpointer(directory / "checkpoints") as checkpoints:
    checkpoints.save(state, position, {"note": "two"})


def read(here, directory):
  """What one process wrote, on the mesh of two."""
  mesh = make_mesh(expert=2)
  state, position = make_state(mesh, 1), Position()
  with checkpoint.Checkpointer(directory / "alone") as checkpoints:
    restored = checkpoints.restore(state, position)
  assert position.state == {"next_step": 5} and restored.meta == {"note": "one"}
  _, params = hf.load(directory / "expected")
  own = gather.gather(
    CONFIG, restored.state.params, mesh, dtype=None, shard_bytes=1, index=here.index, count=2
  )
  expected = dict(hf.to_hf(CONFIG, params))
  held = {name: tensor for name, tensor in own.tensors if isinstance(tensor, np.ndarray)}
  assert held
  for name, tensor in held.items():
    np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
  jax.tree.map(same_shards, restored.state.opt_state, make_state(mesh, 3).opt_state)


def same_shards(found, expected):
  """What this process has of an array is what it has of another."""
  for ours, theirs in zip(found.addressable_shards, expected.addressable_shards, strict=True):
    assert ours.index == theirs.index
    np.testing.assert_array_equal(ours.data, theirs.data)


def hang(here, directory):
  """Both compute together; then one never comes to the next collective."""
  mesh = make_mesh(fsdp=2)
  total = jax.jit(lambda rows: rows.sum())
  rows = placement.place(packing.empty_batch(2, 4, step=1, loss_tokens=1), mesh).tokens
  with watchdog.watched(f"trainer, {here.name}", float(os.environ["STALL"])) as watching:
    watching.enter("the train step", 1)
    jax.block_until_ready(total(rows))
    (directory / f"ready_{here.index}").touch()
    if here.index == 1:
      watching.enter(watchdog.WAITING, 2)
      time.sleep(600)
    watching.enter("the train step", 2)
    jax.block_until_ready(total(rows))


def idle(here, directory):
  """Both wait, not in a collective, for what never comes: a batch."""
  (directory / f"ready_{here.index}").touch()
  here.await_post("batch")


def fail(here, directory):
  """One raises while the other waits."""
  here.barrier("met")
  if here.index == 1:
    raise ValueError("what is wrong")
  here.await_post("batch")
  here.barrier("never")


def main():
  what, directory = sys.argv[1], pathlib.Path(sys.argv[2])
  with processes.started(cluster.detect(os.environ)):
    here = processes.here()
    if what in ("hang", "idle", "fail"):
      {"hang": hang, "idle": idle, "fail": fail}[what](here, directory)
    else:
      agree(here)
      write(here, directory)
      read(here, directory)
      (directory / f"done_{here.index}").touch()


def alone(directory):
  """What `read` expects: a checkpoint and a model written by one process."""
  mesh = make_mesh(devices=jax.devices()[:1])
  state, position = make_state(mesh, 3), Position()
  position.set_state({"next_step": 5})
  with checkpoint.Checkpointer(directory / "alone") as checkpoints:
    checkpoints.save(state, position, {"note": "one"})
  hf.save(directory / "expected", CONFIG, state.params)


if __name__ == "__main__":
  main()
