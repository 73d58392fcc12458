"""Mesh, tables and tree shardings; and a model whose gradient does not depend on them."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from intellect3.models import presets, transformer
from intellect3.sharding import mesh, rules, specs


def test_the_mesh_has_always_the_same_auto_axes():
  one = mesh.make_mesh(devices=jax.devices()[:1])
  assert one.axis_names == ("data", "fsdp", "expert", "context", "tensor")
  assert one.axis_types == (AxisType.Auto,) * 5
  with pytest.raises(ValueError, match=r"mesh: expected 2 devices for .*, got 1"):
    mesh.make_mesh(fsdp=2, devices=jax.devices()[:1])
  for sizes, message in (
    ({"context": 0}, "context: expected an integer >= 1, got 0"),
    ({"fsdp": 2.0}, "fsdp: expected an integer >= 1, got 2.0"),
    ({"fsdp": "8"}, "fsdp: expected an integer >= 1, got '8'"),
    ({"data": True}, "data: expected an integer >= 1, got True"),
  ):
    with pytest.raises(ValueError, match=message):
      mesh.make_mesh(**sizes)


def test_specs_from_the_table():
  to_spec = rules.to_spec
  table = rules.TRAIN_FSDP
  assert to_spec(("layers", "embed", "heads", "head_dim"), table) == PartitionSpec(
    None, "fsdp", "tensor", None
  )
  assert to_spec(("layers", "experts", "embed", "mlp"), table) == PartitionSpec(
    None, "expert", "fsdp", "tensor"
  )
  assert to_spec(("act_batch", "act_length", None), table) == PartitionSpec(
    ("data", "fsdp", "expert"), "context", None
  )


def test_wrong_tables_are_named():
  with pytest.raises(ValueError, match="'heads' and 'mlp' both on 'tensor'"):
    rules.to_spec(("heads", "mlp"), rules.TRAIN_FSDP)
  with pytest.raises(ValueError, match="'act_batch' and 'embed' both on 'fsdp'"):
    rules.to_spec(("act_batch", "embed"), rules.TRAIN_FSDP)
  with pytest.raises(ValueError, match=r"logical axis: expected one of .*, got 'width'"):
    rules.to_spec(("width",), rules.TRAIN_FSDP)
  with pytest.raises(ValueError, match="expected each logical axis once"):
    rules.to_spec(("embed",), (*rules.TRAIN_FSDP, ("embed", None)))


def abstract_mesh(**sizes):
  shape = tuple(sizes.get(axis, 1) for axis in mesh.AXES)
  return AbstractMesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * 5)


def test_every_parameter_of_the_big_model_divides_over_512_devices():
  shapes, axes = transformer.abstract(presets.glm_4_5_air())
  shardings = specs.tree_shardings(axes, shapes, abstract_mesh(fsdp=64, expert=8), rules.TRAIN_FSDP)
  gate = shardings["moe_layers"]["moe"]["experts"]["gate"]
  assert gate.shard_shape(shapes["moe_layers"]["moe"]["experts"]["gate"].shape) == (
    *(45, 16, 64, 1408),
  )
  held = [
    int(np.prod(sharding.shard_shape(shape.shape)))
    for shape, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
  ]
  assert sum(held) < 1.6 * 106_852_251_264 / 512


@pytest.mark.parametrize(
  ("table", "sizes", "gate", "q"),
  [
    ("TRAIN_FSDP", {"fsdp": 64, "expert": 8}, (45, 16, 64, 1408), (45, 64, 96, 128)),
    ("TRAIN_FSDP_EXPERT", {"fsdp": 64, "expert": 8}, (45, 16, 64, 1408), (45, 8, 96, 128)),
    (
      "TRAIN_FSDP_EXPERT",
      {"data": 4, "fsdp": 8, "expert": 8, "tensor": 2},
      (45, 16, 512, 704),
      (45, 64, 48, 128),
    ),
    (
      "TRAIN_CONTEXT",
      {"fsdp": 16, "expert": 8, "context": 4},
      (45, 16, 64, 1408),
      (45, 8, 96, 128),
    ),
  ],
)
def test_where_the_training_tables_put_the_big_model(table, sizes, gate, q):
  """Worked by hand from [45, 128, 4096, 1408] and [45, 4096, 96, 128]."""
  shapes, axes = transformer.abstract(presets.glm_4_5_air())
  placed = specs.tree_shardings(axes, shapes, abstract_mesh(**sizes), getattr(rules, table))
  for path, expected in ((("moe", "experts", "gate"), gate), (("attention", "q", "kernel"), q)):
    sharding = _leaf(placed["moe_layers"], path)
    assert sharding.shard_shape(_leaf(shapes["moe_layers"], path).shape) == expected
  if table != "TRAIN_FSDP":  # nothing large is held twice inside a replica
    router = shapes["moe_layers"]["moe"]["router"]["kernel"]  # the same everywhere, in float32
    held = [
      int(np.prod(sharding.shard_shape(shape.shape)))
      for shape, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
      if shape.shape != router.shape
    ]
    replicas = sizes.get("data", 1)
    assert sum(held) < 1.01 * 106_852_251_264 * replicas / 512


def test_tensors_of_experts_have_entries_of_their_own():
  table = (("experts", "expert"), ("embed", ("fsdp", "expert")), ("mlp", "tensor"))
  both = rules.to_spec(("embed", "mlp"), table)
  assert both == PartitionSpec(("fsdp", "expert"), "tensor")
  with pytest.raises(ValueError, match="'experts' and 'embed' both on 'expert'"):
    rules.to_spec(("experts", "embed", "mlp"), table)
  own = (*table, ("expert_embed", None), ("expert_mlp", ("fsdp", "tensor")))
  assert rules.to_spec(("embed", "mlp"), own) == both
  expected = PartitionSpec("expert", None, ("fsdp", "tensor"))
  assert rules.to_spec(("experts", "embed", "mlp"), own) == expected


def test_a_server_of_the_big_model_splits_it_over_its_devices():
  """By heads, widths and vocabulary over `tensor`, and experts over `expert`: only norms, routers
  and what they need stay whole."""
  shapes, axes = transformer.abstract(presets.glm_4_5_air())
  for sizes in ({"tensor": 8}, {"tensor": 4, "expert": 2}):
    shardings = specs.tree_shardings(axes, shapes, abstract_mesh(**sizes), rules.SERVE)
    layers, given = shardings["moe_layers"], shapes["moe_layers"]
    gate, q = (("moe", "experts", "gate"), ("attention", "q", "kernel"))
    shard = lambda path: _leaf(layers, path).shard_shape(_leaf(given, path).shape)  # noqa: E731, B023
    expert, tensor = sizes.get("expert", 1), sizes["tensor"]
    assert shard(gate) == (45, 128 // expert, 4096, 1408 // tensor)
    assert shard(q) == (45, 4096, 96 // tensor, 128)
    assert shardings["embedding"].shard_shape(shapes["embedding"].shape)[0] == 151552 // tensor
    held = [
      int(np.prod(sharding.shard_shape(shape.shape)))
      for shape, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    ]
    assert sum(held) < 1.1 * 106_852_251_264 / 8


def _leaf(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def test_a_server_splits_rows_nowhere_and_heads_where_the_cache_does():
  assert rules.to_spec(("act_batch", "act_length"), rules.SERVE) == PartitionSpec(None, None)
  table = dict(rules.SERVE)
  assert table["kv_heads"] == table["heads"] == "tensor"
  assert {name for name, _ in rules.SERVE} == {name for name, _ in rules.TRAIN_FSDP}
  shapes, axes = transformer.abstract(presets.tiny())
  with pytest.raises(ValueError, match="attention/k/kernel: expected kv_heads to divide by 4"):
    specs.tree_shardings(axes, shapes, abstract_mesh(tensor=4), rules.SERVE)


def test_dimensions_that_do_not_divide_are_all_named():
  shapes, axes = transformer.abstract(presets.tiny())
  with pytest.raises(ValueError) as error:
    specs.tree_shardings(axes, shapes, abstract_mesh(expert=3, tensor=4), rules.TRAIN_FSDP)
  message = str(error.value)
  assert (
    "moe_layers/moe/experts/gate: expected experts to divide by 3 (expert 3), "
    "got 8 of (1, 8, 64, 32)"
  ) in message
  assert "dense_layers/attention/k/kernel: expected kv_heads to divide by 4" in message
  assert "attention/q/kernel" not in message
  with pytest.raises(ValueError, match=r"gate \(8, 64\): .*'experts' and 'embed' both on 'expert'"):
    table = (("experts", "expert"), ("embed", "expert"))
    gate = jax.ShapeDtypeStruct((8, 64), np.float32)
    specs.tree_shardings({"gate": ("experts", "embed")}, {"gate": gate}, abstract_mesh(), table)
  with pytest.raises(
    ValueError,
    match=r"gate: expected embed on axes of the mesh \('data', .*, 'tensor'\), got 'fsdpp'",
  ):
    wrong = (("experts", "expert"), ("embed", ("fsdp", "fsdpp")))
    specs.tree_shardings({"gate": ("experts", "embed")}, {"gate": gate}, abstract_mesh(), wrong)
  with pytest.raises(ValueError, match=r"embedding: expected 2 axis names, got \('vocab',\)"):
    specs.tree_shardings(
      {"embedding": ("vocab",)},
      {"embedding": shapes["embedding"]},
      abstract_mesh(),
      rules.TRAIN_FSDP,
    )


SHARDED_GRADIENT = """
import jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from intellect3.models import presets, transformer
from intellect3.sharding import mesh, rules, specs

config = presets.tiny(num_layers=1, num_dense_layers=0, remat_policy="full")
params = transformer.init(config, jax.random.key(0))
shapes, axes = transformer.abstract(config)
tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, config.vocab_size)
positions = jnp.broadcast_to(jnp.arange(16), (4, 16))

def loss(params, tokens):
  out = transformer.Transformer(config).apply(
    {"params": params}, tokens, positions, jnp.ones_like(tokens)
  )
  return jnp.mean(jnp.sin(3 * out.hidden_BTD))

expected = jax.jit(jax.grad(loss))(params, tokens)
grid = mesh.make_mesh(fsdp=2, expert=2)
shardings = specs.tree_shardings(axes, shapes, grid, rules.TRAIN_FSDP)
rows = jax.NamedSharding(grid, rules.to_spec(("act_batch", "act_length"), rules.TRAIN_FSDP))
with jax.set_mesh(grid), nn.logical_axis_rules(rules.TRAIN_FSDP):
  jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
  given = jax.jit(jax.grad(loss), in_shardings=(shardings, rows), out_shardings=shardings)(
    jax.device_put(params, shardings), jax.device_put(tokens, rows)
  )
assert not given["moe_layers"]["moe"]["experts"]["gate"].sharding.is_fully_replicated

def check(path, a, b):
  scale = float(jnp.abs(b).max())
  np.testing.assert_allclose(a, b, atol=2e-5 * scale + 1e-9, err_msg=jax.tree_util.keystr(path))

jax.tree_util.tree_map_with_path(check, given, expected)
print("equal")
"""


def test_the_gradient_is_that_of_one_device():
  """Four fake devices in a process of their own: fsdp 2 x expert 2."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
  }
  run = subprocess.run(
    [sys.executable, "-c", SHARDED_GRADIENT], env=environment, capture_output=True, text=True
  )
  assert run.returncode == 0 and run.stdout.strip() == "equal", run.stderr[-3000:]
