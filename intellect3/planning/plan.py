"""A plan: a job's programs compiled for devices that need not exist, and what they will take.

Place in the ring: beside it; `tools.plan_run` prints it.

    job -> programs (lowered, compiled) -> memory, collectives, schedule -> does it fit, how long
"""

import dataclasses
import pathlib
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.planning import advice, memory, programs, schedule, travel
from intellect3.planning import hlo as texts
from intellect3.planning.hardware import GIB, MARGIN, Hardware
from intellect3.planning.job import Job
from intellect3.planning.programs import Program
from intellect3.sharding.mesh import make_mesh
from intellect3.training import flops as analytic
from intellect3.training import layout

_KEEPS_ATTENTION = ("attention", "offload_attention")
_KEEPS_PRODUCTS = ("dots", "dots_no_batch")
"""Remat policies whose backward pass does not run again all of a layer's forward pass."""


def plan(
  job: Job,
  devices: Sequence[jax.Device],
  hardware: Hardware,
  *,
  names: Sequence[str] | None = None,
  margin: float = MARGIN,
  say: Callable[[str], None] = lambda line: None,
  hlo: pathlib.Path | None = None,
  options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Compiles a job's programs and reports on them.

  Args:
    job: the run's parameters.
    devices: to compile for; they need not exist.
    hardware: their constants.
    names: of the programs, the run's own first; None: all that the job has.
    margin: share of the device's memory to leave free.
    say: gets a line before each part of the work.
    hlo: a folder for the compiled programs' text; None: it is not kept.
    options: of XLA for this compilation, by name; the run needs the same in XLA_FLAGS.

  Returns:
    A report fit for JSON: of the first program `peak_gib`, `memory`, `collectives`,
    `flops_per_step`, `predicted_step_seconds`, `predicted_mfu`; of all of them `fits`, `advice`,
    `faults`, `compile_seconds`, and each one's own under `programs`. `float32_weights` is None
    where nothing can be told of them: for CPUs.

  Raises:
    ValueError: before anything is traced: the job does not fit the mesh, a program that it does not
      have, or an option that XLA does not know.
  """
  mesh = make_mesh(devices=devices, **job.axes(len(devices)))
  names = tuple(names or programs.names_of(job))
  programs.check(job, names, mesh)
  check_options(options, devices[0])
  reports = {}
  for name in names:
    say(f"{name}: tracing")
    began = time.monotonic()
    program = programs.make(job, name, mesh)
    lowered = program.lower()
    traced = time.monotonic() - began
    say(f"{name}: compiling ({traced:.1f} s to trace)")
    began = time.monotonic()
    compiled = lowered.compile(compiler_options=dict(options) if options else None)
    seconds = time.monotonic() - began
    say(f"{name}: compiled in {seconds:.1f} s")
    if hlo is not None:
      hlo.mkdir(parents=True, exist_ok=True)
      (hlo / f"{name}.hlo").write_text(str(compiled.as_text()))
    reports[name] = report(job, program, compiled, hardware, margin=margin)
    reports[name] |= {"trace_seconds": traced, "compile_seconds": seconds}
  first = next(iter(reports.values()))
  return {
    "devices": len(devices),
    "device_kind": devices[0].device_kind,
    "mesh": dict(mesh.shape),
    "tokens_per_step": job.tokens,
    "rows": job.rows,
    "micro_rows": job.micro_rows,
    "row_length": job.row_length,
    "fits": all(one["fits"] for one in reports.values()),
    "faults": [f"{name}: {fault}" for name, one in reports.items() for fault in one["faults"]],
    "advice": list(dict.fromkeys(line for one in reports.values() for line in one["advice"])),
    **{key: first[key] for key in _FIRST},
    "compile_seconds": sum(one["compile_seconds"] for one in reports.values()),
    "compile_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "xla_options": dict(options or {}),
    "margin": margin,
    "hardware": dataclasses.asdict(hardware),
    "programs": reports,
  }


_FIRST = (
  *("peak_gib", "memory", "collectives", "flops_per_step", "predicted_step_seconds"),
  *("predicted_mfu", "limited_by", "exposed_share", "unknown_loops"),
)


def check_options(options: Mapping[str, Any] | None, device: jax.Device) -> None:
  """Raises ValueError with XLA's own line for options that it does not take, told by next to none.

  Args:
    options: of XLA for a compilation, by name.
    device: to compile for.
  """
  if not options:
    return
  placed = jax.sharding.SingleDeviceSharding(device)
  one: Any = jax.ShapeDtypeStruct((), np.float32, sharding=placed)
  with jax.default_device(device):
    lowered = jax.jit(lambda x: x + 1, out_shardings=placed).lower(one)
    try:
      lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(f"--xla: {str(error).splitlines()[0]}") from error


def report(
  job: Job, program: Program, compiled: Any, hardware: Hardware, *, margin: float = MARGIN
) -> dict[str, Any]:
  """What one compiled program takes; see `plan`."""
  mesh, config = program.mesh, program.config
  module = texts.with_nominal(texts.parse(compiled.as_text()), exchange_rounds)
  held = memory.measure(program, compiled, module)
  if job.reference is not None and program.name == "rl_step":
    reference = reference_bytes(job, mesh)
    held = held._replace(reference=reference, peak=held.peak + reference)
  nodes = [device.id // hardware.node for device in mesh.devices.flat]
  line = schedule.timeline(module, hardware, dict(mesh.shape), nodes)
  trains = program.name != "logprobs"
  useful = analytic.train_flops(config, tokens=job.tokens, attended_pairs=job.attended_pairs)
  useful = useful if trains else useful / 3
  hidden = max(0.0, hardware_flops(job, program) / mesh.size - line.matrix_flops)
  rate = hardware.matrix_rate.get(_XLA_DTYPE[config.dtype], hardware.matrix_rate["f32"])
  kernel_seconds = hidden / (rate * hardware.kernel_share)
  # Where custom kernels do this, it stands where they do; what loops hide is added at the end.
  shares = kernel_shares(job, config, line)
  in_kernels = {part: kernel_seconds * share for part, share in shares.items()}
  if in_kernels:
    line = schedule.timeline(module, hardware, dict(mesh.shape), nodes, kernel_seconds=in_kernels)
  after = 0.0 if in_kernels else kernel_seconds
  seconds = line.seconds + after
  parts = {
    "matrix": line.matrix_seconds,
    "kernels": line.kernel_seconds + after,
    "memory": line.memory_seconds,
    "launch": line.launch_seconds,
    "communication": line.exposed_seconds,
    "host": line.host_seconds,
  }
  usable = hardware.memory * (1 - margin)
  on_cpu = mesh.devices.flat[0].platform == "cpu"  # where XLA widens whatever is sent
  travelling = [] if on_cpu else travel.float32_weights(program, line)
  buffers = memory.biggest(module)
  room = hardware.host_memory * (1 - margin)
  found = advice.Situation(job, program, held, usable, room, line, seconds, buffers, travelling)
  return {
    "fits": held.peak <= usable and held.host <= room,
    "peak_gib": held.peak / GIB,
    "memory": {f"{name}_gib": value / GIB for name, value in held._asdict().items()},
    "usable_gib": usable / GIB,
    "collectives": collective_rows(line, nodes),
    "host_copies": copy_rows(line),
    "float32_weights": None if on_cpu else travelling,
    "flops_per_step": useful,
    "hlo_matrix_flops_per_device": line.matrix_flops,
    "predicted_step_seconds": seconds,
    "predicted_mfu": analytic.mfu(useful, seconds, rate, mesh.size),
    "predicted_tokens_per_second": job.tokens / seconds,
    "seconds": parts,
    "limited_by": max(parts, key=lambda part: parts[part]),
    "exposed_share": line.exposed_seconds / seconds,
    "exposed_aim": advice.AIM,
    "kernels": {"started": line.kernels, "custom": line.custom},
    "nominal_rounds": max(
      (exchange_rounds(loop) or 0 for part, _ in module.walk() for loop in part.instructions),
      default=0,
    ),
    "unknown_loops": list(module.unknown_loops()),
    "biggest_buffers": [buffer._asdict() for buffer in buffers],
    "faults": advice.faults(found),
    "advice": advice.advice(found),
  }


_ROUNDS = re.compile(r"nominal_rounds_(\d+)\)*/while$")
"""Ends the op name of a loop over rounds of the experts' exchange (`kernels.expert_parallel`)."""


def exchange_rounds(loop: texts.Instruction) -> int | None:
  """Rounds of an exchange at an even load, of the loop that runs them; None of any other."""
  found = _ROUNDS.search(loop.op_name)
  return int(found[1]) if found else None


def kernel_shares(job: Job, config: ModelConfig, line: schedule.Timeline) -> dict[str, float]:
  """How the arithmetic that XLA does not see is shared by the parts that have custom kernels."""
  attention, experts = kernel_flops(job, config)
  kept = config.remat_policy in ("none", *_KEEPS_ATTENTION)
  work = {
    "attention": attention * (1 if kept else 4 / 3),
    "experts": experts * (1 if config.remat_policy == "none" else 4 / 3),
  }
  there = {part: work[part] for part in line.custom_bytes if work[part]}
  return {part: flops / sum(there.values()) for part, flops in there.items()}


def kernel_flops(job: Job, config: ModelConfig) -> tuple[float, float]:
  """Useful arithmetic of a step in attention and in the routed experts."""
  pairs = config.num_heads * config.head_dim * job.attended_pairs
  experts = config.num_experts_per_token * 3 * config.embed_dim * config.expert_mlp_dim
  return 12.0 * config.num_layers * pairs, 6.0 * config.num_moe_layers * experts * job.tokens


_XLA_DTYPE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def reference_bytes(job: Job, mesh: Mesh) -> int:
  """Bytes of the reference model's parameters on one device."""
  assert job.reference is not None
  shaped = dataclasses.replace(job.reference, attention="plain", grouped_matmul="dense")
  shardings = layout.param_shardings(shaped, mesh, job.rules)
  placed = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    transformer.abstract(shaped)[0],
    shardings,
  )
  return memory.tree_bytes(placed)


def hardware_flops(job: Job, program: Program) -> float:
  """What the devices compute in all: forward, backward, and forward again as far as it is."""
  config = program.config
  step = analytic.train_flops(config, tokens=job.tokens, attended_pairs=job.attended_pairs)
  if program.name == "logprobs":
    return step / 3
  attention, experts = kernel_flops(job, config)
  again = step
  if config.remat_policy == "none":
    again = 0.0
  elif config.remat_policy in _KEEPS_ATTENTION:
    again = step - attention
  elif config.remat_policy in _KEEPS_PRODUCTS:
    again = attention + experts
  return step + again / 3


def collective_rows(line: schedule.Timeline, nodes: Sequence[int]) -> list[dict[str, Any]]:
  """The collectives of a step by kind, dtype, axes and link, the longest first."""
  rows: dict[tuple[Any, ...], dict[str, Any]] = {}
  for event in line.events:
    collective = event.collective
    link = "outer" if schedule.collectives.crosses_nodes(collective, nodes) else "inner"
    key = (collective.kind, collective.dtype, collective.axes, collective.partial, link)
    row = rows.setdefault(
      key,
      {
        "kind": collective.kind,
        "dtype": collective.dtype,
        "axes": list(collective.axes),
        "partial": collective.partial,
        "estimated": collective.kind == "ragged-all-to-all",
        "link": link,
        "count": 0,
        "bytes": 0,
        "wire_bytes": 0.0,
        "seconds": 0.0,
        "exposed_seconds": 0.0,
        "in_unknown_loops": 0,
      },
    )
    row["count"] += event.times
    row["bytes"] += event.times * collective.bytes
    row["wire_bytes"] += event.times * collective.wire_bytes
    row["seconds"] += event.times * event.seconds
    row["exposed_seconds"] += event.times * event.exposed_seconds
    row["in_unknown_loops"] += event.times if event.in_unknown_loop else 0
  return sorted(rows.values(), key=lambda row: -row["seconds"])


def copy_rows(line: schedule.Timeline) -> list[dict[str, Any]]:
  """What a step moves between a device and its host, by direction."""
  rows: dict[str, dict[str, Any]] = {}
  for copied in line.copies:
    empty = {"kind": copied.copy.kind, "count": 0, "bytes": 0, "seconds": 0.0}
    row = rows.setdefault(copied.copy.kind, {**empty, "exposed_seconds": 0.0})
    row["count"] += copied.times
    row["bytes"] += copied.times * copied.copy.bytes
    row["seconds"] += copied.times * copied.seconds
    row["exposed_seconds"] += copied.times * copied.exposed_seconds
  return list(rows.values())
