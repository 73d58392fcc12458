"""The sweeps' command on a cluster of a few servers, and a scenario's rates from a roofline."""

import json

import pytest

from intellect3.simulation import scenario_file
from tools import decode_rates, simulate_sweep

SCENARIO = """
name = "small"
[servers]
count = 6
devices = 2
max_running = 64
decode_batch = [1, 64]
decode_tokens_per_second = [50.0, 1600.0]
prefill_tokens_per_second = 1e5
[sync]
load_seconds = 0.1
[trainer]
seconds_per_token = 2e-4
devices = 4
[environments.default]
prompt_tokens = 5
[environments.default.lengths]
median = 6
sigma = 0.5
"""
SMALL = (
  "orchestrator.orchestrator.prompts_per_step = 4",
  "orchestrator.orchestrator.rollouts_per_prompt = 4",
  "orchestrator.orchestrator.max_rollouts_in_flight = 64",
  "rl.run.num_workers = 2",
)


@pytest.fixture
def options(tmp_path):
  (tmp_path / "small.toml").write_text(SCENARIO)
  bindings = [word for binding in SMALL for word in ("--set", binding)]
  return [
    *("--gin", "experiments/configs/runs/demo.gin", *bindings),
    *("--scenario", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")),
    *("--steps", "6", "--warm-up", "2", "--mark", "small"),
  ]


def test_tables_and_pictures_are_of_the_whole_cluster(options, tmp_path):
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- small -->\nold\n<!-- /small -->\nafter\n")
  chosen = ["--only", "split,in_flight", "--shrink", "2", "--into", str(page), "--nodes", "16"]
  assert simulate_sweep.main([*options, *chosen]) == 0
  text = page.read_text()
  assert text.startswith("before\n<!-- small -->") and text.endswith("<!-- /small -->\nafter\n")
  assert "\nold\n" not in text
  # 16 nodes of which the trainer has two; half of them are simulated.
  labels = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
  assert "2 : 14" in labels and "4 : 12" in labels and "32 in flight" in labels
  split = json.loads((tmp_path / "out" / "split.json").read_text())
  assert split["servers"] == 14 and split["shrink"] == 2 and split["chosen"] == 1
  assert {row["label"] for row in split["rows"]} >= {"1 : 7", "2 : 6"}
  for name in ("split", "in_flight"):
    assert (tmp_path / "out" / f"small_{name}.png").stat().st_size > 10_000


def test_a_page_has_sweeps_of_one_cluster(options, tmp_path, capsys):
  page = tmp_path / "page.md"
  page.write_text("<!-- small -->\n<!-- /small -->\n")
  assert simulate_sweep.main([*options, "--only", "updates"]) == 0
  other = ["--only", "in_flight", "--into", str(page), "--steps", "2"]
  assert simulate_sweep.main([*options, *other]) == 2
  assert "updates.json to have steps 2, as the sweeps wanted now, got 6" in capsys.readouterr().err
  assert page.read_text() == "<!-- small -->\n<!-- /small -->\n"


def test_a_run_that_does_not_end_is_told_and_left_out(options, tmp_path, capsys):
  text = SCENARIO.replace("[environments.default]", "[environments.default]\nerror_rate = 1.0")
  (tmp_path / "small.toml").write_text(text)
  assert simulate_sweep.main([*options, "--only", "updates"]) == 1
  told = [line for line in capsys.readouterr().err.splitlines() if "the run ends: " in line]
  assert len(told) == 3 and "drop, at most 0" in told[2]


def test_a_timeline_is_drawn_of_late_steps(options, tmp_path):
  assert simulate_sweep.main([*options, "--only", "timeline"]) == 0
  assert (tmp_path / "out" / "small_timeline.png").stat().st_size > 10_000
  whole = json.loads((tmp_path / "out" / "whole.json").read_text())
  assert (whole["steps"], whole["warm_up_steps"]) == (14, 8)  # the demo's bound is 2


@pytest.mark.parametrize(
  "wrong, message",
  [
    (["--only", "size"], "--only: expected some of ['split'"),
    (["--only", "split", "--shrink", "5"], "factor: expected a divisor of prompts_per_step (4)"),
    (["--only", "split", "--nodes", "2"], "--nodes: expected more than 2, the trainer's, got 2"),
    (["--only", "updates", "--steps", "0"], "--steps: expected more, got 0"),
    (["--only", ""], "--only: expected some of ['split'"),
    (["--only", "split", "--into", "missing.md"], "missing.md"),
  ],
)
def test_what_cannot_be_swept_is_refused(options, wrong, message, capsys):
  assert simulate_sweep.main([*options, *wrong]) == 2
  assert message in capsys.readouterr().err


def test_the_rooflines_lines_are_a_scenarios_servers(tmp_path, capsys):
  arguments = ["--model", "glm_4_5_air", "--target", "h200", "--devices", "8"]
  assert decode_rates.main(arguments) == 0
  rest = SCENARIO.split("prefill_tokens_per_second = 1e5")[1]
  text = f'name = "x"\n[servers]\ncount = 1\nmax_running = 9\n{capsys.readouterr().out}{rest}'
  (tmp_path / "x.toml").write_text(text)
  servers = scenario_file.load(tmp_path / "x.toml").servers
  assert servers.devices == 8 and servers.cache_tokens > 4_000_000
  shipped = scenario_file.load("experiments/configs/scenarios/intellect3_44x8h200.toml").servers
  assert servers.decode_tokens_per_second == shipped.decode_tokens_per_second
  assert servers.cache_tokens == shipped.cache_tokens


def test_a_model_that_is_not_known_or_does_not_fit_is_refused(capsys):
  assert decode_rates.main(["--model", "gpt", "--devices", "8"]) == 2
  assert "--model: expected one of" in capsys.readouterr().err
  assert decode_rates.main(["--model", "glm_4_5_air", "--devices", "1"]) == 2
  assert "devices: expected enough for 212 GB of weights, got 1" in capsys.readouterr().err
