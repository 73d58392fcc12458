"""The planner's command line: for GPUs that are not here, for fake CPU devices, and refused."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.kernels import deviceless
from tools import plan_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = ROOT / "experiments" / "configs" / "runs"
KEYS = {
  *("target", "devices", "mesh", "fits", "peak_gib", "memory", "collectives", "flops_per_step"),
  *("predicted_step_seconds", "predicted_mfu", "compile_seconds"),
}
NO_WEIGHTS = """from __gin__ import dynamic_registration
include '{runs}/demo.gin'
from intellect3.models import presets
MODEL = @presets.tiny_qwen3()
rl.run.model_path = 'models/nowhere'
trainer.trainer.model_options = {{'dtype': 'bfloat16'}}
"""

DEVICELESS = """
import contextlib, io, json, sys
from tools import plan_run
out = io.StringIO()
with contextlib.redirect_stdout(out):
  code = plan_run.main({arguments!r})
print(json.dumps({{"code": code, "text": out.getvalue(), "report": json.load(open({json!r}))}}))
"""


@pytest.fixture
def run_file(tmp_path):
  """The demo, with a model that is on no disk."""
  file = tmp_path / "run.gin"
  file.write_text(NO_WEIGHTS.format(runs=RUNS))
  return str(file)


def test_a_run_on_eight_h200s_is_planned_without_one(run_file, tmp_path):
  out = str(tmp_path / "plan.json")
  arguments = ["--gin", run_file, "--devices", "8", "--json", out, "--programs", "logprobs"]
  told = deviceless.run(DEVICELESS.format(arguments=arguments, json=out))
  report = told["report"]
  assert told["code"] == 0 and set(report) >= KEYS
  assert (report["target"], report["devices"]) == ("h200", 8)
  assert report["device_kind"] == "NVIDIA H200"
  assert report["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
  assert report["fits"] and report["peak_gib"] < 1 and report["predicted_step_seconds"] > 0
  assert report["collectives"] and all(row["axes"] == ["fsdp"] for row in report["collectives"])
  assert "8 x h200 (NVIDIA H200), fsdp 8" in told["text"] and "fits" in told["text"]


def planned(*arguments):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [sys.executable, "-m", "tools.plan_run", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )


def test_fake_cpu_devices_are_used_when_asked_for(run_file, tmp_path):
  """And, their memory being set to 1 MB, the exit code says that it does not fit."""
  constants = (ROOT / "intellect3" / "planning" / "hardware.toml").read_text()
  file = tmp_path / "small.toml"
  file.write_text(constants.replace("memory = 17179869184", "memory = 1000000"))
  out = tmp_path / "plan.json"
  result = planned(
    *("--gin", run_file, "--allow-cpu", "--devices", "4", "--programs", "logprobs"),
    *("--hardware", str(file), "--json", str(out), "--rows", "16"),
  )
  assert result.returncode == 1, result.stderr
  report = json.loads(out.read_text())
  assert (report["target"], report["devices"], report["fits"]) == ("cpu", 4, False)
  assert report["rows"] == 16
  assert "DOES NOT FIT" in result.stdout and "are not the target's" in result.stdout


@pytest.mark.parametrize(
  ("bindings", "message"),
  [
    (["rl.run.model_path='nowhere'"], "model_path: expected a directory with config.json, or"),
    (["trainer.trainer.micro_row=1"], "micro_row"),
    (["trainer.trainer.mesh={'model': 2}"], "mesh: expected axes of"),
  ],
)
def test_what_cannot_be_planned_is_refused(bindings, message, capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  more = [part for binding in bindings for part in ("--set", binding)]
  given = ["--gin", str(RUNS / "demo.gin"), "--allow-cpu", "--set", "rl.run.model_path='nowhere'"]
  if "model_path" not in bindings[0]:
    given = ["--gin", str(RUNS / "qwen3_0_6b_1xh100.gin"), "--allow-cpu"]
  assert plan_run.main([*given, *more]) == 2
  told = capsys.readouterr().err.strip().splitlines()[-1]
  assert told.startswith("error: ") and message in told


@pytest.mark.parametrize("name", ["qwen3_0_6b_1xh100", "qwen3_30b_a3b_8xh100"])
def test_the_run_files_that_are_planned_say_what_they_are(name):
  text = (RUNS / f"{name}.gin").read_text()
  assert text.startswith("# Purpose:  ")
  assert all(f"# {word}:" in text for word in ("Cost", "Result", "Command"))
  assert f"python -m tools.plan_run --gin experiments/configs/runs/{name}.gin" in text
