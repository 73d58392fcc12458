"""What is wrong with a plan, and what to change: faults and advice in a line each.

Place in the ring: beside it; `plan` takes them into its report.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from intellect3.planning import schedule
from intellect3.planning.hardware import GIB
from intellect3.planning.job import Job
from intellect3.planning.memory import Buffer, Memory
from intellect3.planning.programs import Program
from intellect3.training.state import TrainState

AIM = 0.05
"""Share of a step that may be waiting for collectives."""

_OFFLOADS = ("offload", "offload_attention")


class Situation(NamedTuple):
  """What advice is given on.

  Attributes:
    job: the run's parameters.
    program: what was compiled.
    held: its memory.
    usable: bytes of a device.
    host_usable: bytes of the host's memory, for each device.
    line: its schedule.
    seconds: of a step.
    buffers: the biggest, by size.
    travelling: of `travel.float32_weights`.
  """

  job: Job
  program: Program
  held: Memory
  usable: float
  host_usable: float
  line: schedule.Timeline
  seconds: float
  buffers: Sequence[Buffer]
  travelling: Sequence[Mapping[str, Any]]


def faults(found: Situation) -> list[str]:
  """Why a plan has exit code 1; empty where it fits and no weight travels in float32."""
  lines = []
  held = found.held
  if held.peak > found.usable:
    lines.append(
      f"peak {held.peak / GIB:.1f} GiB: more than the {found.usable / GIB:.1f} GiB that are usable"
    )
  if held.host > found.host_usable:
    lines.append(
      f"host {held.host / GIB:.1f} GiB a device: more than the {found.host_usable / GIB:.1f} GiB "
      "that its host has for it"
    )
  return lines + [
    f"float32 weight {row['weight']} travels {row['count']} times, {row['bytes'] / GIB:.2f} GiB"
    for row in found.travelling
  ]


def advice(found: Situation) -> list[str]:
  """What to change, where something does not fit or stands still; the most helpful first."""
  lines = []
  if found.held.peak > found.usable:
    lines += _memory(found)
  if found.held.host > found.host_usable:
    lines.append("less on the host: remat_policy 'full', or a larger context")
  hidden = sum(event.in_unknown_loop for event in found.line.events)
  if hidden:
    lines.append(
      f"{hidden} collectives stand in loops whose trip count the data decides: one turn of each is "
      "counted"
    )
  if found.travelling:
    lines.append("cast parameters to the computation's dtype before they travel")
  return lines + _waits(found)


def _memory(found: Situation) -> list[str]:
  """Knobs with what they free, of those that are not turned yet."""
  job, held, mesh = found.job, found.held, found.program.mesh
  config = found.program.config
  over = held.peak - found.usable
  lines = [f"{over / GIB:.1f} GiB a device too much; each of these frees what it says:"]
  shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
  rows = job.micro_rows // shards
  if rows > 1:
    saved = held.temporaries * (rows - 1) / rows
    lines.append(f"micro_rows {shards} (now {job.micro_rows}): up to {saved / GIB:.1f} GiB")
  if config.remat_policy in ("none", "dots", "dots_no_batch", "attention"):
    lines.append(
      f"model_options remat_policy 'full' (now {config.remat_policy!r}): of the "
      f"{held.activations / GIB:.1f} GiB of activations all but the layers' inputs"
    )
  elif config.remat_policy not in _OFFLOADS and held.activations > over / 8:
    lines.append(
      f"model_options remat_policy 'offload' (now {config.remat_policy!r}): "
      f"{held.activations / GIB:.1f} GiB of the layers' inputs go to the host"
    )
  momentum = _float32_momentum(found.program)
  if momentum > over / 8:
    lines.append(
      f"the optimizer's moments in bfloat16 (optimizer.muon.momentum_dtype): "
      f"{momentum / 2 / GIB:.1f} GiB"
    )
  context = mesh.shape["context"]
  if job.row_length % (4 * context) == 0:
    lines.append(
      f"context {2 * context} (now {context}): about half of the activations and of what layers "
      f"hold, up to {held.temporaries / 2 / GIB:.1f} GiB; the batch's rows are then shared by "
      "twice as many devices"
    )
  expert = mesh.shape["expert"]
  if config.num_moe_layers and config.num_experts % (2 * expert) == 0:
    layer = 3 * config.num_experts // expert * config.embed_dim * config.expert_mlp_dim * 2
    lines.append(
      f"expert {2 * expert} (now {expert}): half of a layer's gathered experts and of their "
      f"gradient, {layer / GIB:.1f} GiB"
    )
  state = held.parameters + held.optimizer + held.reference
  if state > found.usable / 3:
    lines.append(
      f"more devices on fsdp (now {mesh.shape['fsdp']}): parameters and optimizer state take "
      f"{state / GIB:.1f} GiB"
    )
  return lines + _places(found)


def _places(found: Situation) -> list[str]:
  """The knob of the file where the biggest buffers are written."""
  knobs = {
    "expert_parallel": f"expert_receive_rows (now {found.program.config.expert_receive_rows})",
    "losses/logprobs": f"head_chunk_size (now {found.job.head_chunk_size})",
    "kernels/attention": f"row_length (now {found.job.row_length}) or context",
    "training/muon": "optimizer.muon.newton_schulz_dtype 'bfloat16'",
    "models/moe": "expert, or another model_options grouped_matmul",
    "grouped_matmul": "expert, or another model_options grouped_matmul",
  }
  lines: dict[str, str] = {}
  for buffer in found.buffers[:6]:
    for part, knob in knobs.items():
      if part in buffer.source and buffer.bytes > found.held.peak / 20:
        lines.setdefault(
          knob, f"smaller {knob}: {buffer.array}, {buffer.bytes / GIB:.1f} GiB, {buffer.source}"
        )
  return list(lines.values())


def _float32_momentum(program: Program) -> int:
  """Bytes of the optimizer's float32 moments on one device."""
  if not isinstance(program.first, TrainState):
    return 0
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4
    for leaf in jax.tree.leaves(program.first.opt_state)
    if leaf.dtype == np.float32 and leaf.ndim > 1
  )


def _waits(found: Situation) -> list[str]:
  lines = []
  slow = found.line.exposed_seconds / found.seconds
  if slow > AIM:
    worst = max(found.line.events, key=lambda event: event.times * event.exposed_seconds)
    where = re.sub(r"jit\(\w+\)/|closed_call/|body/|while/", "", worst.source)
    lines.append(
      f"the step waits for collectives {slow:.0%} of its time (aim: {AIM:.0%}), most for "
      f"{worst.collective.kind} {worst.collective.dtype} over {'+'.join(worst.collective.axes)}"
      f"{f' of {where}' if where else ''}"
    )
  bus = found.line.host_seconds / found.seconds
  if bus > AIM:
    lines.append(
      f"the step waits for copies to and from the host {bus:.0%} of its time: remat_policy 'full' "
      "recomputes instead"
    )
  return lines
