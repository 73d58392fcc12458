"""The tiny run's programs compiled for TPUs that are not here."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPILER = pathlib.Path(sys.prefix) / "plan-tpu"
RUN = """from __gin__ import dynamic_registration
include '{runs}/demo.gin'
from intellect3.models import presets
from intellect3.sharding import rules
MODEL = @presets.tiny()
rl.run.model_path = 'models/nowhere'
trainer.trainer.model_options = {{'dtype': 'bfloat16'}}
trainer.trainer.mesh = {{'fsdp': 4, 'expert': 2}}
trainer.trainer.rules = @rules.train_fsdp_expert()
"""


@pytest.mark.slow
@pytest.mark.skipif(
  not (COMPILER / "libtpu").is_dir() and importlib.util.find_spec("libtpu") is None,
  reason=f"compiling for a TPU needs libtpu (in the environment or {COMPILER}; make plan-tpu)",
)
def test_the_tiny_run_is_planned_for_eight_v5p(tmp_path):
  """Its kernels are those that XLA compiles anywhere; collectives have axes, loops their counts."""
  file, out = tmp_path / "run.gin", tmp_path / "plan.json"
  file.write_text(RUN.format(runs=ROOT / "experiments" / "configs" / "runs"))
  arguments = ["--gin", str(file), "--target", "v5p", "--json", str(out), "--rows", "32"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  result = subprocess.run(
    [sys.executable, "-m", "tools.plan_run", *arguments, "--programs", "rl_step,logprobs"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode in (0, 1), result.stderr[-4000:]
  report = json.loads(out.read_text())
  assert (report["target"], report["devices"], report["fits"]) == ("v5p", 8, True)
  assert report["device_kind"] == "TPU v5"
  assert list(report["programs"]) == ["rl_step", "logprobs"]
  for program in report["programs"].values():
    assert program["predicted_step_seconds"] > 0 and program["collectives"]
    assert all(row["axes"] and row["link"] == "inner" for row in program["collectives"])
  layers = "transpose(jvp(Transformer))/while"
  unknown = report["programs"]["rl_step"]["unknown_loops"]
  assert not any(name.endswith(layers) for name in unknown)
