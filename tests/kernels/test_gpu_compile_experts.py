"""The routed experts compiled for H200s that are not here, forward and backward."""

import re

from tests.kernels import deviceless

ONE = """
import json
import jax, jax.numpy as jnp
from intellect3.kernels.grouped_matmul import expert_mlp
from intellect3.planning import target

device = target.cuda_devices("h200")[0]
place = jax.sharding.SingleDeviceSharding(device)
array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=place)
T, D, F, E, A = 512, 256, 128, 8, 2


def step(*arrays):
  run = lambda *arrays: expert_mlp(*arrays, implementation="auto", block_size=128)
  out, pull = jax.vjp(run, *arrays)
  return out, pull(out)


wide, routed = array(E, D, F), array(T, A, dtype="int32")
arrays = (array(T, D), wide, wide, array(E, F, D), routed, array(T, A, dtype="float32"))
with jax.default_device(device), jax.set_mesh(jax.sharding.Mesh([device], ("data",))):
  compiled = jax.jit(step).lower(*arrays).compile()
text = compiled.as_text()
print(json.dumps({"triton": text.count('custom_call_target="__gpu$xla.gpu.triton"')}))
"""

EIGHT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from intellect3.kernels.expert_parallel import expert_parallel_mlp
from intellect3.planning import target

devices = target.cuda_devices("h200", 8)
mesh, over = Mesh(np.array(devices), ("expert",)), PartitionSpec("expert")
T, D, F, E, A, R = 4096, 256, 128, 4, 8, 8


def array(*shape, dtype="bfloat16"):
  return jax.ShapeDtypeStruct((R * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, over))


def local(*arrays):
  out, extra = expert_parallel_mlp(
    *arrays,
    axis_name="expert",
    exchange="auto",
    receive_rows=T,
    implementation="auto",
    block_size=128,
  )
  return out, extra[None]


exchanged = jax.shard_map(local, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)


def step(dout, valid, experts, *floats):
  run = lambda *floats: exchanged(*floats[:4], experts, floats[4], valid)
  out, pull, extra = jax.vjp(jax.checkpoint(run), *floats, has_aux=True)
  return out, extra, pull(dout)


wide, rows = array(E, D, F), array(T, D)
routed = (array(T, dtype="bool"), array(T, A, dtype="int32"))
floats = (rows, wide, wide, array(E, F, D), array(T, A, dtype="float32"))
with jax.default_device(devices[0]), jax.set_mesh(mesh):
  compiled = jax.jit(step).lower(rows, *routed, *floats).compile()
memory = compiled.memory_analysis()
print(json.dumps({"text": compiled.as_text(), "temporaries": memory.temp_size_in_bytes}))
"""


def test_auto_takes_triton_kernels_for_every_product():
  """Three products forward and twice three backward: none is XLA's ragged dot."""
  assert deviceless.run(ONE, packages=("tokamax",)) == {"triton": 9}


def test_tokens_travel_between_eight_gpus_and_weights_do_not():
  found = deviceless.run(EIGHT, packages=("tokamax",))
  text = found["text"]
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3 + 2 + 6
  moved = re.findall(r" = (.*?) ([\w-]+)-start\(.*replica_groups=", text)
  kinds = {kind: [shape for shape, other in moved if other == kind] for _, kind in moved}
  # Of collectives there are the rows' trips, and the counts of rows that devices tell each other.
  assert set(kinds) == {"ragged-all-to-all", "all-gather"}
  gathered = {dtype for shape in kinds["all-gather"] for dtype in re.findall(r"(\w+)\[", shape)}
  assert gathered == {"s32"}
  trips = [re.match(r"\(\((\w+\[[\d,]*\])", shape)[1] for shape in kinds["ragged-all-to-all"]]
  assert sorted(trips) == ["bf16[4096,256]"] * 5 + ["f32[4096]"] * 3
  assert found["temporaries"] < 4096 * 8 * 256 * 2 * 1.5  # 1.5 arrays of all pairs' rows
