"""Trained tokens per second and peak memory of a train step: ours against transformers and torch.

    python -m tools.benchmarks.step --json build/step.json

Same weights (written by `models.hf.save`), same packed tokens, same AdamW, same number of threads,
one micro-batch, float32. Each side is a process of its own; the two take turns, so that whatever
else the machine does falls on both. The run fails if their losses or gradient norms disagree.

On a busy machine compare CPU seconds of `--threads 1`: with two threads torch's OpenMP workers spin
while they wait for one another, and its wall time then says more of the neighbours than of torch.

Memory is the resident set's high-water mark of each process: over its life (imports, loading,
compiling) and over the timed steps alone. Linux only, as it reads and resets it in /proc.
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
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.benchmarks.side import Side, peak_mib

SIDES = ("ours", "transformers")
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
LOSS_TOLERANCE = 1e-4
LAST_LOSS_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """A model and a batch.

  Attributes:
    model: fields of ModelConfig that differ from the preset `tiny`.
    rows: packed rows.
    length: tokens of a row.
    steps: train steps per repetition.
    experts: transformers' experts implementation, the fastest of its own at this size.
  """

  model: dict[str, Any]
  rows: int
  length: int
  steps: int
  experts: str


SIZES = {
  "tiny": Size(model={}, rows=32, length=128, steps=10, experts="eager"),
  "middle": Size(
    model=dict(
      vocab_size=4096,
      embed_dim=512,
      num_layers=8,
      num_heads=8,
      num_kv_heads=2,
      head_dim=64,
      mlp_dim=1536,
      expert_mlp_dim=256,
      num_experts=32,
      num_experts_per_token=4,
    ),
    rows=4,
    length=512,
    steps=1,
    experts="grouped_mm",
  ),
}


def packed_batch(size: Size, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
  """Random documents of 1/8 to all of a row, packed; everything but first tokens is trained on."""
  from intellect3.pipeline import packing

  random = np.random.default_rng(seed)
  batch = packing.empty_batch(size.rows, size.length, step=1, loss_tokens=0)
  for row in range(size.rows):
    start, segment = 0, 1
    while size.length - start >= size.length // 8:
      end = min(size.length, start + int(random.integers(size.length // 8, size.length + 1)))
      span = (row, slice(start, end))
      batch.tokens[span] = random.integers(0, vocab_size, end - start)
      batch.positions[span] = np.arange(end - start)
      batch.segment_ids[span] = segment
      batch.loss_mask[row, start + 1 : end] = True
      start, segment = end, segment + 1
  return batch._replace(loss_tokens=np.asarray(batch.loss_mask.sum(), np.int32))._asdict()


def write_inputs(directory: pathlib.Path, size: Size, seed: int) -> dict[str, Any]:
  """Writes the model (HF) and the batch; returns what to print about them."""
  import jax

  from intellect3.models import hf, presets, transformer

  config = presets.tiny(**size.model)
  params = jax.device_get(transformer.init(config, jax.random.key(seed)))
  hf.save(directory / "model", config, params)
  batch = packed_batch(size, config.vocab_size, seed)
  arrays = {name: array for name, array in batch.items() if isinstance(array, np.ndarray)}
  np.savez(directory / "batch.npz", allow_pickle=False, **arrays)
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "rows": size.rows,
    "length": size.length,
    "tokens": int((batch["segment_ids"] > 0).sum()),
    "loss_tokens": int(batch["loss_tokens"]),
  }


def serve_side(step: Callable[[], tuple[float, float]], versions: str) -> None:
  """Answers each line on stdin, a number of steps, with one JSON line; ends with stdin.

  Two steps come first: they compile, fill caches and allocate.
  """
  first = [step() for _ in range(2)]
  life_peak = peak_mib()
  pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
  answer = {"losses": [loss for loss, _ in first], "grad_norm": first[0][1], "versions": versions}
  print(json.dumps(answer), flush=True)
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    losses = [step()[0] for _ in range(int(line))]
    answer = {
      "losses": losses,
      "wall_seconds": (time.perf_counter() - wall) / len(losses),
      "cpu_seconds": (time.process_time() - cpu) / len(losses),
      "steps_peak_mib": peak_mib(),
      "peak_mib": max(life_peak, peak_mib()),
    }
    print(json.dumps(answer), flush=True)


def run_side(arguments: argparse.Namespace) -> None:
  """The body of a side's process."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
  size = SIZES[arguments.size]
  directory = pathlib.Path(arguments.inputs)
  with np.load(directory / "batch.npz") as file:
    batch = dict(file)
  if arguments.side == "ours":
    from tools.benchmarks import step_ours

    step, versions = step_ours.prepare(
      directory / "model",
      batch,
      learning_rate=LEARNING_RATE,
      clip_norm=CLIP_NORM,
      micro_rows=size.rows,
      head_chunk_size=arguments.head_chunk_size,
      run_options=json.loads(arguments.run_options),
    )
  else:
    from tools.benchmarks import step_theirs

    step, versions = step_theirs.prepare(
      directory / "model",
      batch,
      learning_rate=LEARNING_RATE,
      clip_norm=CLIP_NORM,
      threads=arguments.threads,
      experts=arguments.experts or size.experts,
    )
  serve_side(step, versions)


def start_side(name: str, size: str, directory: str, arguments: argparse.Namespace) -> Side:
  """Starts a side's process and waits until it has taken its first steps."""
  command = ["tools.benchmarks.step", "--side", name, "--size", size]
  command += ["--inputs", directory, "--threads", str(arguments.threads)]
  command += ["--head-chunk-size", str(arguments.head_chunk_size)]
  command += ["--run-options", arguments.run_options]
  command += ["--experts", arguments.experts] if arguments.experts else []
  return Side(command, {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(arguments.threads)})


def check_agreement(
  ours: dict[str, Any], theirs: dict[str, Any], last: tuple[float, float]
) -> None:
  """Raises where the two sides do not compute the same."""
  pairs = [("loss", a, b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
  pairs.append(("grad_norm", ours["grad_norm"], theirs["grad_norm"]))
  for name, a, b in pairs:
    if not abs(a - b) <= LOSS_TOLERANCE * abs(b):
      raise RuntimeError(f"{name}: expected both sides within {LOSS_TOLERANCE}, got {a} and {b}")
  if not abs(last[0] - last[1]) <= LAST_LOSS_TOLERANCE * abs(last[1]):
    raise RuntimeError(f"last loss: expected within {LAST_LOSS_TOLERANCE}, got {last}")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Runs one size; returns its figures."""
  size = SIZES[name]
  steps = arguments.steps or size.steps
  with tempfile.TemporaryDirectory() as directory:
    inputs = write_inputs(pathlib.Path(directory), size, arguments.seed)
    sides: dict[str, Side] = {}
    try:
      for side in SIDES:
        sides[side] = start_side(side, name, directory, arguments)
      answers: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
      for repetition in range(arguments.repetitions):
        for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
          answers[side].append(sides[side].ask(steps))
    finally:
      for process in sides.values():
        process.close()
  ours, theirs = (sides[side].first for side in SIDES)
  last = (answers["ours"][-1]["losses"][-1], answers["transformers"][-1]["losses"][-1])
  check_agreement(ours, theirs, last)
  figures: dict[str, Any] = {"size": name, **inputs, "last_loss": last}
  for side in SIDES:
    median = {
      key: statistics.median(answer[key] for answer in answers[side])
      for key in ("wall_seconds", "cpu_seconds")
    }
    figures[side] = {
      **sides[side].first,
      "tokens_per_second": inputs["tokens"] / median["wall_seconds"],
      **median,
      "cpu_seconds_least": min(answer["cpu_seconds"] for answer in answers[side]),
      "wall_seconds_all": [answer["wall_seconds"] for answer in answers[side]],
      "steps_peak_mib": answers[side][-1]["steps_peak_mib"],
      "peak_mib": answers[side][-1]["peak_mib"],
    }
  return figures


ROWS = (
  ("trained tokens/s", "tokens_per_second", "{:,.0f}"),
  ("seconds/step", "wall_seconds", "{:.3f}"),
  ("CPU seconds/step", "cpu_seconds", "{:.3f}"),
  ("CPU seconds/step, least", "cpu_seconds_least", "{:.3f}"),
  ("peak MiB, steps", "steps_peak_mib", "{:,.0f}"),
  ("peak MiB, process", "peak_mib", "{:,.0f}"),
  ("first loss", "first_loss", "{:.6f}"),
  ("first gradient norm", "grad_norm", "{:.6f}"),
)


def table(figures: dict[str, Any]) -> str:
  """One size's figures as a Markdown table."""
  parameters, tokens = figures["parameters"], figures["tokens"]
  shape = f"{figures['rows']} x {figures['length']}"
  lines = [
    f"{figures['size']}: {parameters:,} parameters, {shape} packed, {tokens:,} tokens",
    "",
    "| | ours | transformers + torch | ours / theirs |",
    "|---|---|---|---|",
  ]
  for label, key, form in ROWS:
    values = [{**figures[side], "first_loss": figures[side]["losses"][0]}[key] for side in SIDES]
    ours, theirs = (form.format(value) for value in values)
    lines.append(f"| {label} | {ours} | {theirs} | {values[0] / values[1]:.2f} |")
  return "\n".join([*lines, ""])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Parses the command line; the options after `seed` are for the sides' own processes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
  parser.add_argument("--repetitions", type=int, default=5, help="turns of each side")
  parser.add_argument("--steps", type=int, help="steps per turn; default: the size's")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--head-chunk-size", type=int, default=1024)
  parser.add_argument(
    "--run-options",
    default='{"remat_policy": "none"}',
    help="JSON: ModelConfig fields for our side; transformers recomputes nothing either",
  )
  parser.add_argument("--experts", help="transformers' experts implementation")
  parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
  parser.add_argument("--inputs", help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main() -> None:
  """Measures the sizes asked for and prints and writes what was seen."""
  arguments = parse()
  if arguments.side:
    run_side(arguments)
    return
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  results = []
  for name in arguments.sizes:
    results.append(measure(name, arguments))
    print(table(results[-1]), flush=True)
  report = {
    "python": platform.python_version(),
    "numpy": importlib.metadata.version("numpy"),
    "threads": arguments.threads,
    "run_options": json.loads(arguments.run_options),
    "results": results,
  }
  print("; ".join([f"python {report['python']}"] + [results[0][s]["versions"] for s in SIDES]))
  if arguments.json:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
