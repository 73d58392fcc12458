"""Measures the device at hand and writes the constants that a plan predicts with.

    python -m tools.calibrate_plan --name h100 --out hardware.toml [--base FILE]
        [--embed 4096] [--mlp 1408] [--tokens 8192] [--dtype bfloat16] [--mib 1024] [--repeats 10]
    python -m tools.plan_run --gin FILE --target h100 --hardware hardware.toml

The file is the base's (`intellect3/planning/hardware.toml`) with the table `--name` changed: the
data sheet's rates stay, the shares of them that were reached are new. What is not measured stays
and is said (`left`): links where there is one device, those between nodes, custom kernels.

    matrix_share   products of a model's shapes: [tokens, embed] x [embed, mlp] and back
    memory_share   a copy of --mib MiB
    link_share     all-gather and all-to-all of --mib MiB over all devices of this process
    launch         a program that does nothing, beside another one
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.planning import hardware

_XLA = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  try:
    known = hardware.load(arguments.name, arguments.base)
    measured = measure(
      known,
      embed=arguments.embed,
      mlp=arguments.mlp,
      tokens=arguments.tokens,
      dtype=arguments.dtype,
      size=arguments.mib * 2**20,
      repeats=arguments.repeats,
    )
    text = (arguments.base or hardware.FILE).read_text(encoding="utf-8")
    pathlib.Path(arguments.out).write_text(changed(text, arguments.name, measured["constants"]))
    hardware.load(arguments.name, pathlib.Path(arguments.out))  # for its checks
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(json.dumps(measured, indent=2))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m tools.calibrate_plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--name", required=True, help="the table: h100, h200, b200, v5p, cpu")
  parser.add_argument("--out", required=True, help="the file to write")
  parser.add_argument("--base", type=pathlib.Path, help="the file to change")
  parser.add_argument("--embed", type=int, default=4096)
  parser.add_argument("--mlp", type=int, default=1408)
  parser.add_argument("--tokens", type=int, default=8192)
  parser.add_argument("--dtype", default="bfloat16", choices=tuple(_XLA))
  parser.add_argument("--mib", type=int, default=1024, help="of copies and collectives")
  parser.add_argument("--repeats", type=int, default=10)
  return parser


def measure(
  known: hardware.Hardware,
  *,
  embed: int,
  mlp: int,
  tokens: int,
  dtype: str,
  size: int,
  repeats: int,
) -> dict[str, Any]:
  """Runs every measurement that this process's devices allow.

  Args:
    known: the data sheet's rates, which shares are taken of.
    embed, mlp, tokens: shapes of the products.
    dtype: of their factors.
    size: bytes of a copy or a collective.
    repeats: timed runs of each; the median counts.

  Returns:
    `device`, `devices`, `rates` (what was reached: FLOP/s, bytes/s, seconds), `constants` (fields
    of `planning.hardware.Hardware` to change), `beyond` (rates above the data sheet's, whose share
    is set to 1) and `left` (fields that were not measured).

  Raises:
    ValueError: a size below 1.
  """
  for field, value in (
    *(("embed", embed), ("mlp", mlp), ("tokens", tokens)),
    *(("mib", size), ("repeats", repeats)),
  ):
    if value < 1:
      raise ValueError(f"{field}: expected at least 1, got {value}")
  rates = {
    "launch": launch_seconds(repeats),
    "matrix": matrix_rate(embed, mlp, tokens, dtype, repeats),
    "memory": memory_rate(size, repeats),
  }
  shares = {
    "matrix_share": rates["matrix"] / known.matrix_rate.get(_XLA[dtype], known.matrix_rate["f32"]),
    "memory_share": rates["memory"] / known.memory_rate,
  }
  left = ["kernel_share", "outer", "latency", "host"]
  if jax.device_count() > 1:
    for kind in ("all_gather", "all_to_all"):
      rates[kind] = collective_rate(kind, size, repeats)
    shares["link_share"] = min(rates["all_gather"], rates["all_to_all"]) / known.inner
  else:
    left.append("link_share")
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "rates": rates,
    "constants": {
      "launch": rates["launch"],
      **{field: min(1.0, share) for field, share in shares.items()},
    },
    "beyond": {field: share for field, share in shares.items() if share > 1},
    "left": sorted(left),
  }


def changed(text: str, name: str, constants: dict[str, float]) -> str:
  """A hardware file's text with some fields of one table changed; comments and order stay.

  Raises:
    ValueError: no such table, or a field that it does not have.
  """
  parts = re.split(rf"^\[{re.escape(name)}\]\s*$", text, flags=re.MULTILINE)
  if len(parts) != 2:
    raise ValueError(f"name: expected a table of the file, got {name!r}")
  before, after = parts
  end = after.find("\n[")
  table, rest = (after, "") if end < 0 else (after[:end], after[end:])
  for field, value in constants.items():
    table, count = re.subn(
      rf"^{field} = .*$", f"{field} = {value:.6g}", table, count=1, flags=re.MULTILINE
    )
    if not count:
      raise ValueError(f"{name}: expected the field {field}, got none")
  return f"{before}[{name}]{table}{rest}"


def launch_seconds(repeats: int) -> float:
  """Between kernels that do nothing: how much longer a program with many more of them takes."""

  def chain(length: int) -> float:
    def body(_: Any, x: jax.Array) -> jax.Array:
      return jax.lax.optimization_barrier(x + 1)

    run = jax.jit(lambda x: jax.lax.fori_loop(0, length, body, x))
    return _seconds(run, jnp.zeros(8), repeats)

  few, many = 100, 1100
  return max(1e-9, (chain(many) - chain(few)) / (many - few))


def matrix_rate(embed: int, mlp: int, tokens: int, dtype: str, repeats: int) -> float:
  """FLOP/s of two products of a model's shapes, there and back."""
  x = jnp.ones((tokens, embed), dtype)
  up, down = jnp.ones((embed, mlp), dtype), jnp.ones((mlp, embed), dtype)
  run = jax.jit(lambda factors: (factors[0] @ factors[1]) @ factors[2])
  return 4.0 * tokens * embed * mlp / _seconds(run, (x, up, down), repeats)


def memory_rate(size: int, repeats: int) -> float:
  """Bytes/s, read and written, of a copy."""
  x = jnp.ones((max(1, size // 4),), jnp.float32)
  return 2.0 * x.nbytes / _seconds(jax.jit(lambda x: x + 1), x, repeats)


def collective_rate(kind: str, size: int, repeats: int) -> float:
  """Bytes/s that each device receives from the others, over all devices of this process."""
  count = jax.device_count()
  mesh = Mesh(np.asarray(jax.devices()), ("all",))
  entries = max(1, size // 4 // count**2) * count**2
  x = jax.device_put(jnp.ones(entries), NamedSharding(mesh, PartitionSpec("all")))
  gather = kind == "all_gather"

  def body(part: jax.Array) -> jax.Array:
    if gather:
      return jax.lax.all_gather(part, "all", tiled=True)
    return jax.lax.all_to_all(part, "all", 0, 0, tiled=True)

  spec = PartitionSpec("all")
  run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
  received = x.nbytes * (count - 1) / count / (1 if gather else count)
  return received / _seconds(run, x, repeats)


def _seconds(run: Callable[[Any], Any], argument: Any, repeats: int) -> float:
  jax.block_until_ready(run(argument))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(run(argument))
    times.append(time.perf_counter() - began)
  return statistics.median(times)


if __name__ == "__main__":
  sys.exit(main())
