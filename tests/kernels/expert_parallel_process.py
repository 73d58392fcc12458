"""Run by test_expert_parallel in processes of their own: the exchange on eight fake devices.

    python expert_parallel_process.py JSON

The argument is a list of tasks, `[name, arguments]` with the name of a function below; prints one
line of JSON for each.
"""

import functools
import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.kernels.expert_parallel import expert_parallel_mlp, interface
from intellect3.kernels.grouped_matmul import expert_mlp

D, F, A = 6, 5, 3
NAMES = ("x", "gate", "up", "down", "weights")


EXPERTS = 16


def main() -> None:
  for name, arguments in json.loads(sys.argv[1]):
    print(json.dumps({"routing": routing, "layers": layers, "memory": memory}[name](**arguments)))


def routing(spread, seed, groups, ranks, tokens, exchange, rows):
  """Output and gradients of one routing, compared with the oracle on one device.

  Returns:
    Per array the largest difference relative to its largest entry; each device's extra rounds; and
    how many rows each device has for each other.
  """
  floats, chosen, valid = inputs(spread, groups * ranks * tokens, ranks, seed)
  run = program(groups, ranks, exchange, rows)
  (out, extra), gradients = run(floats, chosen, valid)
  expected, expected_gradients = oracle(floats, chosen, valid)
  found = {"out": difference(out, expected)}
  for name, given, want in zip(NAMES, gradients, expected_gradients, strict=True):
    assert np.any(want), name
    found[name] = difference(given, want)
  counts = pairs(chosen, valid, groups, ranks)
  return {"differences": found, "extra": np.asarray(extra).tolist(), "counts": counts}


def inputs(spread, tokens, ranks, seed):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((tokens, D))
  gate, up = rng.standard_normal((2, EXPERTS, D, F))
  down, weights = rng.standard_normal((EXPERTS, F, D)), rng.random((tokens, A))
  keys = rng.random((tokens, EXPERTS))
  valid = rng.random(tokens) < 0.9
  local = EXPERTS // ranks
  if spread == "skewed":
    keys -= 2 * rng.random(EXPERTS)
  elif spread == "one device":
    keys[:, :local] -= 1 + (local >= A)
  elif spread == "mostly padding":
    valid = rng.random(tokens) < 0.1
  elif spread == "ranks padded":
    valid[: tokens // 2] = False
  chosen = np.argsort(keys, axis=1)[:, :A]
  if spread == "one expert":
    chosen[:] = EXPERTS - 2
  elif spread == "balanced":
    chosen = (np.arange(tokens)[:, None] * A + np.arange(A)) % EXPERTS
    valid[:] = True
  floats = tuple(np.float32(array) for array in (x, gate, up, down, weights))
  # What stands in padding must reach nothing.
  floats[0][~valid], floats[4][~valid] = np.nan, np.nan
  return floats, chosen.astype(np.int32), valid


def exchanging(mesh, exchange, rows):
  """`expert_parallel_mlp` of whole arrays over a mesh; also each device's extra rounds."""
  tokens, stacks = PartitionSpec(("fsdp", "expert")), PartitionSpec("expert")

  def local(x, gate, up, down, weights, chosen, valid):
    out, extra = expert_parallel_mlp(
      *(x, gate, up, down, chosen, weights, valid),
      axis_name="expert",
      exchange=exchange,
      receive_rows=rows,
      implementation="blocked",
      block_size=8,
    )
    return out, extra[None]

  arrays = (tokens, stacks, stacks, stacks, tokens, tokens, tokens)
  return jax.shard_map(
    local, mesh=mesh, in_specs=arrays, out_specs=(tokens, tokens), check_vma=False
  )


def make_mesh(groups, ranks):
  devices = np.array(jax.devices()[: groups * ranks]).reshape(groups, ranks)
  return Mesh(devices, ("fsdp", "expert"))


@functools.cache
def program(groups, ranks, exchange, rows):
  if exchange == "ragged":
    emulate_ragged()
  over_mesh = exchanging(make_mesh(groups, ranks), exchange, rows)

  @jax.jit
  def run(floats, chosen, valid):
    def loss(floats):
      out, extra = over_mesh(*floats, chosen, valid)
      return jnp.sum(jnp.where(valid[:, None], out * cotangent(out), 0)), (out, extra)

    (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(floats)
    return aux, gradients

  return run


def layers():
  """Three layers in a scan whose body is rematerialised; and the wide exchanges of the program."""
  depth, ranks, tokens, rows = 3, 4, 10, 40
  made = [inputs("skewed", 8 * tokens, ranks, seed) for seed in range(depth)]
  x, valid = made[0][0][0], made[0][2]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[floats[1:] for floats, _, _ in made])
  stacked = (*stacked[:3], jnp.nan_to_num(stacked[3]))
  chosen = jnp.stack([chosen for _, chosen, _ in made])
  x = jnp.nan_to_num(x)

  def loss(over, x, stacked):
    @jax.checkpoint
    def layer(x, layer):
      (*floats, weights), chosen = layer
      return x + over(x, *floats, weights, chosen, valid), None

    x, _ = jax.lax.scan(layer, x, (stacked, chosen))
    return jnp.sum(x * cotangent(x))

  def one_device(x, gate, up, down, weights, chosen, valid):
    out = expert_mlp(x, gate, up, down, chosen, weights, implementation="dense", block_size=1)
    return jnp.where(valid[:, None], out, 0)

  exchanged = exchanging(make_mesh(2, ranks), "padded", rows)
  several = functools.partial(loss, lambda *arrays: exchanged(*arrays)[0])
  compiled = jax.jit(jax.grad(several, argnums=(0, 1))).lower(x, stacked).compile()
  given = jax.tree.leaves(compiled(x, stacked))
  want = jax.tree.leaves(
    jax.jit(jax.grad(functools.partial(loss, one_device), argnums=(0, 1)))(x, stacked)
  )
  wide = re.findall(r"= (\(.*\)|\S+) all-to-all\(", compiled.as_text())
  return {
    "differences": [difference(a, b) for a, b in zip(given, want, strict=True)],
    "wide": sum(f",{D}]" in shape for shape in wide),
    "narrow": sum(f",{D}]" not in shape for shape in wide),
  }


def memory(rows):
  """Bytes of temporaries per device, forward and backward, and of one array of all pairs' rows."""
  ranks, tokens, width, hidden, choices = 4, 1024, 128, 8, 8
  mesh = make_mesh(1, ranks)
  exchanged = exchanging(mesh, "padded", rows)

  def array(*shape, dtype=np.float32):
    spec = PartitionSpec("expert")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def run(x, gate, up, down, weights, chosen, valid):
    def over(*floats):
      return exchanged(*floats, chosen, valid)

    out, pull, _ = jax.vjp(over, x, gate, up, down, weights, has_aux=True)
    return pull(out)

  stack = array(EXPERTS, width, hidden)
  arrays = (array(ranks * tokens, width), stack, stack, array(EXPERTS, hidden, width))
  routed = (ranks * tokens, choices)
  more = (array(*routed), array(*routed, dtype=np.int32), array(routed[0], dtype=bool))
  compiled = jax.jit(run).lower(*arrays, *more).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return {"temporaries": temporaries, "pairs": tokens * choices * width * 4}


def cotangent(out):
  return jnp.sin(jnp.arange(out.size).reshape(out.shape))


@jax.jit
def oracle(floats, chosen, valid):
  def loss(floats):
    x, gate, up, down, weights = floats
    x, weights = (jnp.where(valid[:, None], array, 0) for array in (x, weights))
    out = expert_mlp(x, gate, up, down, chosen, weights, implementation="dense", block_size=1)
    return jnp.sum(out * cotangent(out)), out

  (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(floats)
  return out, gradients


def difference(given, want):
  given, want = np.float64(given), np.float64(want)
  assert np.all(np.isfinite(given))
  return float(np.abs(given - want).max() / np.abs(want).max())


def pairs(chosen, valid, groups, ranks):
  """How many rows each device has for each other one of its group: [groups, ranks, ranks]."""
  chosen = chosen.reshape(groups, ranks, -1, A) // (EXPERTS // ranks)
  valid = valid.reshape(groups, ranks, -1, 1)
  return [
    [[int(np.sum((c == to) & v)) for to in range(ranks)] for c, v in zip(*group, strict=True)]
    for group in zip(chosen, valid, strict=True)
  ]


def emulate_ragged():
  """jax.lax.ragged_all_to_all as its documentation defines it, which CPUs do not have."""

  def ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    me = jax.lax.axis_index(axis_name)
    whole = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, inputs, sizes, outputs = map(
      whole, (operand, input_offsets, send_sizes, output_offsets)
    )
    rows = jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
      place = rows - outputs[source, me]
      # What the receiver expects must be what is sent: else the rows are lost.
      own = (place >= 0) & (place < sizes[source, me]) & (sizes[source, me] == recv_sizes[source])
      sent = operands[source][jnp.clip(place + inputs[source, me], 0, operand.shape[0] - 1)]
      output = jnp.where(own.reshape(-1, *[1] * (output.ndim - 1)), sent, output)
    return output

  jax.lax.ragged_all_to_all = ragged
  interface.resolve = lambda name, platform: name


if __name__ == "__main__":
  main()
