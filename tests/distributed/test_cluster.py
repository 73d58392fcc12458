"""Who is who from the environment: what launchers really set, and what contradicts itself."""

import pytest

from intellect3.distributed import cluster

PLAIN = cluster.variables("node1:1234", 4, 2)
JOBSET = {
  "JOBSET_NAME": "glm",
  "REPLICATED_JOB_NAME": "trainer",
  "JOB_COMPLETION_INDEX": "3",
  "INTELLECT3_NUM_PROCESSES": "16",
}
SLURM = {
  "SLURM_JOB_ID": "4100",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NODELIST": "gpu[007-016,020],other3",
}
TASK = {"SLURM_STEP_NODELIST": "gpu[1-4]", "SLURM_NTASKS": "4"}
BY_HAND = {name: value for name, value in PLAIN.items() if name != cluster.LAUNCHER}


def test_nothing_says_that_there_are_several():
  assert cluster.detect({}) is None
  # Inside sbatch but outside srun there is no step, and one process.
  inside = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
  assert cluster.detect(inside) is None


@pytest.mark.parametrize(
  ("environ", "launcher", "coordinator", "count", "index"),
  [
    (PLAIN, "environment", "node1:1234", 4, 2),
    (JOBSET, "jobset", "glm-trainer-0-0.glm:8476", 16, 3),
    (SLURM, "slurm", "gpu007:61444", 16, 5),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, "slurm", "gpu007:61444", 8, 5),
    ({**SLURM, "INTELLECT3_COORDINATOR_PORT": "99"}, "slurm", "gpu007:99", 16, 5),
    # Who starts processes itself inside a cluster's job is believed.
    ({**SLURM, **PLAIN}, "environment", "node1:1234", 4, 2),
    ({**JOBSET, **PLAIN}, "environment", "node1:1234", 4, 2),
    # Exported by hand: to the shell of a job or of a step of one task, or rightly to each task.
    ({**BY_HAND, "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, "environment", "node1:1234", 4, 2),
    ({**BY_HAND, **SLURM, "SLURM_STEP_NUM_TASKS": "1"}, "environment", "node1:1234", 4, 2),
    ({**BY_HAND, **TASK, "SLURM_PROCID": "2"}, "environment", "node1:1234", 4, 2),
    # Two tasks of two processes each: the third is the first of the second.
    (
      {**BY_HAND, **TASK, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
      *("environment", "node1:1234", 4, 2),
    ),
  ],
)
def test_each_launcher(environ, launcher, coordinator, count, index):
  found = cluster.detect(environ)
  assert (found.launcher, found.coordinator) == (launcher, coordinator)
  assert (found.num_processes, found.process_id) == (count, index)
  assert found.local_devices is None and found.heartbeat_seconds == 60


def test_time_outs_and_devices():
  found = cluster.detect(
    {
      **PLAIN,
      "INTELLECT3_HEARTBEAT_SECONDS": "10",
      "INTELLECT3_START_SECONDS": "20",
      "INTELLECT3_SHUTDOWN_SECONDS": "30",
      "INTELLECT3_LOCAL_DEVICES": "4,5",
    }
  )
  assert (found.heartbeat_seconds, found.start_seconds, found.shutdown_seconds) == (10, 20, 30)
  assert found.local_devices == (4, 5)


@pytest.mark.parametrize(
  ("environ", "message"),
  [
    ({"INTELLECT3_PROCESS_ID": "1"}, "INTELLECT3_COORDINATOR: expected a value beside INTEL"),
    ({**PLAIN, "INTELLECT3_PROCESS_ID": "4"}, "INTELLECT3_PROCESS_ID: expected below .* 4, got 4"),
    ({**PLAIN, "INTELLECT3_PROCESS_ID": "-1"}, "INTELLECT3_PROCESS_ID: expected an integer >= 0"),
    ({**PLAIN, "INTELLECT3_NUM_PROCESSES": "0"}, "INTELLECT3_NUM_PROCESSES: .* >= 1, got '0'"),
    ({**PLAIN, "INTELLECT3_COORDINATOR": "node1"}, "INTELLECT3_COORDINATOR: expected host:port"),
    ({**PLAIN, "INTELLECT3_HEARTBEAT_SECONDS": "soon"}, "HEARTBEAT_SECONDS: .* got 'soon'"),
    ({**PLAIN, "INTELLECT3_LOCAL_DEVICES": "0,0"}, "INTELLECT3_LOCAL_DEVICES: .* got '0,0'"),
    ({"INTELLECT3_HEARTBEAT_SECONDS": "abc"}, "HEARTBEAT_SECONDS: .* got 'abc'"),
    ({"INTELLECT3_COORDINATOR_PORT": "65536"}, "COORDINATOR_PORT: .* from 1 to 65535, got '65536'"),
    ({**SLURM, "INTELLECT3_COORDINATOR_PORT": "0"}, "COORDINATOR_PORT: .* from 1 to 65535, got"),
    ({**JOBSET, "INTELLECT3_COORDINATOR_PORT": "99999"}, "COORDINATOR_PORT: .* from 1 to 65535"),
    ({**PLAIN, "INTELLECT3_COORDINATOR": "node1:70000"}, "COORDINATOR: expected host:port, a port"),
    ({**PLAIN, "INTELLECT3_LAUNCHER": "slurm"}, "INTELLECT3_LAUNCHER: expected environment or"),
    (
      {**BY_HAND, **SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "8"},
      "INTELLECT3_NUM_PROCESSES: expected 8, the tasks of this Slurm step, or a multiple, got 4",
    ),
    (
      {**BY_HAND, **TASK, "SLURM_PROCID": "1"},
      "INTELLECT3_PROCESS_ID: expected 1 in task SLURM_PROCID = 1 of 4, got 2",
    ),
    (
      {**BY_HAND, **TASK, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
      "INTELLECT3_PROCESS_ID: expected 0 to 1 in task SLURM_PROCID = 0 of 2, got 2",
    ),
    ({**JOBSET, "JOB_COMPLETION_INDEX": "16"}, "JOB_COMPLETION_INDEX: expected below .* 16"),
    ({**JOBSET, "INTELLECT3_PROCESS_ID": "2"}, "INTELLECT3_PROCESS_ID: .* = 3, got 2"),
    (
      {"JOBSET_NAME": "glm", "JOB_COMPLETION_INDEX": "0"},
      "REPLICATED_JOB_NAME: expected a value beside JOBSET_NAME=glm",
    ),
    ({**SLURM, "SLURM_PROCID": "16"}, "SLURM_PROCID: expected below the number of .* 16, got 16"),
    ({**SLURM, "SLURM_STEP_NODELIST": "[1-2]"}, "SLURM_STEP_NODELIST: expected a list of nodes"),
    ({**SLURM, "SLURM_STEP_NODELIST": "a[1-2],b["}, "SLURM_STEP_NODELIST: expected a list of"),
    ({**SLURM, "SLURM_STEP_NODELIST": "a[1-]"}, "SLURM_STEP_NODELIST: expected a list of nodes"),
    (
      {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0"},
      "SLURM_STEP_NUM_TASKS: expected the step's number",
    ),
  ],
)
def test_what_contradicts_itself_is_named_in_one_line(environ, message):
  with pytest.raises(ValueError, match=message) as failure:
    cluster.detect(environ)
  assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
  ("nodes", "host"),
  [
    ("node1", "node1"),
    ("gpu-7.rack,gpu-8", "gpu-7.rack"),
    ("a[03,05-07]", "a03"),
    ("h100-[012-019]-ib,x", "h100-012-ib"),
    ("a[01-03,07]b", "a01b"),
    ("rack[1-2]node[3-4]", "rack1node3"),
    ("rack[01,03-04]gpu[007-012,020].ib,other[3]", "rack01gpu007.ib"),
  ],
)
def test_the_first_host_of_a_list(nodes, host):
  assert cluster.first_host(nodes) == host
