"""Which layout of a job is best on so many devices: all that divide, compiled and ranked.

Place in the ring: beside it, over `plan`. Today's training layouts are `data` x `fsdp`; an axis
joins `AXES` when the rules and the model know it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from intellect3.pipeline import placement
from intellect3.planning import plan
from intellect3.planning.hardware import Hardware
from intellect3.planning.job import Job
from intellect3.sharding.mesh import make_mesh

AXES = ("data", "fsdp")
"""Mesh axes over which layouts are tried; the other axes stay as the job has them."""

MICRO_ROWS = (1, 2, 4)
"""Rows of a micro-batch on each device."""


def layouts(devices: int, axes: Sequence[str] = AXES) -> Iterator[dict[str, int]]:
  """Every way to write the number of devices as a product over the axes, outermost first."""
  divisors = [size for size in range(1, devices + 1) if devices % size == 0]
  for sizes in itertools.product(divisors, repeat=len(axes) - 1):
    rest, remainder = devices, 0
    for size in sizes:
      rest, remainder = rest // size, remainder + rest % size
    if rest and not remainder:
      yield dict(zip(axes, (*sizes, rest), strict=True))


def candidates(job: Job, devices: int) -> list[Job]:
  """The job on every layout, with each number of rows in a micro-batch that divides its batch."""
  fixed = {axis: size for axis, size in (job.mesh or {}).items() if axis not in AXES}
  free = devices
  for size in fixed.values():
    free //= size
  found = []
  for mesh in layouts(free):
    axes = {**mesh, **fixed}
    shards = 1
    for axis in placement.ROW_AXES:
      shards *= axes.get(axis, 1)
    for rows in MICRO_ROWS:
      micro_rows = shards * rows
      if job.rows % micro_rows == 0:
        found.append(dataclasses.replace(job, mesh=axes, micro_rows=micro_rows))
  return found


def search(
  job: Job,
  devices: Sequence[jax.Device],
  hardware: Hardware,
  *,
  program: str,
  margin: float = plan.MARGIN,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Plans every candidate's program and ranks them.

  Args:
    job, devices, hardware, margin, say: as `plan.plan` takes them.
    program: the one that is compiled for each.

  Returns:
    A report fit for JSON: that of the best one as `plan.plan` gives it, and all under `ranking`:
    those that fit first, the fastest of them first; one that does not divide has an `error`.

  Raises:
    ValueError: no candidate divides.
  """
  tried = []
  best: dict[str, Any] | None = None
  jobs = candidates(job, len(devices))
  for number, candidate in enumerate(jobs, start=1):
    say(f"layout {number} of {len(jobs)}: {candidate.mesh}, micro_rows {candidate.micro_rows}")
    row: dict[str, Any] = {"mesh": candidate.mesh, "micro_rows": candidate.micro_rows}
    try:
      make_mesh(devices=devices, **candidate.axes(len(devices)))
      report = plan.plan(candidate, devices, hardware, names=[program], margin=margin)
    except ValueError as error:
      tried.append(row | {"error": str(error).splitlines()[0], "fits": False})
      continue
    row |= {key: report[key] for key in _KEYS}
    tried.append(row)
    say(f"  {report['peak_gib']:.1f} GiB, {report['predicted_step_seconds']:.2f} s a step")
    if best is None or rank(report) < rank(best):
      best = report
  if best is None:
    reasons = "; ".join(dict.fromkeys(row["error"] for row in tried)) or "no micro_rows divides"
    raise ValueError(f"search: expected a layout that divides {len(devices)} devices: {reasons}")
  return best | {"ranking": sorted(tried, key=rank)}


_KEYS = ("fits", "peak_gib", "predicted_step_seconds", "predicted_mfu", "limited_by", "faults")


def rank(report: Mapping[str, Any]) -> tuple[Any, ...]:
  """What sorts reports: those without faults first, then by time; errors last."""
  failed = "error" in report
  return (
    failed,
    not report["fits"],
    bool(report.get("faults")),
    report.get("predicted_step_seconds", 0.0),
  )
