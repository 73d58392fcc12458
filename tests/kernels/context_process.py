"""Run by test_context_attention in a process of its own, on eight fake devices.

Prints as JSON what context attention gave on 1, 2, 4 and 8 of them, against plain attention on one:
the largest difference of the result and of each gradient, relative to the tensor's largest entry.
"""

import json
import os
import re

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.kernels.attention import blockwise, context_attention, local_part, plain, whole
from tests.kernels import attention_cases as cases

SAME = jax.sharding.PartitionSpec()
TOKENS, HEADS, SCALE = 96, (6, 2, 8), 0.4
LENGTHS = [
  [TOKENS],  # one long segment
  [7, 20, 3, 5, 12, 1, 9, 16, 6],  # many, and padding at the end
  [6, 6, 36, 12, 30],  # at blocks' borders and across them, and padding
]
LAYERS = 2
CASES = (("plain", 2), ("blockwise", 1), ("blockwise", 4), ("blockwise", 8))


def mesh_of(count):
  return jax.make_mesh(
    (count,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
  )


def over_context(function, count, *, in_specs=SAME, out_specs=SAME):
  """The function on each device of an axis of `count`."""
  mapped = jax.shard_map(
    function,
    mesh=mesh_of(count),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )
  return jax.jit(mapped)


def layers(attend, floats, weights):
  """Layers as the model has them, scanned and rematerialised: x is queries, keys and values."""

  def layer(x, weight):
    q, k, v = (array * weight[i] for i, array in enumerate(x))
    out = attend(q, k, v)
    groups = out.shape[2] // k.shape[2]
    mixed = out.reshape(*out.shape[:2], k.shape[2], groups, -1).sum(3)
    return (out + q, k + 0.1 * mixed, v - 0.1 * mixed), None

  return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), floats, weights)[0]


def sharded_gradients(arguments, implementation, count, dout):
  floats = tuple(arguments[name] for name in cases.FLOATS)
  ids = arguments["kv_positions_BS"], arguments["kv_segment_ids_BS"]
  weights = jnp.linspace(0.8, 1.2, LAYERS * 3).reshape(LAYERS, 3)

  def value_and_gradients(floats, ids, dout, weights):
    positions, segment_ids = ids

    def attend(q, k, v):
      return context_attention(
        q,
        k,
        v,
        positions_BS=positions,
        segment_ids_BS=segment_ids,
        scale=SCALE,
        implementation=implementation,
        axis_name="context",
      )

    def share(floats, weights):
      parts = tuple(local_part(x, "context") for x in floats)
      out = layers(attend, parts, weights)
      return jnp.sum(out[0] * local_part(dout, "context")), out[0]

    gradients, out = jax.grad(share, argnums=(0, 1), has_aux=True)(floats, weights)
    return whole(out, "context"), *jax.lax.psum(gradients, "context")

  run = over_context(value_and_gradients, count)
  out, floats, weights = run(floats, ids, dout, weights)
  return out, *floats, weights


def alone(arguments, dout):
  rest = {name: array for name, array in arguments.items() if name not in cases.FLOATS}
  weights = jnp.linspace(0.8, 1.2, LAYERS * 3).reshape(LAYERS, 3)

  def value(floats, weights):
    attend = lambda q, k, v: plain.attend(q, k, v, **rest, scale=SCALE)  # noqa: E731
    out = layers(attend, floats, weights)[0]
    return jnp.sum(out * dout), out

  floats = tuple(arguments[name] for name in cases.FLOATS)
  (floats, weights), out = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(floats, weights)
  return out, *floats, weights


def difference(mine, expected):
  mine, expected = np.float64(mine), np.float64(expected)
  return float(np.max(np.abs(mine - expected)) / np.max(np.abs(expected)))


def attention_errors():
  arguments = cases.packed(LENGTHS, TOKENS, *HEADS)
  dout = np.random.default_rng(5).standard_normal(arguments["q_BTNH"].shape).astype(np.float32)
  expected = alone(arguments, dout)
  names = ("out", *cases.FLOATS, "weights")
  found = {}
  # Blocks that divide a piece (of 48 tokens) and that do not (12 and 6).
  blockwise.plan = lambda *_, **__: blockwise.Plan(q_block=8, kv_block=16, serial=True)
  for implementation, count in CASES:
    got = sharded_gradients(arguments, implementation, count, dout)
    errors = {n: difference(a, b) for n, a, b in zip(names, got, expected, strict=True)}
    found[f"{implementation} {count}"] = errors
  return found


def sent():
  """How often the compiled gradient gathers and scatters, by dtype, with bfloat16 arrays."""
  q, k = (jax.ShapeDtypeStruct((1, 32, heads, 8), jnp.bfloat16) for heads in (6, 2))
  ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
  found = {}
  for count in (1, 2):

    def gradients(q, k, v, ids):
      parts = tuple(local_part(x, "context") for x in (q, k, v))
      attend = lambda q, k, v: context_attention(  # noqa: E731
        q,
        k,
        v,
        positions_BS=ids,
        segment_ids_BS=ids,
        scale=SCALE,
        implementation="plain",
        axis_name="context",
      )
      out, pull = jax.vjp(attend, *parts)
      return [whole(x, "context") for x in pull(out)]

    text = over_context(gradients, count).lower(q, k, k, ids).as_text()
    found[count] = {
      name: re.findall(rf"{name}.*?-> tensor<[^>]*x(\w+)>", text, re.DOTALL)
      for name in ("all_gather", "reduce_scatter")
    }
    found[count]["moves"] = "dynamic_slice" in text or "concatenate" in text
  return found


def main():
  print(json.dumps({"errors": attention_errors(), "sent": sent()}))


main()
