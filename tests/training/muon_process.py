"""Run by test_muon in a process of its own: Muon over eight fake devices, in every layout.

For each: the updates of optax on one device, momentum that lies as the parameters do, and the
collectives of the compiled program.
"""

import functools
import itertools
import os
import re
from typing import Any

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from intellect3.sharding import mesh as meshes
from intellect3.sharding import rules, specs
from intellect3.training import muon, optimizer

SHAPES = {
  "attention": {"q": {"kernel": (3, 16, 8, 4)}, "o": {"kernel": (3, 8, 4, 16)}},
  "mlp": {"down": {"kernel": (24, 16)}},
  "experts": {"gate": (3, 8, 16, 24)},
}
AXES = {
  "attention": {
    "q": {"kernel": ("layers", "embed", "heads", "head_dim")},
    "o": {"kernel": ("layers", "heads", "head_dim", "embed")},
  },
  "mlp": {"down": {"kernel": ("mlp", "embed")}},
  "experts": {"gate": ("layers", "experts", "embed", "mlp")},
}
DECAY, RATE = 0.1, 0.02


def given(seed):
  rng = np.random.default_rng(seed)
  make = lambda shape: np.float32(rng.normal(size=shape))  # noqa: E731
  return jax.tree.map(make, SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))


def two_updates(made):
  def run(params, grads, state):
    _, state = made.update(grads, state, params)
    return made.update(jax.tree.map(lambda g: jnp.cos(3 * g), grads), state, params)

  return run


def of_optax(params, grads):
  """Stock Muon on one device."""
  numbers = {
    "attention": {
      "q": {"kernel": optax.contrib.MuonDimensionNumbers(1, (2, 3))},
      "o": {"kernel": optax.contrib.MuonDimensionNumbers((1, 2), 3)},
    },
    "mlp": {"down": {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}},
    "experts": {"gate": optax.contrib.MuonDimensionNumbers(2, 3)},
  }
  stock = optax.contrib.muon(
    RATE, weight_decay=DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
  )
  return jax.jit(two_updates(stock))(params, grads, stock.init(params))[0]


def layouts():
  for fsdp, expert, tensor in itertools.product((1, 2, 4, 8), repeat=3):
    if fsdp * expert * tensor == 8:
      yield rules.TRAIN_FSDP, {"fsdp": fsdp, "expert": expert, "tensor": tensor}
  yield rules.TRAIN_FSDP, {"data": 2, "fsdp": 4}
  yield rules.TRAIN_FSDP, {"data": 2, "context": 2, "tensor": 2}
  yield rules.TRAIN_FSDP, {"data": 8}
  yield rules.TRAIN_FSDP_EXPERT, {"fsdp": 2, "expert": 2, "tensor": 2}
  yield rules.TRAIN_CONTEXT, {"fsdp": 2, "expert": 2, "context": 2}


def main():
  params, grads = given(0), given(1)
  expected = of_optax(params, grads)
  for number, (table, sizes) in enumerate(layouts()):
    muon.ROUND_BYTES = (64 * 2**20, 3000)[number % 2]  # all at once, or one matrix or two a round
    updates, state, shardings, text = updated(table, sizes, params, grads)
    jax.tree.map(functools.partial(close, sizes), updates, expected)
    momentum = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
    assert len(momentum) == 4
    for leaf, sharding in zip(momentum, jax.tree.leaves(shardings), strict=True):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (sizes, leaf.sharding)
    assert collectives(text) == wanted(table, sizes), (sizes, collectives(text))
  check_temporaries()
  print("same")


def check_temporaries():
  """No device holds a stack: a quarter is enough for ours, and stock Muon takes all of it."""
  muon.ROUND_BYTES = 64 * 2**10
  shape, axes = (128, 64, 128), ("layers", "embed", "mlp")
  mesh = meshes.make_mesh(fsdp=8)
  tree = {"up": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
  places = specs.tree_shardings({"up": {"kernel": axes}}, tree, mesh, rules.TRAIN_FSDP)
  numbers = {"up": {"kernel": optax.contrib.MuonDimensionNumbers(1, 2)}}
  sizes = []
  for made in (
    muon.scale_by_muon(momentum=0.95, steps=5, consistent_rms=0.2),
    optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
  ):
    # As a step does it, with the momentum where the parameter lies.
    def update(grads, momentum, made=made):
      with nn.logical_axis_rules(rules.TRAIN_FSDP):
        state = made.init(tree)
        return made.update(grads, type(state)(state[0], momentum, *state[2:]))[0]

    with jax.set_mesh(mesh):
      jitted = jax.jit(update, in_shardings=(places, places), out_shardings=places)
      compiled: Any = jitted.lower(tree, tree).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  stack = 4 * np.prod(shape)
  assert sizes[0] < stack / 4 and sizes[1] > stack, (sizes, stack)


def updated(table, sizes, params, grads):
  """The second update, the state, where the parameters lie and the compiled program."""
  mesh = meshes.make_mesh(**sizes)
  shardings = specs.tree_shardings(AXES, jax.eval_shape(lambda: params), mesh, table)
  placed = jax.device_put((params, grads), (shardings, shardings))
  made = optimizer.muon(learning_rate=RATE, weight_decay=DECAY, clip_norm=None)

  def scoped(params, grads):
    with nn.logical_axis_rules(table):
      return two_updates(made)(params, grads, made.init(params))

  with jax.set_mesh(mesh):
    compiled = jax.jit(scoped).lower(*placed).compile()
    return *compiled(*placed), shardings, compiled.as_text()


def wanted(table, sizes):
  """Blocks are exchanged where a matrix is split; results are gathered only over replicas that
  shared the work: of all stacks over `data`, of the three layers over `expert`, where that does
  not split matrices too. Nothing else moves."""
  split = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
  shared = sizes.get("data", 1) > 1
  if table is rules.TRAIN_FSDP:
    shared |= sizes.get("expert", 1) > 1 and split < 3
  return ["all-gather"] * shared + ["all-to-all"] * (split > 1)


def close(sizes, found, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, err_msg=str(sizes))


def collectives(text):
  kinds = re.findall(r" (all-[a-z-]+|collective-permute|reduce-scatter)(?:-start)?\(", text)
  return sorted(set(kinds))


main()
