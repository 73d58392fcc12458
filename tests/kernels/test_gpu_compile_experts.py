"""The routed experts' GPU kernels, compiled for an H200 that is not here, forward and backward."""

import importlib.util
import os
import subprocess
import sys

import pytest

from intellect3.planning import target

PROGRAM = """
from absl import flags
import jax, jax.numpy as jnp
import tokamax
flags.FLAGS(["test", "--tokamax_cross_compile=true"])
from jax.sharding import SingleDeviceSharding
from intellect3.kernels.grouped_matmul import tokamax as experts
from intellect3.planning import target

device = target.cuda_devices("h200", 1)[0]
T, D, F, E, A = 512, 256, 128, 8, 2
shapes = [((T, D), "bfloat16"), ((E, D, F), "bfloat16"), ((E, D, F), "bfloat16"),
          ((E, F, D), "bfloat16"), ((T, A), "int32"), ((T, A), "float32")]
arrays = [jax.ShapeDtypeStruct(*s, sharding=SingleDeviceSharding(device)) for s in shapes]

def loss(*arrays):
  return jnp.sum(experts.expert_mlp(*arrays).astype(jnp.float32))

compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 5))).lower(*arrays).compile()
print("triton kernels:", compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"'))
"""


def test_tokamax_experts_compile_for_an_h200():
  """Three products forward and twice three backward, each a Triton kernel: none is XLA's own."""
  if (reason := target.missing()) is not None:
    pytest.skip(reason)
  if importlib.util.find_spec("tokamax") is None:
    pytest.skip("tokamax is not installed (pip install 'intellect3[gpu-kernels]')")
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "triton kernels: 9" in done.stdout
