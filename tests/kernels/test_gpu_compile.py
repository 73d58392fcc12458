"""Attention compiled for an H200 that is not here: forward and backward, which kernels, how much
memory."""

import pytest

from intellect3.planning import target
from tests.kernels import deviceless

COMPILE = """
import json, re, sys
import jax, jax.numpy as jnp
from intellect3.kernels.attention import attention
from intellect3.planning import target

T, N, K, H = 16_384, 24, 2, 128
device = target.cuda_devices("h200")[0]
place = jax.sharding.SingleDeviceSharding(device)
array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def step(q, k, v, dout, segment_ids, positions):
  def attend(q, k, v):
    return attention(
      q, k, v, q_positions_BT=positions, kv_positions_BS=positions,
      q_segment_ids_BT=segment_ids, kv_segment_ids_BS=segment_ids,
      scale=H**-0.5, implementation="auto",
    )
  out, pull = jax.vjp(attend, q, k, v)
  return out, pull(dout)


q, k = array(1, T, N, H, dtype="bfloat16"), array(1, T, K, H, dtype="bfloat16")
ids = array(1, T, dtype="int32")
with jax.default_device(device), jax.set_mesh(jax.sharding.Mesh([device], ("data",))):
  compiled = jax.jit(step).lower(q, k, k, q, ids, ids).compile()
found = {
  "kernels": sorted(set(re.findall(r'custom_call_target="([^"]*)"', compiled.as_text()))),
  "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  "device": device.device_kind,
}
print(json.dumps(found))
"""


def test_auto_takes_the_mosaic_kernels_with_temporaries_linear_in_length():
  """A mask of 16,384 by 16,384 would be 256 MiB, scores 1 GiB a head."""
  compiled = deviceless.run(COMPILE, packages=("tokamax",))
  assert compiled["device"] == "NVIDIA H200"
  assert any(name.startswith("mosaic_gpu") for name in compiled["kernels"])
  assert compiled["temporaries"] < 300 * 2**20


CONTEXT = """
import json, re
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from intellect3.kernels.attention import context_attention
from intellect3.planning import target

COUNT, T, N, K, H = 4, 32_768, 24, 2, 128
devices = target.cuda_devices("h200", COUNT)
mesh = jax.sharding.Mesh(devices, ("context",))
parts = P(None, "context")


def step(q, k, v, dout, segment_ids, positions):
  def attend(q, k, v):
    return context_attention(
      q, k, v, positions_BS=positions, segment_ids_BS=segment_ids,
      scale=H**-0.5, implementation="auto", axis_name="context",
    )
  out, pull = jax.vjp(attend, q, k, v)
  return out, pull(dout)


def array(*shape, spec=parts, dtype="bfloat16"):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


q, k, ids = array(1, T, N, H), array(1, T, K, H), array(1, T, spec=P(), dtype="int32")
mapped = jax.shard_map(
  step, mesh=mesh, in_specs=(parts,) * 4 + (P(),) * 2, out_specs=(parts, (parts,) * 3),
  check_vma=False,
)
with jax.default_device(devices[0]), jax.set_mesh(mesh):
  compiled = jax.jit(mapped).lower(q, k, k, q, ids, ids).compile()
text = compiled.as_text()
print(json.dumps({
  "kernels": sorted(set(re.findall(r'custom_call_target="([^"]*)"', text))),
  "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  "sent": re.findall(r"(\\w+)\\[[^ ]* (all-gather|reduce-scatter)(?:-done)?\\(", text),
  "others": re.findall(r" (all-reduce|all-to-all|collective-permute)(?:-done)?\\(", text),
  "masks": re.findall(rf"\\w+\\[[^]]*{T // COUNT},{T}\\]", text),
}))
"""


def test_a_shared_row_takes_the_same_kernels_and_sends_16_bit_keys_and_values_alone():
  """Of 32,768 tokens, 8,192 on each of 4: a mask would be 256 MiB; k and v are 16 MiB each."""
  compiled = deviceless.run(CONTEXT, packages=("tokamax",))
  assert any(name.startswith("mosaic_gpu") for name in compiled["kernels"])
  # XLA may send keys and values as one.
  assert {tuple(x) for x in compiled["sent"]} == {
    ("bf16", "all-gather"),
    ("bf16", "reduce-scatter"),
  }
  assert not compiled["others"] and not compiled["masks"]
  assert compiled["temporaries"] < 350 * 2**20


def test_a_target_that_cannot_be_is_named():
  with pytest.raises(ValueError, match=r"name: expected one of \('h100', 'h200'\), got 'b200'"):
    target.cuda_devices("b200")
  with pytest.raises(ValueError, match="count: expected 1 to 8, or a multiple of 8, got 12"):
    target.cuda_devices("h100", 12)


def test_a_missing_plugin_is_named(monkeypatch):
  monkeypatch.setattr(target, "PLUGINS", ("no_such_plugin",))
  with pytest.raises(ValueError, match=r"'no_such_plugin',\) is installed \(pip install"):
    target.cuda_devices("h100", 1)
