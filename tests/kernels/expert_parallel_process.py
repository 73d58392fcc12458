"""Run by test_expert_parallel in a process of its own: the exchange on eight fake devices.

    python expert_parallel_process.py CASES

Prints one line of JSON per case: the largest difference of the output and of each gradient from the
oracle, relative to its largest entry, and the rounds.
"""

import functools
import json
import os
import sys

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from intellect3.kernels.expert_parallel import expert_parallel_mlp, interface
from intellect3.kernels.grouped_matmul import expert_mlp

D, F, A = 6, 5, 3
NAMES = ("x", "gate", "up", "down", "weights")


def main() -> None:
  for case in json.loads(sys.argv[1]):
    print(json.dumps({name: check(case, name) for name in case.pop("routings")}))


def check(case, routing):
  """One routing through the program of a case; see test_expert_parallel.CASES."""
  experts = 16
  devices = case["groups"] * case["ranks"]
  tokens = case["tokens"]
  floats, chosen, valid = inputs(routing, devices * tokens, experts, case["ranks"], case["seed"])
  if case["exchange"] == "ragged":
    emulate_ragged()
  run = program(case["groups"], case["ranks"], case["exchange"], case["rows"])
  (out, rounds), gradients = run(floats, chosen, valid)
  expected, expected_gradients = oracle(floats, chosen, valid)
  found = {"out": difference(out, expected)}
  for name, given, want in zip(NAMES, gradients, expected_gradients, strict=True):
    assert np.any(want), name
    found[name] = difference(given, want)
  counts = pairs(chosen, valid, case["groups"], case["ranks"], experts)
  return {"differences": found, "extra": np.asarray(rounds).tolist(), "counts": counts}


def inputs(routing, tokens, experts, ranks, seed):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((tokens, D))
  gate, up = rng.standard_normal((2, experts, D, F))
  down, weights = rng.standard_normal((experts, F, D)), rng.random((tokens, A))
  keys = rng.random((tokens, experts))
  valid = rng.random(tokens) < 0.9
  local = experts // ranks
  if routing == "skewed":
    keys -= 2 * rng.random(experts)
  elif routing == "one device":
    keys[:, :local] -= 1 + (local >= A)
  elif routing == "mostly padding":
    valid = rng.random(tokens) < 0.1
  elif routing == "whole ranks padded":
    valid[: tokens // 2] = False
  chosen = np.argsort(keys, axis=1)[:, :A]
  if routing == "one expert":
    chosen[:] = experts - 2
  elif routing == "balanced":
    chosen = (np.arange(tokens)[:, None] * A + np.arange(A)) % experts
    valid[:] = True
  floats = tuple(np.float32(array) for array in (x, gate, up, down, weights))
  # What stands in padding must reach nothing.
  floats[0][~valid], floats[4][~valid] = np.nan, np.nan
  return floats, chosen.astype(np.int32), valid


@functools.cache
def program(groups, ranks, exchange, rows):
  mesh = Mesh(np.array(jax.devices()[: groups * ranks]).reshape(groups, ranks), ("fsdp", "expert"))
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

  floats = (tokens, stacks, stacks, stacks, tokens)
  over_mesh = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(*floats, tokens, tokens),
    out_specs=(tokens, tokens),
    check_vma=False,
  )

  @jax.jit
  def run(floats, chosen, valid):
    def loss(floats):
      out, extra = over_mesh(*floats, chosen, valid)
      return jnp.sum(jnp.where(valid[:, None], out * cotangent(out), 0)), (out, extra)

    (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(floats)
    return aux, gradients

  return run


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


def pairs(chosen, valid, groups, ranks, experts):
  """How many rows each device has for each other one of its group: [groups, ranks, ranks]."""
  chosen = chosen.reshape(groups, ranks, -1, A) // (experts // ranks)
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
