"""The launch files say what the code reads: names of variables, roles, addresses, numbers."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from experiments import rl_run
from intellect3 import rl
from intellect3.distributed import cluster

LAUNCH = pathlib.Path("experiments/launch")
OURS = {value for name, value in vars(cluster).items() if str(value).startswith("INTELLECT3_")}


@pytest.fixture(scope="module")
def jobs():
  """The JobSet's jobs by name, each with its pods' only container."""
  (jobset,) = yaml.safe_load_all((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
  assert jobset["kind"] == "JobSet"
  found = {}
  for job in jobset["spec"]["replicatedJobs"]:
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] and job["replicas"] == 1
    found[job["name"]] = jobset["metadata"]["name"], spec, container
  return found


def environment(name, jobset, container, index):
  """What Kubernetes would put into a pod's environment."""
  labels = {
    "metadata.labels['jobset.sigs.k8s.io/jobset-name']": jobset,
    "metadata.labels['jobset.sigs.k8s.io/replicatedjob-name']": name,
    "metadata.labels['jobset.sigs.k8s.io/restart-attempt']": "0",
  }
  told = {
    each["name"]: each.get("value") or labels[each["valueFrom"]["fieldRef"]["fieldPath"]]
    for each in container["env"]
  }
  return {**told, "JOB_COMPLETION_INDEX": str(index)}


def test_a_trainer_pod_finds_its_place(jobs):
  jobset, spec, container = jobs["trainer"]
  last = spec["parallelism"] - 1
  found = cluster.detect(environment("trainer", jobset, container, last))
  assert (found.launcher, found.num_processes, found.process_id) == ("jobset", last + 1, last)
  host, port = found.coordinator.split(":")
  assert host == f"{jobset}-trainer-0-0.{jobset}"
  assert int(port) == container["ports"][0]["containerPort"]


@pytest.mark.parametrize(("attempt", "resumes"), [("0", False), ("2", True)])
@pytest.mark.parametrize("role", ["trainer", "orchestrator", "worker"])
def test_the_pods_commands_are_those_of_the_roles(jobs, role, attempt, resumes):
  jobset, spec, container = jobs[role]
  environ = environment(role, jobset, container, spec["parallelism"] - 1)
  (script,) = container["args"]
  echo = script.replace("exec python", "printf '%s\\n'")
  told = subprocess.run(
    [*container["command"], echo],
    env={**environ, "RESTART_ATTEMPT": attempt, "PATH": "/usr/bin:/bin"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  assert told[:2] == ["-m", rl_run.__name__]
  assert role in rl.ROLES and told[told.index("--role") + 1] == role
  assert told[told.index("--index") + 1] == str(spec["parallelism"] - 1)
  assert ("--resume" in told) == resumes
  sets = dict(part.split("=", 1) for part in told if part.startswith("rl.run."))
  assert int(sets["rl.run.num_workers"]) == jobs["worker"][1]["parallelism"]
  assert sets["rl.run.host"] == f"'{jobset}-orchestrator-0-0.{jobset}'"
  servers = jobs["inference"][1]["parallelism"]
  port = jobs["inference"][2]["ports"][0]["containerPort"]
  urls = [f"'http://{jobset}-inference-0-{n}.{jobset}:{port}'" for n in range(servers)]
  assert sets["rl.run.server_urls"] == f"[{', '.join(urls)}]"


def test_every_file_parses():
  for path in LAUNCH.rglob("*.yaml"):
    assert all("kind" in each for each in yaml.safe_load_all(path.read_text())), path
  for path in [*LAUNCH.rglob("*.sbatch"), *LAUNCH.rglob("*.sh")]:
    subprocess.run(["bash", "-n", path], check=True)


def test_every_variable_of_ours_that_a_file_names_is_read():
  named = set()
  for path in [*LAUNCH.rglob("*"), pathlib.Path("docs/clusters.md")]:
    if path.is_file():
      named |= set(re.findall(r"INTELLECT3_[A-Z_]+", path.read_text()))
  assert named == OURS


def test_a_slurm_job_starts_a_trainer_on_every_node(tmp_path):
  """The job's script with `srun` and `scontrol` that only say how they were called."""
  script = (LAUNCH / "slurm" / "run.sbatch").read_text()
  said = """
srun() { printf -v words ' %q' "$@"; printf 'srun%s\\n' "$words"; }  # at once: some run beside
scontrol() { printf 'gpu1\\ngpu2\\ngpu3\\n'; }
trap() { :; }
wait() { builtin wait; }  # for all: these steps are over at once
"""
  (tmp_path / "server_urls").write_text("http://gpu9:30000\n")
  set_up = "set -euo pipefail\n"
  assert set_up in script
  found = subprocess.run(
    ["bash", "-c", script.replace(set_up, set_up + said, 1)],
    env={
      "PATH": "/usr/bin:/bin",
      "RUN_DIR": str(tmp_path),
      "MODEL": "model",
      "GIN": "x.gin",
      "SLURM_JOB_NODELIST": "gpu[1-3]",
      "WORKERS": "2",
      "SLURM_RESTART_COUNT": "1",
    },
    capture_output=True,
    text=True,
    timeout=20,
  )
  assert found.returncode == 0, found.stderr
  steps = {}
  for line in found.stdout.splitlines():
    words = shlex.split(line)
    steps.setdefault(words[words.index("--role") + 1], []).append(words)
  assert {role: len(found) for role, found in steps.items()} == {
    "orchestrator": 1,
    "worker": 2,
    "trainer": 1,
  }
  (trainer,) = steps["trainer"]
  assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--resume"} <= set(trainer)
  assert "rl.run.host='gpu1'" in trainer
