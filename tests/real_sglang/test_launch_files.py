"""The launch files: they parse, agree on flags, and start what they say on a stand-in Slurm."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

from intellect3.rl import checks
from tests.real_sglang import checkpoints, remote
from tools.sglang import environment

LAUNCH = pathlib.Path("experiments/launch")
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*")])
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*"))
DEMO = "experiments/configs/runs/demo.gin"
PLACES = {"--model-path", "--port", "--host", "--nnodes", "--node-rank", "--dist-init-addr"}
"""Flags that say where, which differ from file to file."""

SRUN = """\
#!/usr/bin/env bash
# A Slurm of one machine: every task of the step here, one after the other's start.
tasks=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && tasks=${1#*=}
  shift
done
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank "$@" &
done
wait -n
"""
RECORD = """\
#!/usr/bin/env bash
# Stands for an interpreter: notes what it was asked to run.
file=$(mktemp "$RECORDS/XXXXXX")
printf '%s\\n' "$@" > "$file"
exec sleep 60
"""


def flags_of(arguments):
  """{flag: value} of an argument vector, `--a b` and `--a=b` alike; True for a bare one."""
  flags = {}
  name = None
  for argument in arguments:
    if argument.startswith("--"):
      name, equals, value = argument.partition("=")
      flags[name] = value if equals else True
    elif name is not None:
      flags[name] = argument
  return flags


def documents(path):
  return [document for document in yaml.safe_load_all(path.read_text()) if document]


def containers(node):
  """Every container of a manifest, however deep."""
  if isinstance(node, dict):
    yield from node.get("containers", [])
    for value in node.values():
      yield from containers(value)
  elif isinstance(node, list):
    for value in node:
      yield from containers(value)


def executable(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return path


@pytest.fixture
def slurm(tmp_path):
  """The environment of a batch script on a Slurm of stand-ins; hosts are SLURM_JOB_NODELIST."""
  stand_ins = tmp_path / "bin"
  stand_ins.mkdir()
  executable(stand_ins / "srun", SRUN)
  executable(stand_ins / "scontrol", '#!/usr/bin/env bash\necho "${@: -1}" | tr , "\\n"\n')
  records = tmp_path / "records"
  records.mkdir()
  return {
    **os.environ,
    "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
    "RECORDS": str(records),
    "PYTHON": str(executable(stand_ins / "recorder", RECORD)),
  }


def recorded(variables, count):
  """The argument vectors noted, once there are so many."""
  deadline = time.monotonic() + 60
  while True:
    files = list(pathlib.Path(variables["RECORDS"]).iterdir())
    vectors = [file.read_text().splitlines() for file in files]
    if len(vectors) >= count and all(vectors):
      return vectors
    assert time.monotonic() < deadline, vectors
    time.sleep(0.05)


def end(process):
  """Ends a script and everything in its process group."""
  os.killpg(process.pid, signal.SIGTERM)
  try:
    process.wait(10)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)


def script_flags(tmp_path, **variables):
  """Flags that sglang_server.sh gives."""
  recorder = executable(tmp_path / "echo", '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
  result = subprocess.run(
    [LAUNCH / "sglang_server.sh", "MODEL", "30000", "--max-running-requests", "7"],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHON": str(recorder), **variables},
    check=True,
  )
  return flags_of(result.stdout.splitlines())


def test_the_scripts_are_bash():
  assert len(SCRIPTS) >= 4
  for script in SCRIPTS:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_manifests_are_yaml_and_their_parts_fit():
  kinds = {document["kind"] for path in MANIFESTS for document in documents(path)}
  assert {"Service", "StatefulSet", "LeaderWorkerSet", "Job", "Deployment"} <= kinds
  for path in MANIFESTS:
    for document in documents(path):
      assert document["apiVersion"] and document["metadata"]["name"]
      for container in containers(document):
        volumes = str(document)
        for mount in container.get("volumeMounts", []):
          assert f"'name': '{mount['name']}'" in volumes.replace(str(mount), "")
        names = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe"):
          handler = container.get(probe, {})
          for kind in ("httpGet", "tcpSocket"):
            assert kind not in handler or handler[kind]["port"] in names


def test_no_server_is_asked_for_its_health_after_its_start():
  for path in MANIFESTS:
    for document in documents(path):
      for container in containers(document):
        if "sglang.launch_server" in container["command"]:
          assert "livenessProbe" not in container
          assert "/health" not in str(container.get("readinessProbe"))


def test_script_manifests_and_gin_file_give_one_set_of_flags(tmp_path):
  expected = script_flags(tmp_path)
  assert expected.pop("--max-running-requests") == "7"
  assert expected["--tp-size"] == "8"
  common = {name: value for name, value in expected.items() if name not in PLACES}
  for name in ("servers.yaml", "servers-multinode.yaml"):
    for document in documents(LAUNCH / "kubernetes" / name):
      for container in containers(document):
        own = flags_of(container["args"])
        assert own.pop("--tp-size") in ("8", "16")
        rest = {flag: value for flag, value in own.items() if flag not in PLACES}
        assert rest == {flag: value for flag, value in common.items() if flag != "--tp-size"}
  recorder = executable(tmp_path / "gin_echo", '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
  checkpoints.write(tmp_path / "model", checkpoints.scripted_params())
  settings = {
    "rl.run.server_urls": ["http://gpu-0:30000"],
    "rl.run.orchestrator_port": 7000,
    "rl.run.model_path": str(tmp_path / "model"),
    "sglang_python": str(recorder),
  }
  sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value!r}")]
  result = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.rl_run", "--out", str(tmp_path / "run")),
      *("--gin", DEMO, "--gin", LAUNCH / "sglang.gin", *sets, "--role", "inference"),
    ],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  own = flags_of(result.stdout.splitlines())
  assert own["--host"] == "0.0.0.0" and own["--port"] == "30000"
  assert {name: value for name, value in own.items() if name not in PLACES} == common


def test_deterministic_servers_and_several_nodes(tmp_path):
  flags = script_flags(
    tmp_path, DETERMINISTIC="1", NODES="2", NODE_RANK="1", HEAD="a:1", TENSOR_PARALLEL="16"
  )
  assert flags["--enable-deterministic-inference"] is True
  assert flags["--attention-backend"] == "fa3"
  assert (flags["--nnodes"], flags["--node-rank"], flags["--dist-init-addr"]) == ("2", "1", "a:1")
  assert flags["--tp-size"] == "16"
  with pytest.raises(subprocess.CalledProcessError):
    script_flags(tmp_path, NODES="2")


def test_a_slurm_allocation_becomes_servers(slurm, tmp_path):
  run_dir = tmp_path / "run"
  variables = {
    **slurm,
    "RUN_DIR": str(run_dir),
    "MODEL": "MODEL",
    "SLURM_JOB_NODELIST": "a,b,c,d",
    "NODES_PER_SERVER": "2",
    "SGLANG_FLAGS": "--max-running-requests 9",
  }
  process = subprocess.Popen(
    ["bash", LAUNCH / "slurm" / "servers.sbatch"], env=variables, start_new_session=True
  )
  try:
    vectors = recorded(slurm, 4)
  finally:
    end(process)
  assert (run_dir / "server_urls").read_text().split() == ["http://a:30000", "http://c:30000"]
  flags = [flags_of(vector) for vector in vectors]
  assert sorted((own["--dist-init-addr"], own["--node-rank"]) for own in flags) == [
    ("a:31000", "0"),
    ("a:31000", "1"),
    ("c:31000", "0"),
    ("c:31000", "1"),
  ]
  for own in flags:
    assert (own["--tp-size"], own["--nnodes"]) == ("16", "2")
    assert own["--max-running-requests"] == "9"


def test_an_allocation_that_does_not_divide_is_refused(slurm, tmp_path):
  variables = {**slurm, "RUN_DIR": str(tmp_path), "MODEL": "MODEL"}
  result = subprocess.run(
    ["bash", LAUNCH / "slurm" / "servers.sbatch"],
    env={**variables, "SLURM_JOB_NODELIST": "a,b,c", "NODES_PER_SERVER": "2"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2 and "expected a multiple of 2, got 3" in result.stderr


def test_a_router_is_given_the_servers(slurm, tmp_path):
  (tmp_path / "server_urls").write_text("http://a:30000\nhttp://b:30000\n")
  process = subprocess.Popen(
    ["bash", LAUNCH / "slurm" / "router.sbatch"],
    env={**slurm, "RUN_DIR": str(tmp_path)},
    start_new_session=True,
  )
  try:
    (vector,) = recorded(slurm, 1)
  finally:
    end(process)
  assert vector[:2] == ["-m", "sglang_router.launch_router"]
  assert vector[2:5] == ["--worker-urls", "http://a:30000", "http://b:30000"]


@pytest.mark.slow
def test_a_run_in_roles_on_slurm_against_a_server(slurm, tmp_path):
  run_dir = tmp_path / "run"
  run_dir.mkdir()
  (server_port, port) = checks.free_ports("127.0.0.1", 2)
  model = checkpoints.write(tmp_path / "model", checkpoints.random_params(0))
  variables = {
    **slurm,
    "PYTHON": sys.executable,
    "RUN_DIR": str(run_dir),
    "MODEL": str(model),
    "GIN": DEMO,
    "WORKERS": "2",
    "ORCHESTRATOR_PORT": str(port),
    "SLURM_JOB_NODELIST": "127.0.0.1",
  }
  settings = {
    "rl.run.steps": 3,
    "byte_renderer.ByteRenderer.vocab_size": checkpoints.VOCAB_SIZE,
    "orchestrator.orchestrator.prompts_per_step": 4,
    "orchestrator.orchestrator.rollouts_per_prompt": 4,
    "orchestrator.orchestrator.evaluation_tasks": 0,
  }
  sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
  with remote.engine(model, server_port, tmp_path / "log"):
    (run_dir / "server_urls").write_text(f"http://127.0.0.1:{server_port}\n")
    result = subprocess.run(
      ["bash", LAUNCH / "slurm" / "run.sbatch", *sets],
      env=variables,
      capture_output=True,
      text=True,
      timeout=240,
      start_new_session=True,
    )
  assert result.returncode == 0, result.stdout + result.stderr
  assert (run_dir / "rollouts" / "step_000003" / "manifest.json").exists()


PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for vector in json.loads(sys.argv[1]):
  parser.parse_args(vector)
"""


@pytest.mark.real_sglang
def test_the_installed_sglang_knows_every_flag(tmp_path):
  directory = environment.DEFAULT_DIRECTORY
  if reason := environment.why_not_ready(directory):
    pytest.skip(reason)

  def vector(flags):
    return [
      part
      for name, value in flags.items()
      for part in ([name] if value is True else [name, "1" if "$(" in value else value])
    ]

  many = {"NODES": "2", "NODE_RANK": "1", "HEAD": "a:1", "DETERMINISTIC": "1"}
  vectors = [vector(script_flags(tmp_path)), vector(script_flags(tmp_path, **many))]
  for path in MANIFESTS:
    for document in documents(path):
      for container in containers(document):
        if "sglang.launch_server" in container["command"]:
          vectors.append(vector(flags_of(container["args"])))
  assert len(vectors) == 5

  def parse(vectors):
    return subprocess.run(
      [environment.python_of(directory), "-c", PARSE, json.dumps(vectors)],
      env=environment.variables(directory),
      capture_output=True,
      text=True,
    )

  result = parse(vectors)
  assert result.returncode == 0, result.stderr[-1000:]
  assert parse([[*vectors[0], "--no-such-flag"]]).returncode == 2
