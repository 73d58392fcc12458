"""The routed experts compiled for an H200 that is not here, forward and backward."""

from tests.kernels import deviceless

COMPILE = """
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


def test_auto_takes_triton_kernels_for_every_product():
  """Three products forward and twice three backward: none is XLA's ragged dot."""
  assert deviceless.run(COMPILE, packages=("tokamax",)) == {"triton": 9}
