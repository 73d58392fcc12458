"""A planned train step run for real: predicted and measured peak memory, and step time on GPUs.

    python -m tools.plan_measured --case dense|experts|long
    python -m tools.plan_measured --gin FILE --target h100 [--hardware FILE] [--rows N]

Makes the state from random numbers and the rows from counting, on the devices of this process,
compiles the step as the planner does, runs it, and prints one line of JSON. The cases are of the
size of a CPU, in float32. A CPU's peak is the process's resident memory above what it was before
the state was made (Linux); its step time is not predicted. A GPU's is what jax's allocator says.
One process, one measurement: peaks do not go down.
"""

import argparse
import json
import logging
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments import gin_config
from intellect3.losses import policy_gradient
from intellect3.models import presets
from intellect3.pipeline import packing
from intellect3.planning import hardware, plan, programs
from intellect3.planning.job import Job
from intellect3.sharding.mesh import make_mesh
from intellect3.training import layout, optimizer
from tools import plan_job

WARM, TIMED = 2, 5


def case(name: str) -> Job:
  """One of the jobs that a CPU can run.

  Raises:
    ValueError: an unknown name.
  """
  sizes: dict[str, Any] = {"vocab_size": 8192, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
  adamw, muon = optimizer.adamw(learning_rate=1e-6), optimizer.muon(learning_rate=1e-6)
  dense = {"embed_dim": 768, "mlp_dim": 3072, "num_layers": 8, "num_dense_layers": 8}
  wide = {"embed_dim": 512, "mlp_dim": 1536, "num_layers": 8, "num_dense_layers": 8}
  sparse = {"embed_dim": 512, "mlp_dim": 1536, "num_layers": 6, "expert_mlp_dim": 256}
  cases = {
    "dense": (presets.tiny_qwen3(**sizes, **dense), adamw, 512),
    "long": (presets.tiny_qwen3(**sizes, **wide), muon, 4096),
    "experts": (presets.tiny(**sizes, **sparse, num_experts=32), adamw, 1024),
  }
  if name not in cases:
    raise ValueError(f"case: expected one of {tuple(cases)}, got {name!r}")
  model, update, tokens = cases[name]
  return Job(
    model=model,
    optimizer=update,
    rl_loss=policy_gradient.masked_importance_loss,
    row_length=tokens,
    micro_rows=1,
    rows=1,
    trajectory_tokens=tokens,
  )


def measure(job: Job, name: str, device: hardware.Hardware) -> dict[str, Any]:
  """Plans a job's step and runs it on this process's devices.

  Args:
    job: its mesh must fit the devices.
    name: `rl_step` or `sft_step`.
    device: constants of the prediction.

  Returns:
    `parameters`, `planned_gib`, `measured_gib`, `gap` (of the plan, from the measurement), and on
    accelerators `planned_seconds`, `measured_seconds` (the median of `TIMED` steps), `mfu`.
  """
  axes: Any = job.axes(jax.device_count())
  mesh = make_mesh(**axes)
  program = programs.make(job, name, mesh)
  compiled = program.lower().compile()
  report = plan.report(job, program, compiled, device)
  on_cpu = jax.default_backend() == "cpu"
  before = _resident("VmRSS") if on_cpu else 0
  shardings = layout.state_shardings(program.config, job.optimizer, mesh, job.rules)
  with jax.set_mesh(mesh):
    state = layout.make_state(program.config, job.optimizer, shardings, seed=0)
  state = jax.block_until_ready(state)
  batch = jax.tree.map(
    lambda value, leaf: jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding),
    rows(job),
    program.batch,
  )
  if on_cpu:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest so far, forgotten
  seconds = []
  for _ in range(1 if on_cpu else WARM + TIMED):
    began = time.perf_counter()
    state, _ = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - began)
  peak = (
    _resident("VmHWM") - before if on_cpu else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
  )
  planned = report["peak_gib"] * hardware.GIB
  parameters = sum(leaf.size for leaf in jax.tree.leaves(program.first.params))
  found = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "parameters": parameters,
    "tokens": job.tokens,
    "planned_gib": planned / hardware.GIB,
    "measured_gib": peak / hardware.GIB,
    "gap": planned / peak - 1,
  }
  if not on_cpu:
    took = statistics.median(seconds[WARM:])
    found |= {
      "planned_seconds": report["predicted_step_seconds"],
      "measured_seconds": took,
      "mfu": report["predicted_mfu"] * report["predicted_step_seconds"] / took,
    }
  return found


def rows(job: Job) -> packing.Batch:
  """A batch full of trajectories of the job's length, every token trained on."""
  shape = (job.rows, job.row_length)
  places = np.broadcast_to(np.arange(job.row_length), shape)
  ones = np.ones(shape, np.float32)
  count = np.asarray(job.rows * job.row_length, np.int32)
  return packing.Batch(
    tokens=places % job.model.vocab_size,
    loss_mask=places % job.trajectory_tokens > 0,
    inference_logprobs=-ones,
    advantages=ones,
    temperature=ones,
    policy_versions=np.zeros(shape, np.int32),
    segment_ids=places // job.trajectory_tokens + 1,
    positions=places % job.trajectory_tokens,
    step=np.asarray(1, np.int32),
    loss_tokens=count,
    loss_sequences=np.asarray(job.rows, np.int32),
  )


def _resident(field: str) -> int:
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.plan_measured", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  chosen = parser.add_mutually_exclusive_group(required=True)
  chosen.add_argument("--case", help="dense, experts or long")
  chosen.add_argument("--gin", action="append", metavar="FILE")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--target", default="cpu", help="whose constants: h100, h200, b200, v5p, cpu")
  parser.add_argument("--hardware", type=pathlib.Path, help="other constants")
  parser.add_argument("--rows", type=int, help="of a step's batch; by default the most")
  arguments = parser.parse_args(argv)
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    name, device = "rl_step", hardware.load(arguments.target, arguments.hardware)
    if arguments.case is not None:
      job = case(arguments.case)
    else:
      text = gin_config.read(arguments.gin, arguments.bindings)
      kind, job = plan_job.read(text, rows=arguments.rows)
      name = f"{kind}_step"
    found = measure(job, name, device)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(json.dumps(found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
