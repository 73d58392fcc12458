"""Which layout of a job is best on so many devices: what divides and can fit, compiled, ranked.

Place in the ring: beside it, over `bounds` and `plan`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from intellect3.pipeline import placement
from intellect3.planning import bounds, plan
from intellect3.planning.hardware import GIB, MARGIN, Hardware
from intellect3.planning.job import Job
from intellect3.sharding import rules
from intellect3.sharding.mesh import AXES, make_mesh

TABLES: Mapping[str, rules.Rules] = {
  "train_fsdp": rules.TRAIN_FSDP,
  "train_fsdp_expert": rules.TRAIN_FSDP_EXPERT,
  "train_context": rules.TRAIN_CONTEXT,
}
"""Tables of layouts that are tried, as `sharding.rules` names them."""

MICRO_ROWS = (1, 2, 4)
"""Rows of a micro-batch for each of the groups that share rows."""

MOST = 12
"""Layouts that are compiled, by default."""


class Candidate(NamedTuple):
  """A job on one layout; `rules` is the name of its table."""

  job: Job
  rules: str

  @property
  def row(self) -> dict[str, Any]:
    """What a report says of it."""
    mesh, micro_rows = dict(self.job.mesh or {}), self.job.micro_rows
    return {"mesh": mesh, "rules": self.rules, "micro_rows": micro_rows}


def layouts(devices: int, axes: Sequence[str] = AXES) -> Iterator[dict[str, int]]:
  """Every way to write the number of devices as a product over the axes, outermost first."""
  divisors = [size for size in range(1, devices + 1) if devices % size == 0]
  for sizes in itertools.product(divisors, repeat=len(axes) - 1):
    whole = math.prod(sizes)
    if devices % whole == 0:
      yield dict(zip(axes, (*sizes, devices // whole), strict=True))


def candidates(job: Job, devices: int, *, node: int) -> list[Candidate]:
  """The job on every layout whose sizes divide, with each table that differs there.

  Axes that only exchange what lies in a node (`context`, `tensor`) stay inside one; experts are
  split where the model has them.

  Args:
    job: its mesh, rules and micro_rows are what is tried.
    devices: to lay it out on.
    node: devices that a fast link joins.
  """
  found = []
  for mesh in layouts(devices):
    if mesh["context"] * mesh["tensor"] > node:
      continue
    tables = ["train_fsdp"]
    if mesh["expert"] > 1:
      tables.append("train_fsdp_expert")
    if mesh["context"] > 1:
      tables.append("train_context")
    shards = math.prod(mesh[axis] for axis in placement.ROW_AXES)
    for name, rows in itertools.product(tables, MICRO_ROWS):
      micro_rows = shards * rows
      if job.rows % micro_rows == 0:
        candidate = dataclasses.replace(job, mesh=mesh, rules=TABLES[name], micro_rows=micro_rows)
        try:
          bounds.check(candidate, mesh)
        except ValueError:
          continue
        found.append(Candidate(candidate, name))
  return found


def search(
  job: Job,
  devices: Sequence[jax.Device],
  hardware: Hardware,
  *,
  program: str,
  margin: float = MARGIN,
  most: int = MOST,
  say: Callable[[str], None] = lambda line: None,
  options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Plans the candidates that can fit, the most promising first, and ranks them.

  Args:
    job, devices, hardware, margin, say, options: as `plan.plan` takes them.
    program: the one that is compiled for each.
    most: candidates to compile; the others are listed with their bounds.

  Returns:
    A report fit for JSON: that of the best one as `plan.plan` gives it, and all under `ranking`:
    those that fit first, the fastest of them first, then those not compiled (`skipped`: they hold
    more than a device at the least, or others were more promising) and those with an `error`.

  Raises:
    ValueError: no candidate divides, none can fit, or XLA does not take an option.
  """
  plan.check_options(options, devices[0])
  bound_of = bounds.maker(job, hardware)
  usable = hardware.memory * (1 - margin)
  hopeful: list[tuple[bounds.Bound, Candidate]] = []
  tried: list[dict[str, Any]] = []
  every = candidates(job, len(devices), node=hardware.node)
  say(f"{len(every)} layouts divide {len(devices)} devices; bounding them")
  for candidate in every:
    try:
      mesh = make_mesh(devices=devices, **candidate.job.axes(len(devices)))
      bound = bound_of(candidate.job, mesh)
    except ValueError as error:
      tried.append(candidate.row | {"error": " ".join(str(error).split())[:200], "fits": False})
      continue
    if bound.bytes > usable:
      row = {"skipped": "holds more at the least", "bound_gib": bound.bytes / GIB}
      tried.append(candidate.row | row | {"fits": False})
    else:
      hopeful.append((bound, candidate))
  hopeful = _by_promise(hopeful)
  say(f"{len(hopeful)} can fit; compiling {min(most, len(hopeful))}")
  best: dict[str, Any] | None = None
  for number, (bound, candidate) in enumerate(hopeful):
    least = {"bound_gib": bound.bytes / GIB, "bound_seconds": bound.seconds}
    if number >= most:
      tried.append(candidate.row | least | {"skipped": "others are more promising", "fits": False})
      continue
    split = " x ".join(f"{axis} {size}" for axis, size in candidate.row["mesh"].items() if size > 1)
    say(f"layout {number + 1}: {split}, {candidate.rules}, micro_rows {candidate.job.micro_rows}")
    try:
      report = plan.plan(
        candidate.job, devices, hardware, names=[program], margin=margin, options=options
      )
    except ValueError as error:
      tried.append(candidate.row | {"error": " ".join(str(error).split())[:200], "fits": False})
      continue
    tried.append(candidate.row | least | {key: report[key] for key in _KEYS})
    say(f"  {report['peak_gib']:.1f} GiB, {report['predicted_step_seconds']:.2f} s a step")
    if best is None or rank(report) < rank(best):
      best = report | {"rules": candidate.rules}
  if best is None:
    reasons = (row.get("error") or row.get("skipped") for row in tried)
    given = "; ".join(dict.fromkeys(str(reason) for reason in reasons)) or "no micro_rows divides"
    raise ValueError(f"search: expected a layout of {len(devices)} devices that can fit: {given}")
  return best | {"ranking": sorted(tried, key=rank)}


def _by_promise(
  found: Sequence[tuple[bounds.Bound, Candidate]],
) -> list[tuple[bounds.Bound, Candidate]]:
  """By the coarse seconds, then bytes; each mesh once before any a second time."""
  ordered = sorted(found, key=lambda pair: (round(pair[0].seconds, 3), pair[0].bytes))
  seen: dict[tuple[int, ...], int] = {}
  turns = []
  for pair in ordered:
    mesh = tuple(pair[1].row["mesh"].values())
    seen[mesh] = seen.get(mesh, 0) + 1
    turns.append(seen[mesh])
  order = sorted(range(len(ordered)), key=lambda place: (turns[place], place))
  return [ordered[place] for place in order]


_KEYS = (
  *("fits", "peak_gib", "predicted_step_seconds", "predicted_mfu", "limited_by", "exposed_share"),
  *("faults", "unknown_loops"),
)


def rank(report: Mapping[str, Any]) -> tuple[Any, ...]:
  """What sorts reports: those without faults first, then by time; not compiled and errors last."""
  return (
    "error" in report,
    "skipped" in report,
    not report["fits"],
    bool(report.get("faults")),
    report.get("predicted_step_seconds", report.get("bound_seconds", report.get("bound_gib", 0.0))),
  )
