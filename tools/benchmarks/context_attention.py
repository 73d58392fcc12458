"""What context parallelism leaves to one device: time on a CPU, memory of an H200 that is not here.

    taskset -c 0 python -m tools.benchmarks.context_attention --json build/context_attention.json
    JAX_PLATFORMS=cpu python -m tools.benchmarks.context_attention --turns 0 --compile

Time: attention forward and backward of each rank's queries over whole rows of keys, alone in one
process, as a ratio to the whole rows' on one device; 1 / c is what the division can give. All take
turns, in each turn in another order, and a ratio is taken within its turn. Gathering keys and
values is not in it. Memory (`--compile`, needs `make plan`): the temporaries that XLA's buffer
assignment gives a device of c, gathers included, forward and backward, of one row of INTELLECT-3's
second stage.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import logging
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PLAN = pathlib.Path(sys.prefix) / "plan"
AXIS = "context"
COUNTS = (1, 2, 4)
COMPILED = (1, 2, 4, 8)
CARD_ROW, CARD_HEADS = 98_304, (96, 8, 128)


def packings(tokens: int) -> dict[str, list[int]]:
  """Lengths of the segments of a row, by name."""
  return {
    "one segment": [tokens],
    "halves and eighths": [tokens // 2, *[tokens // 8] * 4],
    "16 short segments": [tokens // 16] * 16,
  }


def make_row(lengths: list[int], heads: tuple[int, int, int], seed: int) -> dict[str, Any]:
  """Random arguments of `attention` for one row of these segments; heads are N, K and H."""
  tokens, (queries, keys, width) = sum(lengths), heads
  random = np.random.default_rng(seed)
  shapes = {"q_BTNH": queries, "k_BSKH": keys, "v_BSKH": keys}
  row: dict[str, Any] = {
    name: random.standard_normal((1, tokens, n, width)).astype(np.float32)
    for name, n in shapes.items()
  }
  segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)
  positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
  row |= {"q_positions_BT": positions, "q_segment_ids_BT": segment_ids}
  return row | {"kv_positions_BS": positions, "kv_segment_ids_BS": segment_ids}


def part_of(row: dict[str, Any], rank: int, count: int) -> dict[str, Any]:
  """The arguments as rank `rank` of `count` has them: its queries, all keys."""
  from intellect3.kernels.attention import local_part

  take = jax.vmap(lambda _, x: local_part(x, AXIS), in_axes=(0, None), axis_name=AXIS)
  return {
    name: take(jnp.arange(count), x)[rank] if name.startswith("q_") else jnp.asarray(x)
    for name, x in row.items()
  }


def gradient(pieces: int) -> Any:
  """Forward and backward of attention, jitted, in queries, keys and values."""
  from intellect3.kernels.attention import attention

  floats = ("q_BTNH", "k_BSKH", "v_BSKH")

  @jax.jit
  def run(arguments: dict[str, Any]) -> Any:
    rest = {name: x for name, x in arguments.items() if name not in floats}
    attend = functools.partial(
      attention,
      **rest,
      scale=arguments["q_BTNH"].shape[-1] ** -0.5,
      implementation="auto",
      q_starts=None if pieces == 1 else jnp.zeros(pieces, jnp.int32),
    )
    out, pull = jax.vjp(attend, *(arguments[name] for name in floats))
    return pull(out)

  return run


def measure(row: dict[str, Any], turns: int) -> list[dict[str, float]]:
  """Every rank's share of a row's work, for each count of `COUNTS`.

  Args:
    row: of `make_row`.
    turns: timed calls of each rank, at least 2.

  Returns:
    For each count: `context`, `expected` (1 / c), `share` (the ranks' mean time over the whole
    row's, median over turns), `slowest_share`, `balance` (slowest rank over the mean).
  """
  programs = {count: gradient(1 if count == 1 else 2) for count in COUNTS}
  work = {(c, r): part_of(row, r, c) for c in COUNTS for r in range(c)}
  for (count, _), arguments in work.items():
    jax.block_until_ready(programs[count](arguments))
  seconds: dict[tuple[int, int], list[float]] = {key: [] for key in work}
  keys = list(work)
  for turn in range(turns):
    at = turn % len(keys)
    for key in keys[at:] + keys[:at]:
      started = time.perf_counter()
      jax.block_until_ready(programs[key[0]](work[key]))
      seconds[key].append(time.perf_counter() - started)
  return [_figures(count, seconds, turns) for count in COUNTS]


def _figures(
  count: int, seconds: dict[tuple[int, int], list[float]], turns: int
) -> dict[str, float]:
  shares = [
    [seconds[count, rank][turn] / seconds[1, 0][turn] for turn in range(turns)]
    for rank in range(count)
  ]
  by_rank = [statistics.median(share) for share in shares]
  mean = statistics.mean(by_rank)
  return {
    "context": count,
    "expected": 1 / count,
    "share": mean,
    "slowest_share": max(by_rank),
    "balance": max(by_rank) / mean,
  }


def compile_for_h200(count: int, implementation: str) -> dict[str, Any]:
  """Memory of one device of `count` H200s: a row of `CARD_ROW` tokens, bfloat16, with gradients.

  Returns:
    `context`, `implementation`, `temporaries_gib`, `arguments_gib`, `results_gib`.
  """
  from jax.sharding import NamedSharding, PartitionSpec

  from intellect3.kernels.attention import context_attention
  from intellect3.planning import target

  devices = target.cuda_devices("h200", count)
  mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS,))
  parts, same = PartitionSpec(None, AXIS), PartitionSpec()
  queries, keys, width = CARD_HEADS

  def step(q: Any, k: Any, v: Any, dout: Any, positions: Any, segment_ids: Any) -> Any:
    attend = functools.partial(
      context_attention,
      positions_BS=positions,
      segment_ids_BS=segment_ids,
      scale=width**-0.5,
      implementation=implementation,
      axis_name=AXIS,
    )
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(dout)

  def array(*shape: int, spec: Any = parts, dtype: str = "bfloat16") -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(parts,) * 4 + (same,) * 2,
    out_specs=(parts, (parts,) * 3),
    check_vma=False,
  )
  q, k = (array(1, CARD_ROW, heads, width) for heads in (queries, keys))
  ids = array(1, CARD_ROW, spec=same, dtype="int32")
  with jax.default_device(devices[0]), jax.set_mesh(mesh):
    compiled = jax.jit(mapped).lower(q, k, k, q, ids, ids).compile()
  memory: Any = compiled.memory_analysis()
  return {
    "context": count,
    "implementation": implementation,
    "temporaries_gib": memory.temp_size_in_bytes / 2**30,
    "arguments_gib": memory.argument_size_in_bytes / 2**30,
    "results_gib": memory.output_size_in_bytes / 2**30,
  }


def table(rows: list[dict[str, Any]]) -> str:
  """Rows of the same keys as Markdown."""
  text = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)  # noqa: E731
  lines = [list(rows[0]), ["---"] * len(rows[0])]
  lines += [[text(x) for x in row.values()] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--heads", type=int, nargs=3, default=(8, 2, 64), metavar=("N", "K", "H"))
  parser.add_argument("--turns", type=int, default=11, help="0: no times")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--compile", action="store_true", help="memory of an H200 as well")
  parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
  arguments = parser.parse_args(argv)
  if arguments.turns == 1 or arguments.turns < 0:
    parser.error(f"--turns: expected 0, or at least 2, got {arguments.turns}")
  memory: list[dict[str, Any]] = []
  if arguments.compile:
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax: no autotuning for what is not here
    sys.path.append(str(PLAN))  # before jax looks for its plugins, that is, for any device
    for implementation in ("tokamax", "blockwise"):
      memory += [compile_for_h200(count, implementation) for count in COMPILED]
  times: list[dict[str, Any]] = []
  for name, lengths in packings(arguments.tokens).items() if arguments.turns else ():
    row = make_row(lengths, tuple(arguments.heads), arguments.seed)
    times += [{"segments": name, **figures} for figures in measure(row, arguments.turns)]
  for rows in (times, memory):
    if rows:
      print(table(rows))
  if arguments.json is not None:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    said = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "machine": platform.processor() or platform.machine(),
      "jax": importlib.metadata.version("jax"),
      **{name: getattr(arguments, name) for name in ("tokens", "heads", "turns", "seed")},
      "times": times,
      "memory": memory,
    }
    arguments.json.write_text(json.dumps(said, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
