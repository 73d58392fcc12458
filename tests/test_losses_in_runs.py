"""Every run file of a loss or an advantage builds a whole run, in every role, and says what it is.

Nothing is started here; tests/test_losses_in_runs_started.py does that.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import gin_config
from intellect3 import rl
from intellect3.models import hf, presets, transformer
from intellect3.rl.train_loop import effective_sample_share
from intellect3.training import loss_inputs

RUNS = pathlib.Path("experiments/configs/runs")
LOSSES = sorted((RUNS / "losses").glob("*.gin"))
ADVANTAGES = sorted((RUNS / "advantages").glob("*.gin"))
FILES = [*LOSSES, *ADVANTAGES]
REFERENCE = "trainer.trainer.reference_path"


def name_of(path):
  return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A model directory that is whole; nothing here runs it."""
  directory = tmp_path_factory.mktemp("models") / "model"
  config = presets.tiny()
  hf.save(directory, config, transformer.init(config, jax.random.key(0)))
  return directory


def bindings(path, model):
  """What a machine without the demo's runs has to set."""
  more = [f"{REFERENCE}={str(model)!r}"] if REFERENCE in path.read_text() else []
  return [f"rl.run.model_path={str(model)!r}", *more]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_run_file_builds_every_role(path, model, tmp_path):
  text = gin_config.read([str(path)], bindings(path, model))
  gin_config.parse(text, without_jax=False)
  start = gin_config.call(rl.run, run_dir=str(tmp_path / "run"), role="all", config_text=text)
  assert callable(start) and not (tmp_path / "run").exists()


WITHOUT_JAX = """
import json, sys
from experiments import gin_config
from intellect3 import rl
for line in sys.stdin:
  path, bindings, out = json.loads(line)
  gin_config.parse(gin_config.read([path], bindings), without_jax=True)
  for role in ("worker", "orchestrator"):
    gin_config.call(rl.run, run_dir=out, role=role, orchestrator_port=40001, server_port=40002)
  print(path, flush=True)
"""


def test_the_roles_without_jax_read_every_file(model, tmp_path):
  lines = [json.dumps([str(path), bindings(path, model), str(tmp_path / "run")]) for path in FILES]
  found = subprocess.run(
    [sys.executable, "-c", WITHOUT_JAX], input="\n".join(lines), capture_output=True, text=True
  )
  assert found.returncode == 0, found.stderr[-2000:]
  assert found.stdout.split() == [str(path) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_run_file_opens_with_what_it_is_for(path):
  lines = path.read_text().splitlines()
  header = lines[: lines.index("from __gin__ import dynamic_registration")]
  assert all(line.startswith("# ") for line in header)
  fields = re.findall(r"^# (\w+):", "\n".join(header), re.MULTILINE)
  assert fields == ["Purpose", "Cost", "Result", "Command"]
  command = " ".join(line[1:].strip() for line in header).split("Command:")[1]
  assert f"--gin {path.as_posix()} --out runs/{path.stem}" in command
  assert "include '../demo.gin'" in lines


def test_every_policy_gradient_loss_has_a_run_file():
  from intellect3.losses import policy_gradient

  chosen = "\n".join(path.read_text() for path in LOSSES)
  for name in policy_gradient.__all__:
    assert f"trainer.trainer.loss_fn = @policy_gradient.{name}\n" in chosen, name


@pytest.mark.parametrize("path", LOSSES, ids=name_of)
def test_what_a_file_binds_reaches_the_loss(path, model, monkeypatch):
  """The trainer is handed the loss that the file names, with the file's hyperparameters."""
  handed = {}

  def check(loss_fn, given):
    handed["loss"], handed["given"] = loss_fn, set(given)

  monkeypatch.setattr(loss_inputs, "check", check)
  gin_config.parse(gin_config.read([str(path)], bindings(path, model)), without_jax=False)
  gin_config.call(rl.run, run_dir="unused", role="trainer", orchestrator_port=1, server_port=2)
  text = path.read_text()
  named = re.search(r"trainer\.trainer\.loss_fn = @\w+\.(\w+)", text)[1]
  assert handed["loss"].__name__ == named
  assert handed["given"] == {
    *(["ref_logprobs"] if REFERENCE in text else []),
    *(["old_logprobs"] if "decoupled = True" in text else []),
  }


@pytest.mark.parametrize(
  ("file", "settings", "message"),
  [
    ("clipped", ["policy_gradient.clipped_loss.dual_clip=0.5"], "dual_clip: expected"),
    ("masked_importance", ["policy_gradient.masked_importance_loss.ratio_low=9.0"], "ratio_low"),
    ("constant", ["aggregation.constant.divisor=0"], "divisor: expected"),
    ("reinforce", ["trainer.trainer.decoupled=True"], "decoupled: expected False for reinforce_"),
    ("reinforce", ["trainer.trainer.decoupled=1"], "trainer.decoupled: expected a bool, got 1"),
    ("kl_penalty", [f"{REFERENCE}=None"], "reference_path: expected a model's directory for weigh"),
    ("distillation", [f"{REFERENCE}=None"], "reference_path: expected a model's directory for rev"),
    ("distillation", [f"{REFERENCE}='nowhere'"], "reference_path: nowhere"),
    (
      "kl_penalty",
      ["components.weighted_sum_loss.ref_kl_coefficient=0.0"],
      "reference_path: expected None for weighted_sum_loss, which does not read ref_logprobs",
    ),
    ("reinforce", ["trainer.trainer.reference_dtype='float32'"], "reference_dtype: expected None"),
    (
      "distillation",
      ["trainer.trainer.reference_dtype='int8'"],
      "reference_dtype: expected float32 or bfloat16, got 'int8'",
    ),
  ],
)
def test_a_loss_that_does_not_fit_its_run_is_refused(file, settings, message, model):
  path = RUNS / "losses" / f"{file}.gin"
  text = gin_config.read([str(path)], [*bindings(path, model), *settings])
  gin_config.parse(text, without_jax=False)
  with pytest.raises(gin_config.ConfigError) as refused:
    gin_config.call(rl.run, run_dir="unused", role="trainer", orchestrator_port=1, server_port=2)
  assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_effective_sample_share_is_kishs():
  ratios = np.array([0.5, 1.0, 2.0, 4.0])
  metrics = {"importance_ratio": ratios.mean(), "importance_ratio_squared": (ratios**2).mean()}
  share = effective_sample_share(metrics)["effective_sample_share"]
  assert share == pytest.approx(ratios.sum() ** 2 / (4 * (ratios**2).sum()))
  # A loss of one's own may not tell, and a step may have no token of the term that does.
  assert effective_sample_share({"importance_ratio": 1.0}) == {}
  assert effective_sample_share(dict.fromkeys(metrics, 0.0)) == {}
