"""The benchmark of shared rows: its parts are the whole's, and its figures are the definition's."""

import json

import numpy as np
import pytest

from tools.benchmarks import context_attention as benchmark


def test_ranks_gradients_add_up_to_the_whole_rows():
  row = benchmark.make_row([40, 24], (2, 1, 4), seed=0)
  expected = benchmark.gradient(1)(benchmark.part_of(row, 0, 1))
  parts = [benchmark.gradient(2)(benchmark.part_of(row, rank, 2)) for rank in range(2)]
  for i in (1, 2):  # keys and values
    total = sum(np.float64(part[i]) for part in parts)
    np.testing.assert_allclose(total, expected[i], atol=1e-5)
  queries = np.concatenate([parts[0][0][:, :16], *(parts[1][0],), parts[0][0][:, 16:]], axis=1)
  np.testing.assert_allclose(queries, expected[0], atol=1e-5)


def test_shares_and_balance_are_of_the_same_turn():
  seconds = {(1, 0): [1.0, 2.0, 4.0], (2, 0): [0.5, 1.0, 2.0], (2, 1): [0.75, 1.5, 3.0]}
  assert benchmark._figures(2, seconds, 3) == {
    "context": 2,
    "expected": 0.5,
    "share": 0.625,
    "slowest_share": 0.75,
    "balance": 1.2,
  }


def test_the_command_writes_what_it_says(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(benchmark, "COUNTS", (1, 2))
  out = tmp_path / "deep" / "figures.json"
  sizes = ["--tokens", "64", "--heads", "2", "1", "4", "--turns", "2"]
  assert benchmark.main([*sizes, "--json", str(out)]) == 0
  said = json.loads(out.read_text())
  assert [row["context"] for row in said["times"]] == [1, 2] * 3 and said["memory"] == []
  assert capsys.readouterr().out.startswith("| segments | context | expected | share |")
  with pytest.raises(SystemExit):
    benchmark.main(["--turns", "1"])
