"""What sending tokens to their experts costs: time on fake CPU devices, memory on H200s.

    python -m tools.benchmarks.expert_exchange --json build/expert_exchange.json
    python -m tools.benchmarks.expert_exchange --part cpu

`cpu` pins itself to one core and takes turns, in one process, between the padded exchange over
four fake devices and the same experts and tokens on one device without any. Both do the same
products: the ratio of their CPU seconds is what the rounds cost. Fake devices copy memory; they say
nothing of a network. `h200` compiles forward and backward for eight H200s that are not here, at the
size of GLM-4.5-Air's layers and 65,536 tokens a device, and reports XLA's temporaries.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

RANKS = 4
SIZE = {"tokens": 1024, "choices": 8, "embed": 256, "mlp": 128, "experts": 32}
LARGE = {"tokens": 65_536, "choices": 8, "embed": 4096, "mlp": 1408, "experts": 128}
HEADROOM = 1.25
"""Of a buffer's rows over an even load's, so that chance needs no further round."""


def measure_cpu(repetitions: int = 7) -> dict[str, Any]:
  """CPU seconds, the best of several turns, by rounds and by direction."""
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  import jax
  import numpy as np

  from intellect3.kernels import grouped_matmul

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:RANKS]), ("expert",))
  sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
  shapes, dtypes = _shapes(SIZE, RANKS, "float32")
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal(s).astype(d) for s, d in zip(shapes[:4], dtypes[:4], strict=True)]
  tokens = shapes[0][0]
  experts = np.argsort(rng.random((tokens, SIZE["experts"])), axis=1)[:, : SIZE["choices"]]
  weights = rng.random(shapes[5]).astype(np.float32)
  arrays += [experts.astype(np.int32), weights, np.ones(tokens, bool)]

  def alone(x: Any, gate: Any, up: Any, down: Any, experts: Any, weights: Any, valid: Any) -> Any:
    options: dict[str, Any] = {"implementation": "blocked", "block_size": 128}
    return grouped_matmul.expert_mlp(x, gate, up, down, experts, weights, **options)

  programs = {"one device": (alone, [jax.device_put(a, jax.devices()[0]) for a in arrays])}
  pairs = SIZE["tokens"] * SIZE["choices"]
  placed = [jax.device_put(array, sharded) for array in arrays]
  for count in (1, 2, 4):
    rows = int(HEADROOM * pairs / count)
    programs[f"{count} rounds"] = (_exchanged(mesh, "padded", rows, "blocked"), placed)
  compiled = {}
  for name, (program, given) in programs.items():
    for direction, made in (("forward", program), ("both", functools.partial(_both, program))):
      compiled[name, direction] = (jax.jit(made), given)
  best: dict[tuple[str, str], float] = {}
  for turn in range(repetitions + 1):
    for key, (run, given) in compiled.items():
      start = time.process_time()
      jax.block_until_ready(run(*given))
      if turn:  # the first compiles
        best[key] = min(best.get(key, float("inf")), time.process_time() - start)
  return {
    "size": {**SIZE, "devices": RANKS},
    "cpu_seconds": {" ".join(key): seconds for key, seconds in best.items()},
    "ratio_to_one_device": {
      " ".join(key): seconds / best["one device", key[1]] for key, seconds in best.items()
    },
  }


def measure_h200() -> dict[str, Any]:
  """Temporaries by the share of all pairs' rows that a buffer holds."""
  import jax
  import numpy as np

  from intellect3.planning import target

  devices = target.cuda_devices("h200", 8)
  mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
  sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
  shapes, dtypes = _shapes(LARGE, 8, "bfloat16")
  arrays = [
    jax.ShapeDtypeStruct(s, d, sharding=sharded) for s, d in zip(shapes, dtypes, strict=True)
  ]
  pairs = LARGE["tokens"] * LARGE["choices"]
  found = {}
  for share in (1, 4, 6.4, 8, 16):
    rows = int(pairs / share)
    program = _exchanged(mesh, "auto", rows, "auto")
    start = time.perf_counter()
    with jax.default_device(devices[0]), jax.set_mesh(mesh):
      compiled = jax.jit(functools.partial(_both, program)).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    found[f"1/{share}"] = {
      "receive_rows": rows,
      "temporaries_gib": memory.temp_size_in_bytes / 2**30,
      "compile_seconds": time.perf_counter() - start,
    }
  return {"size": {**LARGE, "devices": 8}, "by_share_of_pairs": found}


def _shapes(size: dict[str, int], ranks: int, dtype: str) -> tuple[list[Any], list[str]]:
  """Whole arrays of `expert_parallel_mlp`; tokens are a device's."""
  tokens, routed = ranks * size["tokens"], (ranks * size["tokens"], size["choices"])
  wide = (size["experts"], size["embed"], size["mlp"])
  shapes = [(tokens, size["embed"]), wide, wide, (wide[0], wide[2], wide[1]), routed, routed]
  return [*shapes, (tokens,)], [*[dtype] * 4, "int32", "float32", "bool"]


def _exchanged(mesh: Any, exchange: str, rows: int, implementation: str) -> Any:
  import jax

  from intellect3.kernels.expert_parallel import expert_parallel_mlp

  def local(*arrays: Any) -> Any:
    out, _ = expert_parallel_mlp(
      *arrays,
      axis_name="expert",
      exchange=exchange,
      receive_rows=rows,
      implementation=implementation,
      block_size=128,
    )
    return out

  over = jax.sharding.PartitionSpec("expert")
  return jax.shard_map(local, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)


def _both(program: Any, *arrays: Any) -> Any:
  import jax

  *floats, experts, weights, valid = arrays

  def run(*floats: Any) -> Any:
    return program(*floats[:4], experts, floats[4], valid)

  out, pull = jax.vjp(run, *floats, weights)
  return out, pull(out)


PARTS = {"cpu": measure_cpu, "h200": measure_h200}


def main() -> None:
  """Runs the parts, each in a process with the devices that it needs."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
  parser.add_argument("--json", type=pathlib.Path)
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    print(json.dumps(PARTS[arguments.part]()))
    return
  report: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version()}
  for part in PARTS if arguments.part == "all" else (arguments.part,):
    report[part] = _child(part)
  text = json.dumps(report, indent=2)
  print(text)
  if arguments.json:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(text + "\n")


def _child(part: str) -> Any:
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={RANKS}"
  path = [str(pathlib.Path(sys.prefix) / "plan"), os.getcwd(), os.environ.get("PYTHONPATH", "")]
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags,
    "PYTHONPATH": os.pathsep.join(filter(None, path)),
  }
  command = [sys.executable, "-m", "tools.benchmarks.expert_exchange", "--child", "--part", part]
  result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
  main()
