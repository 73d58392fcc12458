"""What the policies keep, and where: the same gradients, and for a GPU that is not here the host's
memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from intellect3.kernels.attention import attention
from intellect3.models import presets, remat, transformer
from tests.kernels import deviceless

LAYERS, TOKENS, HEADS, WIDTH = 3, 24, 2, 4


def layer(weight, x, ids):
  x = checkpoint_name(x, remat.LAYER_INPUT)
  q, k, v = ((x @ w).reshape(1, TOKENS, HEADS, WIDTH) for w in weight)
  names = "q_positions_BT", "kv_positions_BS", "q_segment_ids_BT", "kv_segment_ids_BS"
  ids = dict(zip(names, (ids[0], ids[0], ids[1], ids[1]), strict=True))
  out = attention(q, k, v, **ids, scale=0.5, implementation="blockwise")
  return x + jnp.sin(out.reshape(x.shape))


def gradients(policy, weights, x, ids):
  kept = functools.partial(layer, ids=ids)
  if remat.POLICIES[policy] is not None:
    kept = jax.checkpoint(kept, policy=remat.POLICIES[policy], prevent_cse=False)

  def loss(weights, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (kept(w, x), None), x, weights)[0] ** 2)

  return jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, x)


def test_gradients_are_the_same_bit_for_bit():
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((LAYERS, 3, HEADS * WIDTH, HEADS * WIDTH)).astype(np.float32)
  x = rng.standard_normal((1, TOKENS, HEADS * WIDTH)).astype(np.float32)
  positions = np.arange(TOKENS)[None]
  ids = positions, np.ones_like(positions)
  expected = gradients("full", weights, x, ids)
  assert all(np.any(leaf) for leaf in expected)
  for policy in ("offload", "offload_attention", "attention"):
    jax.tree.map(np.testing.assert_array_equal, gradients(policy, weights, x, ids), expected)


def test_the_models_layers_name_what_is_offloaded():
  """Under the policies' names the model's backward pass asks for the host's memory."""
  config = presets.tiny(num_layers=2, num_dense_layers=1, attention="blockwise")
  params, _ = transformer.abstract(config)
  row = jax.ShapeDtypeStruct((1, 16), jnp.int32)

  def copies(policy):
    model = presets.tiny(
      num_layers=2, num_dense_layers=1, attention="blockwise", remat_policy=policy
    )

    def loss(params, row):
      return jnp.sum(transformer.Transformer(model).apply({"params": params}, row, row, row)[0])

    return str(jax.make_jaxpr(jax.grad(loss))(params, row)).count("Host")

  full, one, three = (copies(policy) for policy in ("full", "offload", "offload_attention"))
  assert full == 0 < one < three


def test_what_is_unknown_is_named():
  remat.check("offload", "gpu")
  with pytest.raises(ValueError, match=r"remat_policy: expected one of .*'offload'.*, got 'host'"):
    remat.check("host", "cpu")
  with pytest.raises(ValueError, match=r"platform: expected one of .*, got 'cuda'"):
    remat.check("offload", "cuda")


COMPILE = r"""
import functools, json, re
import jax, jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec as P
from intellect3.kernels.attention import attention
from intellect3.models import remat
from intellect3.planning import target

LAYERS, T, D, HEADS = 8, 4096, 1024, 8
devices = target.cuda_devices("h200", 8)
mesh = jax.sharding.Mesh(devices, ("fsdp",))
rows, parts = P("fsdp"), P(None, None, "fsdp")


def layer(weight, x, segment_ids, positions):
  x = checkpoint_name(x, remat.LAYER_INPUT)
  weight = jax.lax.all_gather(weight.astype(x.dtype), "fsdp", axis=1, tiled=True)
  q, k, v = ((x @ weight[i]).reshape(1, T, HEADS, D // HEADS) for i in range(3))
  out = attention(
    q, k, v, q_positions_BT=positions, kv_positions_BS=positions,
    q_segment_ids_BT=segment_ids, kv_segment_ids_BS=segment_ids,
    scale=0.1, implementation="blockwise",
  )
  return x + out.reshape(x.shape) @ weight[3]


def gradients(policy, weights, x, segment_ids, positions):
  kept = functools.partial(layer, segment_ids=segment_ids, positions=positions)
  kept = jax.checkpoint(kept, policy=remat.POLICIES[policy], prevent_cse=False)

  def loss(weights, x):
    y = jax.lax.scan(lambda x, w: (kept(w, x), None), x, weights)[0]
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  return jax.grad(loss)(weights, x)


def array(*shape, spec, dtype):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


arguments = (
  array(LAYERS, 4, D, D, spec=parts, dtype="float32"),
  array(8, T, D, spec=rows, dtype="bfloat16"),
  *[array(8, T, spec=rows, dtype="int32")] * 2,
)
found = {"input": LAYERS * T * D * 2, "lse": LAYERS * T * HEADS * 4}
for policy in POLICIES:
  mapped = jax.shard_map(
    functools.partial(gradients, policy), mesh=mesh, in_specs=(parts, rows, rows, rows),
    out_specs=parts, check_vma=False,
  )
  with jax.default_device(devices[0]), jax.set_mesh(mesh):
    compiled = jax.jit(mapped).lower(*arguments).compile()
  memory, text = compiled.memory_analysis(), compiled.as_text()
  # Which instructions have the stack of layers' inputs, on the host, as an operand or result.
  stacked = [line for line in text.splitlines() if "S(5)" in line and f"{T},{D}]" in line]
  found[policy] = {
    "device": memory.temp_size_in_bytes,
    "host": memory.host_temp_size_in_bytes,
    "opcodes": [re.search(r" ([a-z-]+)\(", line)[1] for line in stacked],
  }
print(json.dumps(found))
"""


def compiled(*policies):
  return deviceless.run(f"POLICIES = {policies!r}\n{COMPILE}")


@pytest.mark.slow
def test_a_layers_input_is_copied_to_the_host_and_back_beside_the_computation():
  found = compiled("offload")
  assert found["offload"]["host"] == found["input"]
  # Out in the forward loop; back before the backward loop and in it, one layer ahead.
  opcodes = found["offload"]["opcodes"]
  assert opcodes.count("fusion-start") >= 3 and not {"fusion", "copy"} & set(opcodes)


@pytest.mark.slow
def test_what_the_host_has_the_device_has_not():
  found = compiled("full", "attention", "offload", "offload_attention")
  kept, both = found["input"], 2 * found["input"] + found["lse"]
  assert found["full"]["host"] == found["attention"]["host"] == 0
  assert found["offload_attention"]["host"] == both
  # Two layers' are on the device while they travel, in each direction.
  for offloaded, saved, size in (
    ("offload", "full", kept),
    ("offload_attention", "attention", both),
  ):
    freed = found[saved]["device"] - found[offloaded]["device"]
    assert 0.5 * size < freed <= size, (offloaded, freed, size)
