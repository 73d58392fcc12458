"""The scaling page's tables out of plans."""

import copy
import json

import pytest

from tools import plan_tables

ROW = {
  "kind": "all-gather",
  "dtype": "bf16",
  "axes": ["fsdp", "expert"],
  "partial": False,
  "estimated": False,
  "link": "outer",
  "bytes": 2.5e9,
  "seconds": 0.5,
  "exposed_seconds": 0.125,
}
PROGRAM = {
  "peak_gib": 60.26,
  "usable_gib": 129.7,
  "fits": True,
  "memory": {
    "parameters_gib": 3.0,
    "optimizer_gib": 1.5,
    "activations_gib": 7.04,
    "host_gib": 0.0,
  },
  "predicted_step_seconds": 1234.56,
  "predicted_tokens_per_second": 98765.4,
  "predicted_mfu": 0.256,
  "exposed_share": 0.031,
  "compile_seconds": 71.2,
  "unknown_loops": [],
  "collectives": [ROW],
  "host_copies": [{"kind": "d2h", "bytes": 1e9, "seconds": 0.25, "exposed_seconds": 0.0}],
}
REPORT = {
  "gin": ["experiments/configs/runs/some.gin"],
  "bindings": ["a.b=1"],
  "target": "h200",
  "devices": 16,
  "mesh": {"data": 1, "fsdp": 2, "expert": 8, "context": 1, "tensor": 1},
  "rows": 1024,
  "row_length": 65536,
  "compile_peak_rss_gib": 2.94,
  "xla_options": {},
  "programs": {"rl_step": PROGRAM, "logprobs": {**PROGRAM, "unknown_loops": ["while"]}},
}


def test_a_plan_is_a_row_for_each_program():
  lines = plan_tables.tables([REPORT]).splitlines()
  assert lines[4] == (
    "| `some`, 16 H200, fsdp 2 x expert 8, 1,024 x 65,536 | rl_step | 60.3 (129.7) | 4.5 | 7.0 "
    "| 0.0 | 1,234.6 | 98,765 | 25.6% | 3.1% | 71, 2.9 |"
  )
  assert lines[5].startswith("|  | logprobs | 60.3 | 4.5 |") and "| 1,234.6+ |" in lines[5]
  assert "| `some` | all-gather bf16 | fsdp+expert | outer | 2.5 | 0.50 | 0.12 |" in lines
  assert "|  | d2h copies |  | host | 1.0 | 0.25 | 0.00 |" in lines
  assert lines[-2] == (
    "python -m tools.plan_run --gin experiments/configs/runs/some.gin --target h200 --devices 16 "
    '--rows 1024 --programs rl_step,logprobs --set "a.b=1"'
  )


def test_what_does_not_fit_stands_out():
  report = copy.deepcopy(REPORT)
  report["programs"]["rl_step"]["fits"] = False
  assert "| **60.3** (129.7) |" in plan_tables.tables([report])


def test_a_page_keeps_what_is_around_its_marks(tmp_path, capsys):
  page, plan = tmp_path / "page.md", tmp_path / "plan.json"
  plan.write_text(json.dumps(REPORT))
  page.write_text(f"before\n{plan_tables.BEGIN}\nold\n{plan_tables.END}\nafter\n")
  for _ in range(2):  # twice is once
    assert plan_tables.main([str(plan), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{plan_tables.END}\nafter\n")
    assert "old" not in text and text.count("`some`, 16 H200") == 1
  page.write_text("no marks")
  assert plan_tables.main([str(plan), "--into", str(page)]) == 2
  assert "page: expected the lines" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[1", '{"mesh": {}}'])
def test_what_is_no_plan_is_refused(text, tmp_path, capsys):
  plan = tmp_path / "plan.json"
  plan.write_text(text)
  assert plan_tables.main([str(plan)]) == 2
  assert capsys.readouterr().err.startswith("error: ")
