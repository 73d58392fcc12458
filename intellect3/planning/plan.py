"""A plan: a job's programs compiled for devices that need not exist, and what they will take.

Place in the ring: beside it; `tools.plan_run` prints it.

    job -> programs (lowered, compiled) -> memory, collectives, schedule -> does it fit, how long
"""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from intellect3.models import transformer
from intellect3.planning import hlo as texts
from intellect3.planning import memory, programs, schedule
from intellect3.planning.hardware import Hardware
from intellect3.planning.job import Job
from intellect3.planning.programs import Program
from intellect3.sharding.mesh import make_mesh
from intellect3.training import flops as analytic
from intellect3.training import layout

GIB = 2**30
MARGIN = 0.08
"""Share of the card that a plan leaves free: the CUDA context, NCCL's buffers, fragmentation."""

_RECOMPUTES = ("full", "dots", "dots_no_batch", "attention")
"""Remat policies under which the backward pass runs attention's or the experts' forward again."""


def plan(
  job: Job,
  devices: Sequence[jax.Device],
  hardware: Hardware,
  *,
  names: Sequence[str] | None = None,
  margin: float = MARGIN,
  say: Callable[[str], None] = lambda line: None,
  hlo: pathlib.Path | None = None,
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

  Returns:
    A report fit for JSON: of the first program `peak_gib`, `memory`, `collectives`,
    `flops_per_step`, `predicted_step_seconds`, `predicted_mfu`; of all of them `fits`, `advice`,
    `faults`, `compile_seconds`, and each one's own under `programs`.

  Raises:
    ValueError: the job does not fit the mesh.
  """
  mesh = make_mesh(devices=devices, **job.axes(len(devices)))
  reports = {}
  for name in names or programs.names_of(job):
    say(f"{name}: tracing")
    began = time.monotonic()
    program = programs.make(job, name, mesh)
    lowered = program.lower()
    say(f"{name}: compiling ({time.monotonic() - began:.1f} s to trace)")
    began = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - began
    say(f"{name}: compiled in {seconds:.1f} s")
    if hlo is not None:
      hlo.mkdir(parents=True, exist_ok=True)
      (hlo / f"{name}.hlo").write_text(str(compiled.as_text()))
    reports[name] = report(job, program, compiled, hardware, margin=margin)
    reports[name]["compile_seconds"] = seconds
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
    "margin": margin,
    "hardware": dataclasses.asdict(hardware),
    "programs": reports,
  }


_FIRST = (
  *("peak_gib", "memory", "collectives", "flops_per_step", "predicted_step_seconds"),
  *("predicted_mfu", "limited_by", "exposed_share"),
)


def report(
  job: Job, program: Program, compiled: Any, hardware: Hardware, *, margin: float = MARGIN
) -> dict[str, Any]:
  """What one compiled program takes; see `plan`."""
  module = texts.parse(compiled.as_text())
  mesh, config = program.mesh, program.config
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
  seconds = line.seconds + kernel_seconds
  parts = {
    "matrix": line.matrix_seconds,
    "kernels": kernel_seconds,
    "memory": line.memory_seconds,
    "launch": line.launch_seconds,
    "communication": line.exposed_seconds,
  }
  usable = hardware.memory * (1 - margin)
  on_cpu = mesh.devices.flat[0].platform == "cpu"  # where XLA widens whatever is sent
  travelling = [] if on_cpu else float32_weights(program, line)
  faults = [*_memory_faults(held, usable), *_weight_faults(travelling)]
  return {
    "fits": held.peak <= usable,
    "peak_gib": held.peak / GIB,
    "memory": {f"{name}_gib": value / GIB for name, value in held._asdict().items()},
    "usable_gib": usable / GIB,
    "collectives": collective_rows(line, nodes),
    "float32_weights": travelling,
    "flops_per_step": useful,
    "hlo_matrix_flops_per_device": line.matrix_flops,
    "predicted_step_seconds": seconds,
    "predicted_mfu": analytic.mfu(useful, seconds, rate, mesh.size),
    "predicted_tokens_per_second": job.tokens / seconds,
    "seconds": parts,
    "limited_by": max(parts, key=lambda part: parts[part]),
    "exposed_share": line.exposed_seconds / seconds,
    "kernels": {"started": line.kernels, "custom": line.custom},
    "unknown_loops": list(module.unknown_loops()),
    "biggest_buffers": [buffer._asdict() for buffer in memory.biggest(module)],
    "faults": faults,
    "advice": advice(job, program, held, usable, line, travelling, seconds),
  }


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
  """What the devices compute in all, recomputation included: forward, again, and backward."""
  step = analytic.train_flops(program.config, tokens=job.tokens, attended_pairs=job.attended_pairs)
  if program.name == "logprobs":
    return step / 3
  return step * (4 / 3 if program.config.remat_policy in _RECOMPUTES else 1)


def collective_rows(line: schedule.Timeline, nodes: Sequence[int]) -> list[dict[str, Any]]:
  """The collectives of a step by kind, dtype, axes and link, the longest first."""
  rows: dict[tuple[Any, ...], dict[str, Any]] = {}
  for event in line.events:
    collective = event.collective
    link = "outer" if schedule.collectives.crosses_nodes(collective, nodes) else "inner"
    key = (collective.kind, collective.dtype, collective.axes, link)
    row = rows.setdefault(
      key,
      {
        "kind": collective.kind,
        "dtype": collective.dtype,
        "axes": list(collective.axes),
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


def float32_weights(program: Program, line: schedule.Timeline) -> list[dict[str, Any]]:
  """The float32 weights that a step gathers, where the model computes in less.

  A gathered array is taken for a weight that is sharded over an axis of the gather and has its
  dimensions, whole or one layer of a stack, in any order, neighbours merged or not.
  """
  if program.config.dtype == "float32":
    return []
  params = program.first.params if hasattr(program.first, "params") else program.first
  weights: list[tuple[str, tuple[int, ...], set[str]]] = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if leaf.ndim < 2 or "router" in name:
      continue  # the router computes in float32
    axes = set(jax.tree.leaves(tuple(leaf.sharding.spec)))
    for dims in (leaf.shape, leaf.shape[1:]) if "layers" in name else (leaf.shape,):
      if len(dims) > 1:
        weights.append((name, dims, axes))
  found: dict[str, dict[str, Any]] = {}
  for event in line.events:
    if event.collective.kind != "all-gather":
      continue
    for array in event.collective.arrays:
      names = [
        name
        for name, dims, axes in weights
        if array.dtype == "f32" and axes & set(event.collective.axes) and merges(dims, array.dims)
      ]
      if names:
        weight = " or ".join(dict.fromkeys(names))
        row = found.setdefault(weight, {"weight": weight, "count": 0, "bytes": 0})
        row["count"] += event.times
        row["bytes"] += event.times * array.bytes
  return list(found.values())


def merges(dims: Sequence[int], into: Sequence[int]) -> bool:
  """Whether dimensions, in any order and multiplied together at will, are those of `into`."""
  left = sorted((size for size in dims if size > 1), reverse=True)
  wanted = sorted((size for size in into if size > 1), reverse=True)
  if not left:
    return not wanted
  first, rest = left[0], left[1:]
  return any(
    size % first == 0 and merges(rest, [*wanted[:i], size // first, *wanted[i + 1 :]])
    for i, size in enumerate(wanted)
  )


def _memory_faults(held: memory.Memory, usable: float) -> list[str]:
  if held.peak <= usable:
    return []
  return [f"peak {held.peak / GIB:.1f} GiB: more than the {usable / GIB:.1f} GiB that are usable"]


def _weight_faults(travelling: Sequence[Mapping[str, Any]]) -> list[str]:
  return [
    f"float32 weight {row['weight']} is gathered {row['count']} times, {row['bytes'] / GIB:.2f} GiB"
    for row in travelling
  ]


def advice(
  job: Job,
  program: Program,
  held: memory.Memory,
  usable: float,
  line: schedule.Timeline,
  travelling: Sequence[Any],
  seconds: float,
) -> list[str]:
  """What to change, where something does not fit or stands still."""
  lines = []
  shards = program.mesh.size
  if held.peak > usable:
    state = held.parameters + held.optimizer + held.reference
    if state > usable / 2:
      lines.append(
        f"parameters and optimizer state take {state / GIB:.1f} GiB a device: more devices on "
        f"fsdp (now {program.mesh.shape['fsdp']}), or an optimizer with less state (muon)"
      )
    if held.activations > held.peak / 8 and program.config.remat_policy != "full":
      lines.append(
        f"activations take {held.activations / GIB:.1f} GiB: model_options remat_policy 'full' "
        f"(now {program.config.remat_policy!r})"
      )
    if job.micro_rows > shards:
      lines.append(
        f"temporaries take {held.temporaries / GIB:.1f} GiB: micro_rows {shards} (now "
        f"{job.micro_rows})"
      )
    elif held.temporaries > held.peak / 3:
      lines.append(
        f"temporaries take {held.temporaries / GIB:.1f} GiB: shorter rows (row_length, now "
        f"{job.row_length}), a smaller head_chunk_size (now {job.head_chunk_size}), another layout "
        "or kernel where the biggest buffers are written"
      )
  hidden = sum(event.in_unknown_loop for event in line.events)
  if hidden:
    lines.append(
      f"{hidden} collectives stand in loops whose trip count XLA does not know: they send more "
      "than is counted here"
    )
  if travelling:
    lines.append("cast parameters to the computation's dtype before they are gathered")
  slow = line.exposed_seconds / seconds
  if slow > 0.05:
    worst = max(line.events, key=lambda event: event.times * event.exposed_seconds)
    where = re.sub(r"jit\(\w+\)/|closed_call/|body/|while/", "", worst.source)
    lines.append(
      f"the step waits for collectives {slow:.0%} of its time (aim: 5%), most for "
      f"{worst.collective.kind} {worst.collective.dtype} over {'+'.join(worst.collective.axes)}"
      f"{f' of {where}' if where else ''}"
    )
  return lines
