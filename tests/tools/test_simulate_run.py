"""The command: a run file and a scenario in, a table, a report and a trace out; without jax."""

import ast
import json
import os
import pathlib
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = "experiments/configs/runs"
DEMO = f"{RUNS}/demo.gin"
SCENARIO = """
name = "two servers"
[servers]
count = 2
max_running = 128
decode_batch = [1, 128]
decode_tokens_per_second = [100, 4000]
prefill_tokens_per_second = 5000
[trainer]
fixed_seconds = 0.3
[sync]
load_seconds = 0.05
spread_seconds = 0.1
[environments.default]
prompt_tokens = 12
lengths = { median = 6, sigma = 0.4, task_share = 0.5 }
"""


# Runs the command once for each line of arguments; says at its end whether jax was loaded.
CALLS = """
import json, sys
from tools import simulate_run
for arguments in json.loads(sys.argv[1]):
  code = simulate_run.main(arguments)
  print("code", code, flush=True)
  print("code", code, file=sys.stderr, flush=True)
print("jax", sys.modules.get("jax") is not None, "jaxlib" in sys.modules)
"""


def simulate(tmp_path, *calls, hash_seed="0"):
  """Several calls in one process of their own: (scenario, arguments) each."""
  lines = []
  for number, (scenario, arguments) in enumerate(calls):
    path = tmp_path / f"scenario_{hash_seed}_{number}.toml"
    path.write_text(scenario)
    lines.append(["--gin", DEMO, "--scenario", str(path), *map(str, arguments)])
  return called(lines, hash_seed)


def called(lines, hash_seed="0"):
  """Calls with these arguments, in one process of their own."""
  done = subprocess.run(
    [sys.executable, "-c", CALLS, json.dumps(lines)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "PYTHONHASHSEED": hash_seed},
  )
  assert done.returncode == 0, done.stderr
  return done


def test_the_same_bytes_in_every_process_and_no_jax(tmp_path):
  traces, reports = [], []
  for hash_seed in ("1", "2"):
    trace, report = tmp_path / f"trace_{hash_seed}", tmp_path / f"report_{hash_seed}"
    arguments = ("--steps", 5, "--seed", 3, "--trace", trace, "--json", report)
    done = simulate(tmp_path, (SCENARIO, arguments), hash_seed=hash_seed)
    assert done.stdout.splitlines()[-2:] == ["code 0", "jax False False"]
    traces.append(trace.read_bytes())
    reports.append(json.loads(report.read_text()))
  assert traces[0] == traces[1] and traces[0].count(b"\n") > 1000
  assert [report.pop("host")["wall_seconds"] > 0 for report in reports] == [True, True]
  assert reports[0] == reports[1]
  assert (reports[0]["steps"], reports[0]["seed"]) == (5, 3)
  assert "trainer idle" in done.stdout and "trained 1,280" in done.stdout
  assert "batch 5 of 5" in done.stderr


def test_what_cannot_run_is_one_line_and_an_exit_code(tmp_path):
  cases = [
    ([], SCENARIO.replace("count = 2", "count = 0"), "servers.count: expected"),
    ([], SCENARIO.replace("= 12", "= 40"), "environments.reverse_text: expected prompt_tokens"),
    (["--steps", "0"], SCENARIO, "steps: expected an integer >= 1, got 0"),
    (["--sample-seconds", "0"], SCENARIO, "sample_seconds: expected at least 0.001, got 0"),
    (["--json", "/no such/x.json"], SCENARIO, "--json: expected a file in a directory that exists"),
    (["--plot", "/no such/x.png"], SCENARIO, "--plot: expected a file in a directory that exists"),
    (["--trace", "/no such/x"], SCENARIO, "--trace: expected a file in a directory that exists"),
    (["--plot", "x.xyz"], SCENARIO, "--plot: expected a name in one of ('.png', '.pdf', '.svg')"),
    (["--set", "rl.run.max_off_policy=3"], SCENARIO, "max_off_policy"),
    (["--set", "orchestrator.orchestrator.sync_mode='hurry'"], SCENARIO, "sync_mode: expected one"),
  ]
  failing = SCENARIO.replace("[environments.default]", "[environments.default]\nerror_rate = 1.0")
  small = [
    *("--set", "orchestrator.orchestrator.evaluation_tasks=0"),
    *("--set", "orchestrator.orchestrator.prompts_per_step=1"),
    *("--set", "orchestrator.orchestrator.max_rollouts_in_flight=8"),
    *("--set", "orchestrator.orchestrator.max_groups_in_vain=30"),
  ]
  calls = [(scenario, arguments) for arguments, scenario, _ in cases]
  done = simulate(tmp_path, *calls, (failing, small))
  lines = done.stderr.splitlines()
  assert lines[1 : 2 * len(cases) : 2] == ["code 2"] * len(cases)
  for line, (_, _, message) in zip(lines[: 2 * len(cases) : 2], cases, strict=True):
    assert line.startswith("error: ") and message in line
  # One that never trains is ended, and says why.
  assert lines[-1] == "code 1"
  assert "the run ends: NothingToTrain: 30 groups ended since the last batch" in lines[-2]
  assert "errored 240 (Simulated 240)" in lines[-2]


def test_without_a_scenario_it_is_assumed_told_and_written(tmp_path):
  out = tmp_path / "assumed.toml"
  gin = ["--gin", f"{RUNS}/qwen3_30b_a3b_8xh100.gin", "--steps", "2"]
  lines = [
    [*gin, "--target", "h100", "--write-scenario", str(out)],
    [*gin, "--scenario", str(out)],
    [*gin, "--target", "h900"],
    [*gin, "--scenario", str(out), "--target", "h100"],
    [*gin, "--write-scenario", str(tmp_path / "x.json")],
    [*gin, "--set", "MODEL=3"],
    ["--gin", DEMO],
    [*gin, "--set", "trainer.trainer.model_options={'dtype': 'int8'}"],
  ]
  done = called(lines)
  printed = done.stdout.split("code 0\n")
  assert printed[0].startswith("assumed, no scenario given:\nname = ")
  assert out.read_text().strip() in printed[0]
  for line in (
    "count = 12  # assumed: 3 devices for each that trains, as INTELLECT-3",
    "devices = 8  # run file",
    "maximum = 8000  # run file (max_tokens, max_new_tokens)",
  ):
    assert line in printed[0].splitlines()
  table = [text[text.index("scenario  ") : text.index("simulated in")] for text in printed[:2]]
  assert table[0] == table[1]  # what was written gives the same
  told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  for line, message in zip(
    told,
    (
      "target: expected one of ('h100', ",
      "--target: expected only where no --scenario is given",
      "--write-scenario: expected a name in .toml",
      "rl.run.model_path: expected a directory with config.json, or the macro MODEL",
      "trainer.trainer.mesh: expected the trainer's devices, such as {'fsdp': 8}",
      "trainer.trainer.model_options.dtype: expected one of ['bfloat16'",
    ),
    strict=True,
  ):
    assert message in line
  assert done.stdout.splitlines()[-1] == "jax False False"


def test_the_servers_options_of_the_run_file_are_taken():
  launch = ["--gin", "experiments/launch/sglang.gin", "--set", "tensor_parallel=4"]
  urls = "rl.run.server_urls=['http://a:1', 'http://b:1']"
  gin = ["--gin", f"{RUNS}/qwen3_30b_a3b_8xh100.gin", *launch, "--set", urls, "--steps", "1"]
  lines = called([gin]).stdout.splitlines()
  assert {"count = 2  # run file", "devices = 4  # run file"} <= set(lines)


# Runs the command, and says what is written at the axes of what it draws.
DRAWN = """
import sys
from intellect3.simulation import plots
from tools import simulate_run
timeline = plots.timeline
def told(*arguments, **options):
  figure = timeline(*arguments, **options)
  figure.canvas.draw()
  for axes in figure.axes:
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    print("axes", repr((axes.get_ylabel(), axes.get_xlabel(), ticks)))
    legend = axes.get_legend()
    above = bool(legend.get_window_extent().y0 >= axes.get_window_extent().y1)
    print("legend", repr((above, [text.get_text() for text in legend.get_texts()])))
  return figure
plots.timeline = told
sys.exit(simulate_run.main(sys.argv[1:]))
"""


def test_a_plot_is_a_picture_with_labels(tmp_path):
  (tmp_path / "scenario.toml").write_text(SCENARIO)
  out = tmp_path / "run.png"
  arguments = ["--gin", DEMO, "--scenario", str(tmp_path / "scenario.toml"), "--steps", "4"]
  done = subprocess.run(
    [sys.executable, "-c", DRAWN, *arguments, "--plot", str(out), "--sample-seconds", "0.05"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  picture = out.read_bytes()
  assert picture.startswith(b"\x89PNG") and 20_000 < len(picture) < 1_000_000
  width, height = struct.unpack(">II", picture[16:24])
  assert 1000 <= width <= 3000 and 600 <= height <= 2000
  lines = done.stdout.splitlines()
  axes = [ast.literal_eval(line[5:]) for line in lines if line.startswith("axes ")]
  assert len(axes) == 3
  assert axes[0][2] == ["servers", "trainer"]
  assert [label for label, _, _ in axes[1:]] == ["rollouts", "running, by server"]
  assert axes[2][1].startswith("minutes since the end of step ")
  legends = [ast.literal_eval(line[7:]) for line in lines if line.startswith("legend ")]
  assert [len(texts) for _, texts in legends] == [4, 2, 2] and all(
    all(texts) for _, texts in legends
  )
  assert [above for above, _ in legends[1:]] == [True, True]  # no line is hidden
