"""Forward and backward tokens per second and peak memory of the model, against transformers.

    python -m tools.benchmarks.model --json build/model.json     against transformers on this CPU
    python -m tools.benchmarks.model --compile                   trace and compile 46 layers
    python -m tools.benchmarks.model --gpu [--dry-run]           the figures of a GPU

What is compared: loss and gradients of all parameters, no optimizer; same weights (written by
`models.hf.save`), same tokens (one document per row, so torch takes its causal fast path), same
number of threads, float32, SDPA on their side, nothing recomputed on either. Each side is a process
of its own and they take turns, so that whatever else the machine does falls on all; the yardstick,
a plain jitted matrix product, is timed between our turns in our process. The run fails where losses
or gradient norms disagree.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any, Protocol

import numpy as np

from tools.benchmarks import step
from tools.benchmarks.side import Side, peak_mib

SIDES = ("ours", "grouped_mm", "eager")
"""Ours, then transformers by its experts implementation."""

SIZES = {
  "cpu": step.Size(
    model=dict(
      vocab_size=4096,
      embed_dim=512,
      num_layers=8,
      num_heads=8,
      num_kv_heads=2,
      head_dim=64,
      mlp_dim=1536,
      expert_mlp_dim=256,
      num_experts=64,
      num_experts_per_token=8,
    ),
    rows=4,
    length=1024,
    steps=1,
    experts="",
  ),
  "small": step.Size(model=dict(), rows=2, length=64, steps=50, experts=""),
}
TOLERANCE = 1e-4


class Measured(Protocol):
  """A side: what its process is asked for."""

  versions: str

  def loss(self) -> float:
    """One forward and backward pass, waited for; returns the loss."""
    ...

  def gradient_norm(self) -> float:
    """The global norm of the last pass's gradients."""
    ...

  def matmul_seconds(self, size: int) -> float:
    """Seconds of a float32 product of two square matrices, the best of a few."""
    ...


def whole_rows(size: step.Size, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
  """Random tokens, one document per row; everything but first tokens is trained on."""
  from intellect3.pipeline import packing

  batch = packing.empty_batch(size.rows, size.length, step=1, loss_tokens=0)
  random = np.random.default_rng(seed)
  batch.tokens[:] = random.integers(0, vocab_size, batch.tokens.shape)
  batch.positions[:] = np.arange(size.length)
  batch.segment_ids[:] = 1
  batch.loss_mask[:, 1:] = True
  batch = batch._replace(loss_tokens=np.asarray(batch.loss_mask.sum(), np.int32))
  return {name: array for name, array in batch._asdict().items() if array is not None}


def write_inputs(directory: pathlib.Path, size: step.Size, seed: int) -> dict[str, Any]:
  """Writes the model (HF) and the batch; returns what to print about them."""
  import jax

  from intellect3.models import hf, presets, transformer
  from intellect3.training.flops import train_flops

  config = presets.tiny(**size.model)
  params = jax.device_get(transformer.init(config, jax.random.key(seed)))
  hf.save(directory / "model", config, params)
  np.savez(directory / "batch.npz", allow_pickle=False, **whole_rows(size, config.vocab_size, seed))
  tokens = size.rows * size.length
  pairs = size.rows * size.length * (size.length + 1) // 2
  flops = train_flops(config, tokens=tokens, attended_pairs=pairs)
  return {
    "model": dataclasses.asdict(config),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "rows": size.rows,
    "length": size.length,
    "tokens": tokens,
    "mflop_per_token": flops / tokens / 1e6,
  }


def run_side(arguments: argparse.Namespace) -> None:
  """The body of a side's process: answers each line, a JSON list, until stdin ends."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
  directory = pathlib.Path(arguments.inputs)
  with np.load(directory / "batch.npz") as file:
    batch = dict(file)
  side: Measured
  if arguments.side == "ours":
    from tools.benchmarks import model_ours

    side = model_ours.Ours(
      directory / "model",
      batch,
      head_chunk_size=arguments.head_chunk_size,
      run_options=json.loads(arguments.run_options),
    )
  else:
    from tools.benchmarks import model_theirs

    side = model_theirs.Theirs(
      directory / "model", batch, threads=arguments.threads, experts=arguments.side
    )
  losses = [side.loss() for _ in range(2)]
  life_peak = peak_mib()
  first = {"losses": losses, "grad_norm": side.gradient_norm(), "versions": side.versions}
  pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
  print(json.dumps(first), flush=True)
  for line in sys.stdin:
    question, amount = json.loads(line)
    if question == "matmul":
      answer = {"seconds": side.matmul_seconds(amount)}
    else:
      # Not timed: while others had their turn, the system may have taken an idle process's pages.
      side.loss()
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(amount):
        side.loss()
      answer = {
        "wall_seconds": (time.perf_counter() - wall) / amount,
        "cpu_seconds": (time.process_time() - cpu) / amount,
        "passes_peak_mib": peak_mib(),
        "peak_mib": max(life_peak, peak_mib()),
      }
    print(json.dumps(answer), flush=True)


def start_side(name: str, directory: str, arguments: argparse.Namespace) -> Side:
  """Starts a side's process and waits until it has run its first passes."""
  command = ["tools.benchmarks.model", "--side", name, "--inputs", directory]
  command += ["--threads", str(arguments.threads)]
  command += ["--head-chunk-size", str(arguments.head_chunk_size)]
  command += ["--run-options", arguments.run_options]
  environment = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": str(arguments.threads),
    # Huge pages for every side: gigabytes of temporaries are else half a million page faults.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
  }
  return Side(command, environment)


def check_agreement(firsts: dict[str, dict[str, Any]]) -> None:
  """Raises where the sides do not compute the same."""
  for key in ("losses", "grad_norm"):
    values = {name: np.atleast_1d(first[key]) for name, first in firsts.items()}
    for name, value in values.items():
      if not np.allclose(value, values["ours"], rtol=TOLERANCE):
        raise RuntimeError(f"{key}: expected all sides within {TOLERANCE}, got {name}: {values}")


def against_transformers(arguments: argparse.Namespace) -> dict[str, Any]:
  """Runs the sides in turns; returns their figures."""
  size = SIZES[arguments.size]
  names = arguments.sides
  with tempfile.TemporaryDirectory() as directory:
    inputs = write_inputs(pathlib.Path(directory), size, arguments.seed)
    sides: dict[str, Side] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    matmuls = []
    try:
      for name in names:
        sides[name] = start_side(name, directory, arguments)
      for repetition in range(arguments.repetitions):
        for name in names if repetition % 2 == 0 else names[::-1]:
          answers[name].append(sides[name].ask(["passes", size.steps]))
          seconds = answers[name][-1]["wall_seconds"]
          print(f"turn {repetition + 1}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
          if name == "ours":
            matmuls.append(sides[name].ask(["matmul", arguments.matmul])["seconds"])
    finally:
      for process in sides.values():
        process.close()
  firsts = {name: side.first for name, side in sides.items()}
  check_agreement(firsts)
  figures: dict[str, Any] = {**inputs, "sides": {}}
  if matmuls:
    flops = 2 * arguments.matmul**3
    figures["matmul"] = {
      "size": arguments.matmul,
      "gflops": flops / statistics.median(matmuls) / 1e9,
      "gflops_best": flops / min(matmuls) / 1e9,
    }
  for name in names:
    wall = statistics.median(answer["wall_seconds"] for answer in answers[name])
    rate = inputs["tokens"] / wall
    figures["sides"][name] = {
      **firsts[name],
      "tokens_per_second": rate,
      "gflops": rate * inputs["mflop_per_token"] / 1e3,
      "wall_seconds": wall,
      "cpu_seconds": statistics.median(answer["cpu_seconds"] for answer in answers[name]),
      "wall_seconds_all": [answer["wall_seconds"] for answer in answers[name]],
      "passes_peak_mib": answers[name][-1]["passes_peak_mib"],
      "peak_mib": answers[name][-1]["peak_mib"],
    }
  return figures


def table(figures: dict[str, Any]) -> str:
  """The figures as a Markdown table."""
  sides = figures["sides"]
  head = f"{figures['parameters']:,} parameters, {figures['rows']} x {figures['length']} tokens"
  lines = [
    f"{head}, {figures['mflop_per_token']:.0f} MFLOP per token",
    "",
    "| | tokens/s | GFLOP/s | CPU seconds | peak MiB, passes | peak MiB, process |",
    "|---|---|---|---|---|---|",
  ]
  for name, side in sides.items():
    lines.append(
      f"| {name} | {side['tokens_per_second']:,.0f} | {side['gflops']:.0f}"
      f" | {side['cpu_seconds']:.2f} | {side['passes_peak_mib']:,.0f} | {side['peak_mib']:,.0f} |"
    )
  theirs = [side["tokens_per_second"] for name, side in sides.items() if name != "ours"]
  if theirs and "ours" in sides:
    ratio = sides["ours"]["tokens_per_second"] / max(theirs)
    lines += ["", f"ours / their best: {ratio:.2f}"]
  if "matmul" in figures:
    lines.append(
      f"yardstick, jitted float32 product of {figures['matmul']['size']} squared: "
      f"{figures['matmul']['gflops']:.0f} GFLOP/s (best {figures['matmul']['gflops_best']:.0f})"
    )
  return "\n".join([*lines, ""])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Parses the command line; `--side` and `--inputs` are for the sides' own processes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--compile", action="store_true", help="trace and compile 46 layers")
  parser.add_argument("--gpu", action="store_true", help="the figures of a GPU")
  parser.add_argument("--dry-run", action="store_true", help="--gpu at small sizes, anywhere")
  parser.add_argument("--only", nargs="+", help="--gpu: the measurements to run; default all")
  parser.add_argument("--size", choices=SIZES, default="cpu")
  parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
  parser.add_argument("--repetitions", type=int, default=5, help="turns of each side")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--head-chunk-size", type=int, default=1024)
  parser.add_argument("--matmul", type=int, default=2048, help="size of the yardstick's squares")
  parser.add_argument(
    "--run-options",
    default='{"remat_policy": "none"}',
    help="JSON: ModelConfig fields for our side; transformers recomputes nothing either",
  )
  parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument("--inputs", help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main() -> None:
  """Measures what was asked for and prints and writes what was seen."""
  arguments = parse()
  if arguments.side:
    run_side(arguments)
    return
  if not arguments.gpu or arguments.dry_run:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  report: dict[str, Any] = {
    "python": platform.python_version(),
    "numpy": importlib.metadata.version("numpy"),
    "jax": importlib.metadata.version("jax"),
    "threads": arguments.threads,
    "run_options": json.loads(arguments.run_options),
  }
  if arguments.compile:
    from tools.benchmarks import model_compile

    report["compile"] = model_compile.measure()
    print(json.dumps(report["compile"], indent=2))
  elif arguments.gpu:
    from tools.benchmarks import model_gpu

    report["gpu"] = model_gpu.measure(dry_run=arguments.dry_run, only=arguments.only)
    print(json.dumps(report["gpu"], indent=2))
  else:
    report["result"] = against_transformers(arguments)
    print(table(report["result"]))
  if arguments.json:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
