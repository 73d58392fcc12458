"""docs/algorithms.md names what there is, all of it, with options that it has."""

import inspect
import pathlib
import re

import pytest

from intellect3.losses import advantages, aggregation, components, kl, policy_gradient, supervised

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "algorithms.md").read_text()
NAME = re.compile(r"`([^`$]+)`")


def rows():
  """The tables' rows, as lists of cells; `|` stands in no cell."""
  lines = [line for line in TEXT.splitlines() if line.startswith("|") and "---" not in line]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def functions(module):
  """The public functions that a module, or a package, defines."""
  return {
    name: value
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__.startswith(module.__name__) and name[0] != "_"
  }


def test_every_loss_and_advantage_has_its_row():
  named = {name for row in rows() for name in NAME.findall(row[0])}
  losses = functions(policy_gradient)
  assert len(losses) >= 8 and set(losses) <= named
  assert set(functions(advantages)) <= named
  assert {"token_mean", "sequence_mean", "constant"} <= set(functions(aggregation)) & named
  estimators = {f"kl.{name}" for name in functions(kl)}
  assert estimators >= {"kl.k1", "kl.k3", "kl.penalty_loss"} and estimators <= named
  assert "components.weighted_sum_loss" in named and callable(components.weighted_sum_loss)
  assert "supervised.negative_log_likelihood" in named and callable(
    supervised.negative_log_likelihood
  )


def test_the_options_in_a_first_cell_are_the_functions_own():
  seen = 0
  for row in rows():
    first, *options = NAME.findall(row[0]) or [""]
    function = functions(policy_gradient).get(first)
    if function is not None and options:
      seen += len(options)
      assert set(options) <= set(inspect.signature(function).parameters), first
  assert seen >= 10


def test_tables_are_whole_and_not_too_wide_to_read():
  widths = [len(line) for line in TEXT.splitlines()]
  assert max(widths) <= 400
  separators = [line for line in TEXT.splitlines() if line.startswith("|---")]
  columns = iter(line.count("|") for line in separators)
  current = None
  for line in TEXT.splitlines():
    if line.startswith(("| ours", "| project")):
      current = next(columns)
    if line.startswith("|"):
      assert line.count("|") == current, line


LINKS = sorted(set(re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", TEXT)))


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
  assert (ROOT / "docs" / link).exists()
