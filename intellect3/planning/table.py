"""A plan as text: what a person reads before renting machines.

Place in the ring: beside it; takes the reports of `plan.plan` and `search.search`.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from intellect3.planning.hardware import GIB

CPU_NOTE = (
  "Compiled for fake CPU devices: parameters, optimizer state and batch are exact, and so are the "
  "kinds and axes of collectives that the layout asks for. Temporaries, the peak, dtypes of "
  "collectives (XLA's CPU widens bfloat16), kernels, overlap and every time are not the target's; "
  "float32 weights are not looked for, so no fault does not say that none travels."
)


def table(report: Mapping[str, Any]) -> str:
  """A whole plan."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
  lines = [
    f"{report['devices']} x {report['target']} ({report['device_kind']}), {mesh or 'one device'}: "
    f"{report['rows']} rows of {report['row_length']} tokens a step, "
    f"{report['micro_rows']} at once",
  ]
  if report["target"] == "cpu":
    lines += ["", CPU_NOTE]
  for name, one in report["programs"].items():
    lines += ["", *_program(name, one)]
  lines += [
    "",
    f"compiled in {report['compile_seconds']:.0f} s at {report['compile_peak_rss_gib']:.1f} GiB",
    "fits" if report["fits"] else "DOES NOT FIT",
  ]
  lines += [f"fault: {fault}" for fault in report["faults"]]
  lines += [f"advice: {line}" for line in report["advice"]]
  return "\n".join(lines)


def lower_bound(one: Mapping[str, Any]) -> str:
  """What stands behind a program's times and counts: + where loops count once that turn oftener."""
  return "+" if one["unknown_loops"] else ""


def ranking(report: Mapping[str, Any]) -> str:
  """The compiled layouts of a search, the best first, how many others, and the plan of the best."""
  rows = [_ranked(row) for row in report["ranking"] if "peak_gib" in row]
  header = (
    *("layout", "rules", "micro rows", "peak GiB", "fits", "seconds", "MFU", "waits", "limited by"),
  )
  lines = _columns(header, rows)
  skipped = collections.Counter(row["skipped"] for row in report["ranking"] if "skipped" in row)
  lines += [f"{count} layouts not compiled: {reason}" for reason, count in skipped.items()]
  errors = [row["error"] for row in report["ranking"] if "error" in row]
  if errors:
    lines.append(f"{len(errors)} layouts refused, the first: {errors[0]}")
  return "\n".join([*lines, "", "The best:", "", table(report)])


def _ranked(row: Mapping[str, Any]) -> tuple[str, ...]:
  layout = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
  return (
    *(layout or "one device", row["rules"], str(row["micro_rows"])),
    f"{row['peak_gib']:.1f}",
    "yes" if row["fits"] else "no",
    f"{row['predicted_step_seconds']:.2f}{lower_bound(row)}",
    f"{row['predicted_mfu']:.1%}",
    f"{row['exposed_share']:.0%}",
    row["limited_by"],
  )


def _program(name: str, one: Mapping[str, Any]) -> list[str]:
  memory, seconds = one["memory"], one["seconds"]
  lines = [
    f"{name}: {one['predicted_step_seconds']:.3f}{lower_bound(one)} s, "
    f"{one['predicted_tokens_per_second']:,.0f} tokens/s, MFU {one['predicted_mfu']:.1%}, "
    f"limited by {one['limited_by']}; compiled in {one['compile_seconds']:.0f} s",
    "  seconds: " + ", ".join(f"{part} {value:.3f}" for part, value in seconds.items()),
    f"  waits for collectives {one['exposed_share']:.1%} of the step (aim: at most "
    f"{one['exposed_aim']:.0%})",
    f"  arithmetic: {one['flops_per_step']:.3e} FLOP a step",
    f"  memory per device: {held(memory)}; {one['usable_gib']:.1f} GiB are usable",
  ]
  if one["biggest_buffers"]:
    rows: list[tuple[str, ...]] = [
      (f"{buffer['bytes'] / GIB:.2f}", buffer["array"], buffer["source"])
      for buffer in one["biggest_buffers"][:6]
    ]
    lines += _indent(_columns(("GiB", "biggest buffers", "written at"), rows))
  if one["collectives"]:
    rows = [_collective(row) for row in one["collectives"]]
    header = (
      *("collective", "dtype", "axes", "link", "count", "GB a step", "seconds", "overlapped"),
      "exposed",
    )
    lines += _indent(_columns(header, rows))
  if one["host_copies"]:
    lines += _indent(host_lines(one["host_copies"]))
  if one["nominal_rounds"]:
    lines.append(
      f"  tokens travel to their experts in {one['nominal_rounds']} rounds, those of an even load"
    )
  if one["unknown_loops"]:
    lines.append(
      f"  {len(one['unknown_loops'])} loops have a trip count that XLA does not know; what is in "
      "them counts once: times with a + are lower bounds; arithmetic is the analytic count's"
    )
  return lines


def held(memory: Mapping[str, float]) -> str:
  """A device's memory as a sum, its parts in brackets: GiB; what is 0 is left out."""
  parts = {
    "arguments": ("parameters", "optimizer", "batch"),
    "outputs": (),
    "temporaries": ("activations",),
    "reference": (),
  }

  def told(name: str, inside: Sequence[str] = ()) -> str:
    inner = ", ".join(told(one) for one in inside if memory[f"{one}_gib"] >= 0.005)
    return f"{name} {memory[f'{name}_gib']:.2f}" + (f" (of it {inner})" if inner else "")

  terms = [told(name, inside) for name, inside in parts.items() if memory[f"{name}_gib"] >= 0.005]
  whole = f"peak {memory['peak_gib']:.2f} GiB"
  whole += f" = {' + '.join(terms)}" if terms else ""
  return whole + (f"; on its host {memory['host_gib']:.2f}" if memory["host_gib"] >= 0.005 else "")


def host_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """What moves between the device and its host, under a header."""
  header = ("to or from the host", "count", "GB a step", "seconds", "overlapped", "exposed")
  cells = [
    (row["kind"], str(row["count"]), f"{row['bytes'] / 1e9:.3f}", *_times(row)) for row in rows
  ]
  return _columns(header, cells)


def _collective(row: Mapping[str, Any]) -> tuple[str, ...]:
  return (
    row["kind"],
    row["dtype"],
    ("+".join(row["axes"]) or "none") + (" (part)" if row["partial"] else ""),
    row["link"],
    f"{row['count']}{'+' if row['in_unknown_loops'] else ''}",
    f"{'<= ' if row['estimated'] else ''}{row['bytes'] / 1e9:.3f}",
    *_times(row),
  )


def _times(row: Mapping[str, Any]) -> tuple[str, str, str]:
  seconds, exposed = row["seconds"], row["exposed_seconds"]
  return f"{seconds:.4f}", f"{max(0.0, seconds - exposed):.4f}", f"{exposed:.4f}"


def _indent(lines: Iterable[str]) -> list[str]:
  return [f"  {line}" for line in lines]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in (header, *rows)
  ]
