"""The tables of docs/scaling.md, out of what `tools.plan_run --json` wrote.

    python -m tools.plan_run --gin FILE --json build/plans/NAME.json
    python -m tools.plan_tables build/plans/*.json [--into docs/scaling.md]

Prints Markdown; with --into it replaces what stands between the page's lines
`<!-- plans -->` and `<!-- /plans -->`. The order is that of the files.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from intellect3.planning import table

BEGIN, END = "<!-- plans -->", "<!-- /plans -->"


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.plan_tables", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("plans", nargs="+", type=pathlib.Path)
  parser.add_argument("--into", type=pathlib.Path, help="a page with the two marks")
  arguments = parser.parse_args(argv)
  try:
    text = tables([json.loads(path.read_text(encoding="utf-8")) for path in arguments.plans])
    if arguments.into is None:
      print(text)
    else:
      page = arguments.into.read_text(encoding="utf-8")
      arguments.into.write_text(replaced(page, text), encoding="utf-8")
  except (OSError, KeyError, ValueError) as error:
    print(
      f"error: {error!r}" if isinstance(error, KeyError) else f"error: {error}", file=sys.stderr
    )
    return 2
  return 0


def replaced(page: str, text: str) -> str:
  """The page with the text between its marks.

  Raises:
    ValueError: a page without both marks, once each and in order.
  """
  if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
    raise ValueError(f"page: expected the lines {BEGIN} and {END} once each, in this order")
  head, rest = page.split(BEGIN)
  return f"{head}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"


def tables(reports: Sequence[Mapping[str, Any]]) -> str:
  """What each plan found, what each sends, and the commands, as Markdown."""
  plans = [row for report in reports for row in _plans(report)]
  sent = [row for report in reports for row in _sent(report)]
  return "\n".join(
    [
      "Per device; times and MFU are predictions:",
      "",
      *_markdown(_PLANS, plans),
      "",
      "What the first program of each sends and copies in a step, the longest first:",
      "",
      *_markdown(_SENT, sent),
      "",
      "```bash",
      *(_command(report) for report in reports),
      "```",
      "",
    ]
  )


_PLANS = (
  *("run file, devices, layout", "program", "peak GiB (usable)", "parameters + optimizer"),
  *("activations", "on the host", "step s", "tokens/s", "MFU", "waits for collectives"),
  *("compile s, GiB",),
)
_SENT = ("run file", "what", "over", "link", "GB", "seconds", "of them exposed")


def _plans(report: Mapping[str, Any]) -> list[list[str]]:
  layout = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
  rows = f"{report['rows']:,} x {report['row_length']:,}"
  head = f"`{_name(report)}`, {report['devices']} {report['target'].upper()}, "
  head += f"{layout or 'one device'}, {rows}"
  found = []
  for number, (name, one) in enumerate(report["programs"].items()):
    memory = one["memory"]
    lower = table.lower_bound(one)
    peak = f"{one['peak_gib']:.1f}" if one["fits"] else f"**{one['peak_gib']:.1f}**"
    found.append(
      [
        "" if number else head,
        name,
        peak if number else f"{peak} ({one['usable_gib']:.1f})",
        f"{memory['parameters_gib'] + memory['optimizer_gib']:.1f}",
        f"{memory['activations_gib']:.1f}",
        f"{memory['host_gib']:.1f}",
        f"{one['predicted_step_seconds']:,.1f}{lower}",
        f"{one['predicted_tokens_per_second']:,.0f}",
        f"{one['predicted_mfu']:.1%}",
        f"{one['exposed_share']:.1%}",
        f"{one['compile_seconds']:.0f}"
        + ("" if number else f", {report['compile_peak_rss_gib']:.1f}"),
      ]
    )
  return found


def _sent(report: Mapping[str, Any]) -> list[list[str]]:
  first = next(iter(report["programs"].values()))
  rows = [
    [
      f"{row['kind']} {row['dtype']}",
      "+".join(row["axes"]) + (" (part)" if row["partial"] else ""),
      row["link"],
      ("<= " if row["estimated"] else "") + f"{row['bytes'] / 1e9:,.1f}",
      f"{row['seconds']:.2f}",
      f"{row['exposed_seconds']:.2f}",
    ]
    for row in first["collectives"][:6]
  ] + [
    [
      f"{row['kind']} copies",
      "",
      "host",
      f"{row['bytes'] / 1e9:,.1f}",
      f"{row['seconds']:.2f}",
      f"{row['exposed_seconds']:.2f}",
    ]
    for row in first["host_copies"]
  ]
  return [[f"`{_name(report)}`" if not number else "", *row] for number, row in enumerate(rows)]


def _name(report: Mapping[str, Any]) -> str:
  return pathlib.Path(report["gin"][0]).stem


def _command(report: Mapping[str, Any]) -> str:
  parts = ["python -m tools.plan_run", *(f"--gin {file}" for file in report["gin"])]
  parts += [f"--target {report['target']}", f"--devices {report['devices']}"]
  parts += [
    f"--rows {report['rows']}",
    f"--programs {','.join(report['programs'])}",
    *(f'--set "{binding}"' for binding in report["bindings"]),
  ]
  parts += [f"--xla {name}={value}" for name, value in report["xla_options"].items()]
  return " ".join(parts)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [header, ["---"] * len(header), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
  sys.exit(main())
