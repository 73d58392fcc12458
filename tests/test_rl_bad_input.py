"""What cannot start says why in one line, ends with exit code 2 and has started nothing."""

import json
import shutil
import socket
import subprocess
import sys

import jax
import pytest
import safetensors.numpy

from experiments import rl_run
from intellect3 import rl, rollout_log, types
from intellect3.environments.reverse_text import ReverseText
from intellect3.models import hf, presets, transformer
from intellect3.rl import checks
from intellect3.rollouts import accounting

DEMO = "experiments/configs/runs/demo.gin"
WITHOUT_JAX = ("worker", "orchestrator")
PORTS = {"rl.run.orchestrator_port": 40001, "rl.run.server_port": 40002}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A model directory that is whole; nothing here runs it."""
  directory = tmp_path_factory.mktemp("models") / "model"
  config = presets.tiny()
  hf.save(directory, config, transformer.init(config, jax.random.key(0)))
  return directory


SEVERAL = """
import contextlib, io, json, sys
from experiments import rl_run
for line in sys.stdin:
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    code = rl_run.main(json.loads(line))
  print(json.dumps([code, error.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def without_jax():
  """Calls the command in a process of its own, where such a role blocks jax; one for all calls."""
  process = subprocess.Popen(
    [sys.executable, "-c", SEVERAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )

  def call(arguments):
    print(json.dumps(arguments), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())

  yield call
  process.stdin.close()
  assert process.wait(30) == 0


@pytest.fixture
def run_here(capsys, without_jax):
  """Calls the command in this process, or in one that has no jax where the role must not."""

  def call(out, settings, *extra):
    bindings = {"rl.run.num_workers": 0, **settings}
    sets = [part for key, value in bindings.items() for part in ("--set", f"{key}={value!r}")]
    arguments = ["--gin", DEMO, "--out", str(out), *sets, *extra]
    if set(WITHOUT_JAX) & set(extra):
      return without_jax(arguments)
    return rl_run.main(arguments), capsys.readouterr().err

  return call


@pytest.mark.parametrize(
  ("settings", "extra", "message"),
  [
    ({"rl.run.stpes": 3}, [], "Configurable 'rl.run' doesn't have a parameter named 'stpes'"),
    ({"trainer.trainer.lr": 3}, [], "doesn't have a parameter named 'lr'"),
    ({"rl.run.model_path": "nowhere"}, [], "nowhere"),
    ({"rl.run.steps": 0}, [], "steps: expected an integer >= 1, got 0"),
    ({"orchestrator.orchestrator.staleness_rule": "keep"}, [], "staleness_rule: expected"),
    ({"optimizer.adamw.clip_norm": -1.0}, [], "clip_norm"),
    ({"rl.run.num_workers": -1}, [], "num_workers"),
    ({"rl.run.server_restarts": -1}, [], "server_restarts: expected an integer >= 0, got -1"),
    ({"orchestrator.orchestrator.sync_mode": "abort"}, [], "sync_mode: expected one of"),
    ({"orchestrator.orchestrator.sync_transport": "nccl"}, [], "transport: expected one of"),
    ({"orchestrator.orchestrator.canary_bound": -1}, [], "canary_bound: expected a number > 0"),
    ({"orchestrator.orchestrator.sync_bucket_bytes": 0}, [], "bucket_bytes: expected an integer"),
    ({"orchestrator.orchestrator.sync_timeout_seconds": 0}, [], "sync_timeout_seconds: expected"),
    ({"orchestrator.orchestrator.server_poll_seconds": "often"}, [], "server_poll_seconds: expect"),
    ({"orchestrator.orchestrator.worker_patience_seconds": 0}, [], "worker_patience_seconds: exp"),
    ({"orchestrator.orchestrator.max_groups_in_vain": 0}, [], "max_groups_in_vain: expected"),
    ({"worker.worker.segment_tokens": 0}, [], "worker.segment_tokens: expected an integer >= 1"),
    ({"worker.worker.grace_seconds": -1}, [], "worker.grace_seconds: expected a number >= 0"),
    ({"worker.worker.journal_seconds": -1}, [], "worker.journal_seconds: expected a number >= 0"),
    ({"worker.worker.wait_seconds": 0}, [], "worker.wait_seconds: expected a number > 0, got 0"),
    ({"trainer.trainer.weights_shard_bytes": 0}, [], "weights_shard_bytes: expected at least 1"),
    ({"trainer.trainer.weights_threads": 0}, [], "weights_threads: expected at least 1, got 0"),
    ({"trainer.trainer.processes": 0}, [], "trainer.processes: expected an integer >= 1, got 0"),
    ({"trainer.trainer.stall_seconds": 0}, [], "trainer.stall_seconds: expected a number > 0"),
    ({"trainer.trainer.rules": (("embed",),)}, [], "trainer.rules: expected a table of sharding."),
    (
      {**PORTS, "trainer.trainer.processes": 2},
      ["--role", "trainer"],
      "trainer.processes: expected as many as are started (no variable of a launcher), got 2",
    ),
    ({"trainer.trainer.router_bias_rate": -1}, [], "router_bias_rate: expected a number >= 0"),
    ({"rl.run.replay_routed_experts": 1}, [], "replay_routed_experts: expected a bool, got 1"),
    (
      {
        "rl.run.replay_routed_experts": True,
        "inference.embedded_server.options": {"enable_return_routed_experts": False},
      },
      [],
      "enable_return_routed_experts: expected True with rl.run.replay_routed_experts, got False",
    ),
    ({}, ["--resume"], "there is no run to resume"),
    ({"inference.embedded_server.options": {"slotz": 4}}, [], "unrecognized arguments: --slotz"),
    (
      {"inference.embedded_server.options": {"slots": "many"}},
      [],
      "options: expected flags of the engine, got {'slots': 'many'}: argument --slots: expected a",
    ),
    (
      {"inference.embedded_server.options": {"slots": 0}},
      [],
      "argument --slots: expected a whole number of at least 1, got 0",
    ),
    (
      {"inference.embedded_server.options": {"port": 80}},
      [],
      "options: expected names and values, none of",
    ),
    ({"inference.embedded_server.options": 3}, [], "options: expected names and values"),
    (
      PORTS,
      ["--role", "inference", "--index", "7"],
      "index: expected an integer from 0 to 0, got 7",
    ),
    (PORTS, ["--role", "inference", "--index", "-1"], "index: expected an integer from 0 to 0"),
    (
      {**PORTS, "rl.run.num_workers": 2},
      ["--role", "worker", "--index", "2"],
      "index: expected an integer from 0 to 1, got 2",
    ),
    (PORTS, ["--role", "worker"], "num_workers: expected at least 1 for role worker, got 0"),
    ({"worker.worker.max_concurrency": 0}, [], "worker.max_concurrency: expected an integer >= 1"),
    ({"worker.worker.retries": -1}, [], "worker.retries: expected an integer >= 0, got -1"),
    ({"worker.worker.backoff_seconds": -0.5}, [], "worker.backoff_seconds: expected a number >= 0"),
    ({"worker.worker.timeout_seconds": 0}, [], "worker.timeout_seconds: expected a number > 0"),
    ({"worker.worker.max_tokens": "all"}, [], "worker.max_tokens: expected an integer >= 1"),
    ({"rl.run.steps": "ten"}, [], "steps: expected an integer >= 1, got 'ten'"),
    ({"rl.run.steps": True}, [], "steps: expected an integer >= 1, got True"),
    ({"rl.run.num_workers": 1.5}, [], "num_workers: expected an integer >= 0, got 1.5"),
    ({"rl.run.num_servers": 0}, [], "num_servers: expected an integer >= 1, got 0"),
    ({"rl.run.seed": -1}, [], "seed: expected an integer from 0 to"),
    ({"rl.run.max_off_policy_steps": -1}, [], "max_off_policy_steps: expected an integer >= 0"),
    ({"rl.run.server_port": 70000}, [], "server_port: expected an integer from 0 to 65535"),
    ({"rl.run.model_path": 3}, [], "model_path: expected a path, got 3"),
    ({"rl.run.host": "no.such.host.invalid"}, [], "host: expected one that resolves, got 'no.such"),
    ({"rl.run.host": "192.0.2.1"}, [], "host: expected an address of this machine"),
    (
      {"rl.run.orchestrator_port": 40001, "rl.run.server_port": 40001},
      [],
      "server_urls[0]: expected a port other than the orchestrator's",
    ),
    ({"rl.run.server_urls": ["localhost:1"]}, [], "server_urls[0]: expected http://HOST:PORT"),
    ({"rl.run.server_urls": "http://localhost:1"}, [], "server_urls: expected a list"),
    ({"rl.run.environments": []}, [], "environments: expected a list of at least one"),
    ({"rl.run.environments": ["x"]}, [], "environments: expected a list of at least one"),
    (
      {"rl.run.environment_weights": {"reverse_text": 0}},
      [],
      "environment_weights['reverse_text']: expected a number > 0, got 0",
    ),
    (
      {"rl.run.environment_weights": {"other": 1.0}},
      [],
      "environment_weights: expected for each of ['reverse_text'], got ['other']",
    ),
    (
      {},
      ["--set", "rl.run.max_off_policy_steps=foo"],
      "rl.run.max_off_policy_steps=foo: expected a number, a quoted string, a list or a @reference",
    ),
    ({}, ["--set", "rl.run.steps=[1,"], "rl.run.steps=[1,: expected brackets and quotes"),
    (PORTS, ["--role", "trainer", "--resume"], "there is no run to resume"),
    (PORTS, ["--role", "orchestrator", "--resume"], "there is no run to resume"),
    ({}, ["--gin", "missing.gin"], "missing.gin: No such file"),
  ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_started(
  model, tmp_path, run_here, settings, extra, message
):
  out = tmp_path / "run"
  code, error = run_here(out, {"rl.run.model_path": str(model), **settings}, *extra)
  assert code == 2, error
  assert message in error
  assert len(error.strip().splitlines()) == 1, error
  assert not out.exists()


def test_bad_input_an_environment_that_contradicts_itself(model, tmp_path, run_here, monkeypatch):
  monkeypatch.setenv("INTELLECT3_PROCESS_ID", "1")
  settings = {"rl.run.model_path": str(model), **PORTS}
  code, error = run_here(tmp_path / "run", settings, "--role", "trainer")
  assert code == 2 and len(error.strip().splitlines()) == 1, error
  assert "INTELLECT3_COORDINATOR: expected a value beside INTELLECT3_PROCESS_ID=1, got" in error


@pytest.mark.parametrize("role", ["all", "worker"])
def test_bad_input_a_dense_model_has_no_experts_to_replay(tmp_path, run_here, role):
  directory = tmp_path / "dense"
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(presets.tiny_qwen3().to_hf()))
  settings = {"rl.run.model_path": str(directory), "rl.run.replay_routed_experts": True, **PORTS}
  settings["rl.run.num_workers"] = 1
  code, error = run_here(tmp_path / "run", settings, "--role", role)
  assert code == 2 and len(error.strip().splitlines()) == 1, error
  assert "replay_routed_experts: expected False for a model without experts, got True" in error


@pytest.mark.parametrize(
  ("role", "there", "message"),
  [
    ("trainer", "metrics/trainer.jsonl", "expected none of trainer, got"),
    ("trainer", "checkpoints/4/state", "with checkpoints: a run is there already"),
    ("orchestrator", "metrics/orchestrator.jsonl", "expected none of orchestrator, got"),
    ("orchestrator", "rollouts/step_000001/manifest.json", "with rollouts: a run is there already"),
    ("all", "rollouts/step_000001/manifest.json", "with rollouts: a run is there already"),
    ("all", "config.gin", "with config.gin: a run is there already"),
  ],
)
def test_bad_input_a_role_does_not_write_over_its_own_output(
  model, tmp_path, run_here, role, there, message
):
  out = tmp_path / "run"
  (out / there).parent.mkdir(parents=True)
  (out / there).write_text("")
  settings = {"rl.run.model_path": str(model), **PORTS}
  code, error = run_here(out, settings, "--role", role)
  assert code == 2, error
  assert message in error
  assert len(error.strip().splitlines()) == 1, error
  assert [str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()] == [there]


@pytest.mark.parametrize("inside", ["", "run"])
def test_bad_input_out_is_a_file(model, tmp_path, run_here, inside):
  (tmp_path / "file").write_text("text")
  out = tmp_path / "file" / inside
  code, error = run_here(out, {"rl.run.model_path": str(model)})
  assert code == 2, error
  assert "run_dir: expected a directory, got" in error and "file is a file)" in error


def test_bad_input_tensors_that_do_not_fit_are_all_named_in_one_line(model, tmp_path, run_here):
  broken = tmp_path / "model"
  shutil.copytree(model, broken)
  tensors = safetensors.numpy.load_file(broken / "model.safetensors")
  for name in ("lm_head.weight", "model.norm.weight"):
    tensors[name] = tensors[name][:3]
  safetensors.numpy.save_file(tensors, broken / "model.safetensors")
  code, error = run_here(tmp_path / "run", {"rl.run.model_path": str(broken)})
  assert code == 2, error
  assert "the tensors do not fit the config: " in error
  assert "lm_head.weight" in error and "; misshapen: model.norm.weight" in error
  assert "configurable" not in error and len(error.strip().splitlines()) == 1
  assert len(error) < 640


@pytest.mark.parametrize(
  ("role", "resume", "there"),
  [
    ("trainer", True, "config.gin"),  # as `all --resume` starts it after an early kill
    ("orchestrator", True, "config.gin"),
    ("all", True, "config.gin"),
    ("trainer", False, "config.gin"),  # as `all` starts it
    ("orchestrator", False, "config.gin"),
    ("trainer", False, "metrics/orchestrator.jsonl"),  # the other role may have begun
    ("orchestrator", False, "checkpoints/0/state"),
    ("worker", False, "metrics/worker_0.jsonl"),
    ("all", False, "logs/console.log"),
  ],
)
def test_a_busy_directory_that_a_role_may_enter(tmp_path, role, resume, there):
  (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / there).write_text("")
  checks.run_directory(tmp_path, resume=resume, role=role)


def test_a_missing_configuration_is_written_by_the_orchestrator_alone(tmp_path):
  def built(shared, make_worker):
    return lambda: started.append((shared.run_dir / "config.gin").read_text())

  def start(text):
    rl.run(
      run_dir=str(tmp_path / "run"),
      role="orchestrator",
      steps=1,
      model_path="unused",
      renderer=None,
      environments=[ReverseText()],
      trainer=None,
      orchestrator=built,
      worker=lambda shared, index: None,
      inference=None,
      orchestrator_port=checks.free_ports("127.0.0.1", 1)[0],
      server_urls=["http://localhost:1"],
      config_text=text,
    )()

  started = []
  start("first")
  start("second")  # what `all` or an earlier start has kept stays
  assert started == ["first", "first"]


def test_a_missing_required_parameter_is_named(tmp_path, capsys):
  gin = tmp_path / "run.gin"
  base = "experiments/configs/runs/rl_base.gin"
  gin.write_text(f"from __gin__ import dynamic_registration\ninclude '{base}'\n")
  assert rl_run.main(["--gin", str(gin), "--out", str(tmp_path / "run")]) == 2
  error = capsys.readouterr().err
  for name in ("run()", "'steps'", "'model_path'", "'environments'"):
    assert name in error


def test_a_busy_port_is_refused(model, tmp_path, run_here):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    settings = {"rl.run.model_path": str(model), "rl.run.server_port": port}
    code, error = run_here(tmp_path / "run", settings)
  assert code == 2
  assert f"port: expected a free one on 127.0.0.1, got {port}" in error


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rollouts_per_prompt": 5}, "rollouts_per_prompt: expected 5, as the run was begun with, got"),
    ({"rollouts_per_prompt": None}, "rollouts_per_prompt: expected None"),
    ({"sampler": {"cursor": {"chess": 3}, "members": {"chess": []}}}, "environments: the run had"),
  ],
)
def test_bad_input_a_run_is_not_resumed_as_another_one(model, tmp_path, run_here, changes, message):
  out = tmp_path / "run"
  state = {
    "next_step": 2,
    "next_group": 40,
    "rollouts_per_prompt": 8,
    "groups": [],
    "accounting": {**accounting.Accounting().counts(), "reasons": {}},
    "sampler": {"cursor": {"reverse_text": 3}, "members": {"reverse_text": []}},
    "baselines": {},
    **changes,
  }
  manifest = types.Manifest(
    step=1,
    shards=[types.ShardEntry(file="w", bytes=1, crc32=0, lengths=[2], loss_tokens=[1])],
    num_rollouts=1,
    num_groups=1,
    loss_tokens=1,
    oldest_version=0,
    newest_version=0,
    metrics={},
    scheduler_state=state,
  )
  rollout_log.step_directory(out / "rollouts", 1).mkdir(parents=True)
  rollout_log.commit_manifest(out / "rollouts", manifest)
  (out / "config.gin").write_text("")
  code, error = run_here(out, {"rl.run.model_path": str(model)}, "--resume")
  assert code == 2, error
  assert message in error and len(error.strip().splitlines()) == 1, error
