"""The planner's command line: for GPUs that are not here, for fake CPU devices, and refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import gin
import jax
import pytest

from experiments import gin_config
from intellect3 import rl, sft
from intellect3.models import hf, presets, transformer
from intellect3.sharding import rules
from tests.kernels import deviceless
from tools import plan_job, plan_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = ROOT / "experiments" / "configs" / "runs"
KEYS = {
  *("target", "devices", "mesh", "fits", "peak_gib", "memory", "collectives", "flops_per_step"),
  *("predicted_step_seconds", "predicted_mfu", "compile_seconds"),
}
NO_WEIGHTS = """from __gin__ import dynamic_registration
include '{runs}/demo.gin'
from intellect3.models import presets
MODEL = @presets.{model}()
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
  file.write_text(NO_WEIGHTS.format(runs=RUNS, model="tiny_qwen3"))
  return str(file)


@pytest.fixture
def expert_file(tmp_path):
  """The demo with experts."""
  file = tmp_path / "experts.gin"
  file.write_text(NO_WEIGHTS.format(runs=RUNS, model="tiny"))
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
  """And, their memory being set to 100 kB, the exit code says that it does not fit."""
  constants = (ROOT / "intellect3" / "planning" / "hardware.toml").read_text()
  file = tmp_path / "small.toml"
  file.write_text(constants.replace("memory = 17179869184", "memory = 100000"))
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


@pytest.mark.parametrize("exchange", ["ragged", pytest.param("padded", marks=pytest.mark.slow)])
def test_a_run_on_512_h200s_is_planned(exchange, expert_file, tmp_path):
  """64 nodes of 8: weights cast and gathered between nodes, tokens exchanged inside them in as many
  rounds as an even load needs: 64 tokens a device, two experts each, 32 pairs at a time."""
  out = str(tmp_path / "plan.json")
  model = {"dtype": "bfloat16", "expert_exchange": exchange, "expert_receive_rows": 32}
  sizes = {
    "mesh": {"fsdp": 64, "expert": 8},
    "micro_rows": 512,
    "row_counts": (512, 1024),
    "model_options": model,
  }
  bindings = [f"--set=trainer.trainer.{name}={value!r}" for name, value in sizes.items()]
  arguments = ["--gin", expert_file, "--json", out, "--programs", "rl_step", *bindings]
  report = deviceless.run(DEVICELESS.format(arguments=arguments, json=out))["report"]
  assert (report["devices"], report["rows"], report["fits"]) == (512, 512, True)
  assert report["mesh"] == {"data": 1, "fsdp": 64, "expert": 8, "context": 1, "tensor": 1}
  assert not any(row["partial"] for row in report["collectives"])
  links = {tuple(row["axes"]): row["link"] for row in report["collectives"]}
  assert links[("expert",)] == "inner" and links[("fsdp",)] == "outer"
  assert report["programs"]["rl_step"]["nominal_rounds"] == 4
  kind = "ragged-all-to-all" if exchange == "ragged" else "all-to-all"
  sent = [row for row in report["collectives"] if row["kind"] == kind and row["axes"] == ["expert"]]
  # Forward there and back; backward there twice and back once; rows of 64 in bfloat16.
  rows = next(row for row in sent if row["dtype"] == "bf16")
  assert rows["count"] == 4 * 5 and rows["bytes"] == 4 * 5 * 32 * 64 * 2
  # No weight travels in float32, none along `expert`.
  assert report["faults"] == []
  gathered = [row for row in report["collectives"] if row["kind"] == "all-gather"]
  assert {row["dtype"] for row in gathered if "fsdp" in row["axes"]} == {"bf16"}
  assert {row["dtype"] for row in gathered if row["axes"] == ["expert"]} <= {"s32", "u32"}


BUILD = """
import sys
from experiments import gin_config
text = gin_config.read([sys.argv[1]], [])
gin_config.parse(text, without_jax=True)
"""
RUN_FILES = ("qwen3_0_6b_1xh100", "qwen3_30b_a3b_8xh100", "intellect3_rl_512xh200")
SFT_FILES = ("intellect3_sft1_512xh200", "intellect3_sft2_512xh200")


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_planned_run_file_builds_every_role(name, tmp_path):
  """With a model in the place of the one that is not here; and it is read without jax."""
  config = presets.tiny()
  hf.save(tmp_path / "model", config, transformer.init(config, jax.random.key(0)))
  path = RUNS / f"{name}.gin"
  model = f"rl.run.model_path={str(tmp_path / 'model')!r}"
  # The devices here are not those of the file's mesh, and a run on too few is refused.
  text = gin_config.read([str(path)], [model, "trainer.trainer.mesh=None"])
  gin_config.parse(text, without_jax=False)
  run = str(tmp_path / "run")
  assert callable(gin_config.call(rl.run, run_dir=run, role="all", config_text=text))
  subprocess.run([sys.executable, "-c", BUILD, str(path)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
  ("name", "model", "rows", "axes", "table"),
  [
    (RUN_FILES[0], presets.qwen3_0_6b(), 64, {"fsdp": 1}, rules.TRAIN_FSDP),
    (RUN_FILES[1], presets.qwen3_30b_a3b(), 128, None, None),
    (
      *(RUN_FILES[2], presets.glm_4_5_air(), 4096),
      *({"fsdp": 16, "expert": 8}, rules.TRAIN_FSDP_EXPERT),
    ),
    (
      *(SFT_FILES[0], presets.glm_4_5_air(), 1024),
      *({"fsdp": 64, "expert": 8}, rules.TRAIN_FSDP_EXPERT),
    ),
    (SFT_FILES[1], presets.glm_4_5_air(), 512, None, rules.TRAIN_CONTEXT),
  ],
)
def test_a_planned_run_file_is_of_its_model(name, model, rows, axes, table):
  kind, job = plan_job.read(gin_config.read([str(RUNS / f"{name}.gin")], []))
  assert (kind, job.rows) == ("sft" if name in SFT_FILES else "rl", rows)
  options = {"remat_policy": job.model.remat_policy}
  assert job.model == dataclasses.replace(model, **options) and job.model.dtype == "bfloat16"
  assert (
    axes is None
    or {axis: size for axis, size in job.mesh.items() if size > 1 or len(job.mesh) == 1} == axes
  )
  assert table is None or job.rules == table


def test_the_run_of_intellect3_is_its_recipe():
  """Table 1 of docs/design/0001's source: prompts, lengths, loss, optimizer and staleness."""
  gin_config.parse(gin_config.read([str(RUNS / f"{RUN_FILES[2]}.gin")], []), without_jax=False)
  for parameter, value in (
    ("orchestrator.orchestrator.prompts_per_step", 256),
    ("orchestrator.orchestrator.rollouts_per_prompt", 16),
    ("orchestrator.orchestrator.staleness_rule", "drop"),
    ("rl.run.max_off_policy_steps", 8),
    ("worker.worker.max_tokens", 65536),
    ("policy_gradient.masked_importance_loss.ratio_low", 0.5),
    ("policy_gradient.masked_importance_loss.ratio_high", 5.0),
    ("policy_gradient.masked_importance_loss.sequence_ratio_min", 1e-5),
  ):
    assert gin.query_parameter(parameter) == value, parameter
  _, job = plan_job.read(gin_config.read([str(RUNS / f"{RUN_FILES[2]}.gin")], []))
  assert float(job.optimizer.learning_rate(0)) == pytest.approx(1e-6)


@pytest.mark.parametrize(
  ("name", "rates"),
  [
    (SFT_FILES[0], {0: 1e-8 + (5e-5 - 1e-8) / 300, 299: 5e-5, 1000: 5e-5}),
    (SFT_FILES[1], {0: 5e-8, 400: 2.5e-8, 800: 0.0}),
  ],
)
def test_the_stages_of_fine_tuning_have_their_rates(name, rates):
  _, job = plan_job.read(gin_config.read([str(RUNS / f"{name}.gin")], []))
  for step, rate in rates.items():
    assert float(job.optimizer.learning_rate(step)) == pytest.approx(rate, rel=1e-5), step


@pytest.mark.parametrize("name", SFT_FILES)
def test_fine_tuning_on_512_devices_asks_for_them(name, tmp_path):
  """Everything else is accepted here, where they are not."""
  data = tmp_path / "messages.jsonl"
  messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  data.write_text(json.dumps({"messages": messages}) + "\n")
  text = gin_config.read([str(RUNS / f"{name}.gin")], [f"messages={str(data)!r}"])
  gin_config.parse(text, without_jax=False)
  with pytest.raises(gin_config.ConfigError, match="mesh: expected 512 devices for"):
    gin_config.call(sft.run, run_dir=str(tmp_path / "run"))


@pytest.mark.parametrize(
  ("binding", "message"),
  [
    ("sft.run.mesh={'fsdp': 8}", r"mesh: expected @mesh.make_mesh\(\), got"),
    ("sft.run.rules='train_fsdp'", "rules: expected"),
  ],
)
def test_a_mesh_or_table_in_another_form_is_refused(binding, message):
  with pytest.raises(gin_config.ConfigError, match=message):
    plan_job.read(gin_config.read([str(RUNS / f"{SFT_FILES[0]}.gin")], [binding]))


@pytest.mark.parametrize("name", (*RUN_FILES, *SFT_FILES))
def test_a_planned_run_file_says_what_it_is(name):
  text = (RUNS / f"{name}.gin").read_text()
  assert text.startswith("# Purpose:  ")
  assert all(f"# {word}:" in text for word in ("Cost", "Result", "Command"))
  assert f"python -m tools.plan_run --gin experiments/configs/runs/{name}.gin" in text
