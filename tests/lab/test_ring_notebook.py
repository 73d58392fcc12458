"""The ring's notebook runs, at a small size, and shows what it says it shows."""

import base64
import pathlib

import nbformat
import pytest

from intellect3.lab import ring
from tests.lab import ring_house
from tools import notebooks

NOTEBOOK = pathlib.Path(__file__).resolve().parents[2] / "notebooks" / "off_policy_ring.ipynb"


def execute(parameters):
  """The notebook's cells after a run with other parameters."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  notebooks.execute(notebook, parameters)
  return notebook.cells


def shown(cells, kind):
  return [
    output["data"][kind]
    for cell in cells
    for output in cell.get("outputs", ())
    if kind in output.get("data", {})
  ]


def test_a_recorded_sweep_is_drawn_and_tabled(tmp_path):
  cells = execute(ring_house.record(tmp_path))
  pictures = [base64.b64decode(picture) for picture in shown(cells, "image/png")]
  assert len(pictures) == 4 and all(len(picture) > 10_000 for picture in pictures)
  final, masked, seen = shown(cells, "text/markdown")
  assert "| reinforce | 0.91 ± 0.13 | 0.71 ± 0.13 |" in final.splitlines()
  assert masked.startswith("| masked share \\ staleness |")
  assert "| clipped | 0.0 ± 0.0 | 2.0 ± 0.0 |" in seen.splitlines() and "Failed: none" in seen


def test_its_own_parameters_are_the_sweeps(tmp_path):
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
  parameters: dict = {}
  exec(cell.source, parameters)
  assert tuple(parameters["losses"]) == ring.LOSSES and tuple(parameters["lags"]) == ring.LAGS
  assert tuple(parameters["seeds"]) == ring.SEEDS and parameters["steps"] == ring.STEPS


@pytest.mark.slow
def test_it_makes_real_runs(tmp_path):
  parameters = {
    "directory": str(tmp_path / "sweep"),
    "losses": ["masked_importance"],
    "lags": [0, 1],
    "seeds": [0],
    "steps": 3,
  }
  cells = execute(parameters)
  assert len(shown(cells, "image/png")) == 4
  (seen,) = [text for text in shown(cells, "text/markdown") if "staleness seen" in text]
  assert "| masked_importance | 0.0 | 1.0 |" in seen.splitlines() and "Failed: none" in seen
