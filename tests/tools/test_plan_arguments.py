"""The planner's flags: what is refused, in one line and before anything is made."""

import json
import pathlib

import pytest

from intellect3.planning import hardware, search, target
from tests.kernels import deviceless
from tools import plan_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = ROOT / "experiments" / "configs" / "runs" / "qwen3_0_6b_1xh100.gin"
EXPERTS = """from __gin__ import dynamic_registration
include '{runs}/demo.gin'
from intellect3.models import presets
from intellect3.sharding import rules
MODEL = @presets.tiny()
rl.run.model_path = 'models/nowhere'
trainer.trainer.model_options = {{'dtype': 'bfloat16'}}
trainer.trainer.mesh = {{'fsdp': 2, 'expert': 4}}
trainer.trainer.rules = @rules.train_fsdp_expert()
"""
FORCED = """
import contextlib, io, json
import jax
from intellect3.models import parallel
from intellect3.sharding import collectives
from tools import plan_run

def gather(self, params, prefix, dtype):
  dims = dict(self.dims)
  def one(path, leaf):
    name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
    if "experts" not in name:
      return collectives.gather(leaf, dims[name], dtype)
    # Or XLA converts before it gathers.
    return jax.lax.optimization_barrier(collectives.gather(leaf, dims[name], "float32"))
  return jax.tree_util.tree_map_with_path(one, params)

parallel.Parallel.gather = gather
out = io.StringIO()
with contextlib.redirect_stdout(out):
  code = plan_run.main({arguments!r})
print(json.dumps({{"code": code, "report": json.load(open({json!r}))}}))
"""


def refused(capsys, *arguments):
  assert plan_run.main(["--gin", str(RUN), *arguments]) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), lines
  return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--margin", "1"], "--margin: expected a share from 0 to below 1, got 1.0"),
    (["--margin=-0.1"], "--margin: expected a share"),
    (["--margin", "nan"], "--margin: expected a share"),
    (["--devices", "0"], "--devices: expected at least 1, got 0"),
    (["--rows", "0"], "--rows: expected at least 1, got 0"),
    (["--trajectory-tokens", "0"], "--trajectory-tokens: expected at least 1"),
    (["--search", "--search-most", "0"], "--search-most: expected at least 1"),
    (["--search-most", "3"], "--search-most: expected beside --search"),
    (["--search", "--programs", "rl_step"], "--search compiles the step alone: expected no --prog"),
    (["--search", "--hlo", "texts"], "--search compiles the step alone: expected no --hlo"),
    (["--json", "/nowhere/plan.json"], "--json: expected a path in a folder that can be written"),
    (["--json", "/"], "--json: expected a path in a folder that can be written"),
    (["--hlo", f"{RUN}/texts"], "--hlo: expected a path in a folder that can be written"),
    (["--hardware", "/nowhere.toml"], "hardware: expected a file, got /nowhere.toml: No such file"),
    (["--hardware", str(RUN)], "hardware: expected TOML, got"),
    (["--xla", "fast"], "--xla: expected NAME=VALUE, got 'fast'"),
    (["--target", "h900"], "target: expected one of"),
  ],
)
def test_a_flag_that_cannot_be_is_refused_first(arguments, message, capsys, monkeypatch):
  monkeypatch.setattr(plan_run, "_prepare", lambda *_: pytest.fail("too late"))
  assert refused(capsys, *arguments).startswith(message)


def test_a_search_compiles_with_xlas_options(capsys, monkeypatch):
  """And with its own number of layouts where none is asked for."""
  calls = []

  def fake(*_, **options):
    calls.append(options)
    raise ValueError("enough")

  monkeypatch.setattr(search, "search", fake)
  monkeypatch.setattr(target, "devices", lambda name, count: [])
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  refused(capsys, "--target", "h100", "--search", "--xla", "xla_a=2", "--xla", "xla_b=true")
  assert calls[0]["options"] == {"xla_a": 2, "xla_b": True}
  assert (calls[0]["most"], calls[0]["margin"]) == (search.MOST, hardware.MARGIN)


def planned(tmp_path, program):
  file, out = tmp_path / "experts.gin", str(tmp_path / "plan.json")
  file.write_text(EXPERTS.format(runs=RUN.parent))
  arguments = ["--gin", str(file), "--json", out, "--programs", program, "--rows", "32"]
  return deviceless.run(FORCED.format(arguments=arguments, json=out))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["logprobs", "rl_step"])
def test_experts_that_travel_in_float32_are_a_fault(program, tmp_path):
  """Two of the eight experts a group of fsdp, gathered there: no other weight is named."""
  told = planned(tmp_path, program)
  rows = told["report"]["programs"][program]["float32_weights"]
  assert told["code"] == 1
  names = {name for row in rows for name in row["weight"].split(" or ")}
  assert names and all("moe/experts" in name for name in names)
  assert json.dumps(told["report"]["faults"]).count("float32 weight") == len(rows)


@pytest.mark.slow
def test_the_run_of_intellect3_fits_on_128_h200s(tmp_path):
  """Its train step: below 125 GiB a device, no weight in float32, compiled in less than 4 GiB."""
  out = str(tmp_path / "plan.json")
  run = RUN.with_name("intellect3_rl_512xh200.gin")
  arguments = ["--gin", str(run), "--json", out, "--programs", "rl_step"]
  code = (
    "import json; from tools import plan_run\n"
    f"code = plan_run.main({arguments!r})\n"
    f"print(json.dumps({{'code': code, 'report': json.load(open({out!r}))}}))"
  )
  told = deviceless.run(code)
  report = told["report"]
  assert (report["target"], report["devices"], report["rows"]) == ("h200", 128, 4096)
  assert told["code"] == 0 and report["fits"] and report["faults"] == []
  assert report["programs"]["rl_step"]["float32_weights"] == []
  assert 20 < report["peak_gib"] <= 125
  assert report["compile_peak_rss_gib"] < 4
