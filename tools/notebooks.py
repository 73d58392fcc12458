"""Executes notebooks and writes them as HTML: `make notebooks`.

    python -m tools.notebooks --out build/notebooks NOTEBOOK.ipynb .. [--set NAME=JSON ..]

A notebook's cell tagged `parameters` holds its full size; `--set` gives other values, in a cell of
their own below it. Cells run in the current directory. The notebook itself is not changed. A cell
that raises ends the command with its traceback; the other notebooks are not run.
"""

import argparse
import ast
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import nbclient
import nbconvert
import nbformat
import traitlets.config


def execute(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
  """Runs all cells in place, outputs and all, in a kernel of this interpreter.

  Args:
    notebook: with one code cell tagged `parameters`.
    parameters: values that replace those of that cell, by name.

  Raises:
    ValueError: where the notebook has no such cell, or the cell does not set a given name.
    nbclient.exceptions.CellExecutionError: where a cell raises.
  """
  places = [
    index
    for index, cell in enumerate(notebook.cells)
    if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ())
  ]
  if len(places) != 1:
    raise ValueError(f"notebook: expected one cell tagged 'parameters', got {len(places)}")
  known = _assigned(notebook.cells[places[0]].source)
  for name in parameters:
    if name not in known:
      raise ValueError(f"parameters: expected names that the notebook sets, got {name!r}")
  if parameters:
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(source))
  config = traitlets.config.Config()
  config.KernelManager.transport = "ipc"
  resources = {"metadata": {"path": str(pathlib.Path.cwd())}}
  nbclient.NotebookClient(notebook, timeout=None, resources=resources, config=config).execute()


def render(notebook: nbformat.NotebookNode, title: str) -> str:
  """The notebook as one HTML page, pictures inside."""
  exporter = nbconvert.HTMLExporter()
  return exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})[0]


def _assigned(source: str) -> set[str]:
  nodes = ast.walk(ast.parse(source))
  return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def main(arguments: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 1 where a cell raised."""
  parser = argparse.ArgumentParser(description="Executes notebooks and writes them as HTML.")
  parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
  parser.add_argument("--out", required=True, type=pathlib.Path, help="a directory")
  parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", dest="sets")
  flags = parser.parse_args(arguments)
  pairs = (item.partition("=") for item in flags.sets)
  parameters = {name: json.loads(value) for name, _, value in pairs}
  flags.out.mkdir(parents=True, exist_ok=True)
  for path in flags.notebooks:
    begin = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    try:
      execute(notebook, parameters)
    except nbclient.exceptions.CellExecutionError as error:
      print(f"{path}: {error}", file=sys.stderr)
      return 1
    out = flags.out / f"{path.stem}.html"
    out.write_text(render(notebook, path.stem), encoding="utf-8")
    print(f"{path}: {time.monotonic() - begin:.0f} s, {out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
