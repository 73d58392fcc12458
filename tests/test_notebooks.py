"""Notebooks are thin, stripped, and run: `make notebooks` at full size, here at a small one."""

import base64
import pathlib

import nbformat
import pytest

from tools import notebooks

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALL = sorted((ROOT / "notebooks").glob("*.ipynb"))
BANDIT = ROOT / "notebooks" / "off_policy_bandit.ipynb"
SMALL = {
  "seeds": 2,
  "steps": 10,
  "stalenesses": [0, 2],
  "rates": [0.3],
  "rate_staleness": 2,
  "outlier_shares": [0.0, 0.2],
  "versions": [3],
  "shape": {"prompts": 2, "vocabulary": 2, "length": 3, "features": 3},
  "losses": ["masked_importance", "trajectory ratio (reference)"],
}
MAX_LINES = 25


def read(path: pathlib.Path) -> nbformat.NotebookNode:
  return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
  outputs = [output for cell in code(notebook) for output in cell.outputs]
  return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def make(*cells: tuple[str, list[str]]) -> nbformat.NotebookNode:
  notebook = nbformat.v4.new_notebook()
  for source, tags in cells:
    notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
  return notebook


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_stripped_and_thin(path):
  notebook = read(path)
  nbformat.validate(notebook)
  assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
  assert sum("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells) == 1
  for cell in code(notebook):
    assert not cell.outputs and cell.execution_count is None, cell.source
    assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
    assert "def " not in cell.source and "class " not in cell.source, cell.source


def test_there_are_notebooks():
  assert BANDIT in ALL


def test_the_bandit_notebook_runs():
  notebook = read(BANDIT)
  notebooks.execute(notebook, SMALL)
  pictures = [base64.b64decode(picture) for picture in shown(notebook, "image/png")]
  assert len(pictures) == 11 and all(len(picture) > 8000 for picture in pictures)
  facts, bias, finals, average, last, by_rate, failed, _ = shown(notebook, "text/markdown")
  assert facts == "2 problems, each of 2 prompts, 16 trajectories of 3 tokens, 6 weights"
  rows = finals.splitlines()
  assert rows[0] == "| final return \\ staleness | 0 | 2 |" and len(rows) == 4
  # On-policy nothing is biased, and the reference never is.
  assert bias.splitlines()[2].startswith("| masked_importance | 0.00 ± 0.00 |")
  assert bias.splitlines()[3] == "| trajectory ratio (reference) | 0.00 ± 0.00 | 0.00 ± 0.00 |"
  for told in (average, last):
    (row,) = told.splitlines()[2:]  # the baseline is not held against itself
    assert row.startswith("| trajectory ratio (reference) | 0.000 ± 0.000 |")
  assert by_rate.splitlines()[0] == "| return at staleness 2 \\ rate | 0.3 |"
  assert failed.splitlines()[0] == "| failed seeds \\ staleness | 0 | 2 |"
  assert BANDIT.stem in (page := notebooks.render(notebook, BANDIT.stem)) and "<img" in page


def test_parameters_are_replaced_and_the_rest_runs():
  notebook = make(("size = 1\nname = 'full'", ["parameters"]), ("print(size, name)", []))
  notebooks.execute(notebook, {"size": 7})
  assert notebook.cells[-1].outputs[0].text == "7 full\n"


@pytest.mark.parametrize(
  ("notebook", "message"),
  [
    (make(("size = 1", [])), "expected one cell tagged 'parameters', got 0"),
    (make(("other_size = 1", ["parameters"])), "expected names that the notebook sets, got 'size'"),
  ],
)
def test_parameters_that_cannot_be_set_raise(notebook, message):
  with pytest.raises(ValueError, match=message):
    notebooks.execute(notebook, {"size": 7})


def test_the_command_writes_pages_and_stops_where_a_cell_raises(tmp_path, capsys):
  for name, last in (("good", "size"), ("bad", "1 / (size - 5)")):
    nbformat.write(make(("size = 1", ["parameters"]), (last, [])), tmp_path / f"{name}.ipynb")
  files = [str(tmp_path / f"{name}.ipynb") for name in ("good", "bad")]
  result = notebooks.main(["--out", str(tmp_path / "out"), *files, "--set", "size=5"])
  told = capsys.readouterr()
  assert result == 1 and "ZeroDivisionError" in told.err
  assert "good.html" in told.out and "bad" not in told.out
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.html"]
  assert not any(cell.outputs for cell in code(read(tmp_path / "good.ipynb")))
