"""Muon's direction: over eight devices as over one, and what it costs on machines of many."""

import math
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.training import muon
from tests.kernels import deviceless


def _process(name):
  """Runs a file of this folder, which says at its end that all was the same."""
  here = pathlib.Path(__file__).parent
  found = subprocess.run(
    [sys.executable, str(here / name)],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here.parents[1])},
    timeout=280,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  assert found.stdout.strip() == "same"


def test_every_layout_of_eight_devices_gives_the_updates_of_one():
  _process("muon_process.py")


@pytest.mark.parametrize(
  ("matrices", "exchange", "replicas", "expected"),
  [
    # One device: rounds of at most 4 matrices, evenly filled.
    (3, {}, {}, ((), (), 1, 3)),
    (9, {}, {}, ((), (), 3, 3)),
    # 45 layers of 16 experts over 16 devices: 45 matrices each, in full rounds; of one, one each.
    (720, {"fsdp": 16}, {}, (("fsdp",), (), 15, 3)),
    (37, {}, {}, ((), (), 10, 4)),  # a prime number of matrices is not worth 37 rounds
    (45, {"fsdp": 64}, {"expert": 8}, (("fsdp",), (), 1, 1)),
    # 45 matrices over 16 devices are 3 each: replicas bring it to 1, and more would bring nothing.
    (45, {"fsdp": 16}, {"expert": 8}, (("fsdp",), ("expert",), 1, 1)),
    (45, {"fsdp": 16}, {"data": 2, "expert": 8}, (("fsdp",), ("expert",), 1, 1)),
    (200, {"fsdp": 16}, {"data": 2, "expert": 8}, (("fsdp",), ("data", "expert"), 1, 1)),
    (6, {}, {"data": 4}, ((), ("data",), 1, 2)),
  ],
)
def test_the_shares_of_a_stack(matrices, exchange, replicas, expected):
  found = muon.divide(matrices, muon.ROUND_BYTES // 4, exchange, replicas)
  assert found == expected
  devices = math.prod(exchange.values()) * math.prod({**replicas, "": 1}[a] for a in found.share)
  assert found.rounds * found.each * devices >= matrices


def test_a_matrix_larger_than_a_round_is_a_round():
  assert muon.divide(3, 2 * muon.ROUND_BYTES, {}, {}) == ((), (), 3, 1)


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6)])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 0.2)])
def test_newton_schulz_is_the_float64_one(shape, dtype, bound):
  x = np.random.default_rng(0).normal(size=shape)
  found = muon.newton_schulz(jnp.asarray(x, dtype), steps=5)
  assert found.dtype == dtype
  for matrix, result in zip(x, np.asarray(found, np.float64), strict=True):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt(np.sum(values**2))
    for _ in range(5):  # the iteration on the singular values
      values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left * values @ right
    assert np.linalg.norm(result - expected) < bound * np.linalg.norm(expected)


def test_the_momentum_may_be_kept_in_bfloat16():
  rng = np.random.default_rng(0)
  first, second = ({"up": {"kernel": np.float32(rng.normal(size=(4, 6)))}} for _ in range(2))
  found = {}
  for dtype in (None, "bfloat16"):
    made = muon.scale_by_muon(momentum=0.9, steps=2, consistent_rms=1.0, momentum_dtype=dtype)
    one, state = made.update(first, made.init(first))
    two, _ = made.update(second, state)
    found[dtype] = one["up"]["kernel"], state.momentum["up"]["kernel"], two["up"]["kernel"]
  whole, kept = found[None], found["bfloat16"]
  np.testing.assert_array_equal(kept[0], whole[0])  # rounded after a step has used it
  assert kept[1].dtype == jnp.bfloat16 and whole[1].dtype == kept[2].dtype == jnp.float32
  np.testing.assert_array_equal(kept[1], whole[1].astype(jnp.bfloat16))
  difference = np.abs(kept[2] - whole[2]).max()
  assert 0 < difference < 0.02 * np.abs(whole[2]).max()


def test_a_zero_matrix_stays_zero():
  assert not np.any(muon.newton_schulz(jnp.zeros((3, 4)), steps=5))


def test_a_stack_of_another_rank_is_named():
  with pytest.raises(
    ValueError, match=r"expected 2 to 4 dimensions \('layers', 'experts', .*got 5"
  ):
    muon.logical_axes(muon.MATRICES["experts", "up"], 5)


WITHOUT_RULES = """
import jax, jax.numpy as jnp
from intellect3.sharding.mesh import make_mesh
from intellect3.training import muon

matrix = muon.MATRICES["experts", "up"]
with jax.set_mesh(make_mesh(fsdp=2)):
  try:
    jax.jit(lambda x: muon.orthogonalise(x, matrix))(jnp.ones((4, 4)))
  except ValueError as error:
    print(error)
"""


def test_a_mesh_without_rules_is_refused():
  flags = "--xla_force_host_platform_device_count=2"
  found = subprocess.run(
    [sys.executable, "-c", WITHOUT_RULES],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  assert found.stdout.startswith("muon: expected the logical axis rules of the layout"), (
    found.stderr
  )


H200 = """
import json, re
import flax.linen as nn
import jax, jax.numpy as jnp
from intellect3.planning import target
from intellect3.sharding import mesh as meshes, rules, specs
from intellect3.training import muon

SHAPES = {"experts": {"gate": (45, 128, 4096, 1408)}, "q": {"kernel": (45, 4096, 96, 128)}}
AXES = {
  "experts": {"gate": ("layers", "experts", "embed", "mlp")},
  "q": {"kernel": ("layers", "embed", "heads", "head_dim")},
}
mesh = meshes.make_mesh(fsdp=16, expert=8, devices=target.cuda_devices("h200", 128))
shapes = jax.tree.map(
  lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
)
places = specs.tree_shardings(AXES, shapes, mesh, rules.TRAIN_FSDP)
made = muon.scale_by_muon(momentum=0.95, steps=5, consistent_rms=0.2, dtype=None)

def update(params, grads, state):
  with nn.logical_axis_rules(rules.TRAIN_FSDP):
    updates, state = made.update(grads, state)
  return jax.tree.map(lambda p, u: p - 1e-6 * u, params, updates), state

with jax.set_mesh(mesh):
  state = jax.eval_shape(made.init, shapes)
  step = jax.jit(
    update,
    in_shardings=(places, places, muon.State(None, places)),
    out_shardings=(places, muon.State(None, places)),
    donate_argnums=(0, 2),
  )
  compiled = step.lower(shapes, shapes, state).compile()
text = compiled.as_text()
KINDS = r"= (.*) (all-[a-z-]+?|collective-permute|reduce-scatter)(?:-start|-done)?[(]"
found = re.findall(KINDS, text)
print(json.dumps({
  "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  "kinds": sorted({kind for _, kind in found}),
  "dtypes": sorted(set(re.findall(r"([a-z]+[0-9]+)[[]", " ".join(kept for kept, _ in found)))),
}))
"""


def test_on_128_h200_no_stack_is_gathered_and_no_float32_travels():
  """A gathered stack of experts is 61 GiB in bfloat16; a device's own part of it, 0.5 GiB."""
  compiled = deviceless.run(H200)
  assert compiled["temporaries"] < 1.5 * 2**30
  assert compiled["dtypes"] == ["bf16"]
  assert compiled["kinds"] == ["all-gather", "all-to-all"]  # q's results, over `expert`


@pytest.mark.slow
def test_train_steps_with_muon_on_eight_devices_are_those_of_one():
  _process("muon_step_process.py")
