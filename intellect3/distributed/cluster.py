"""Who is who: the number of processes, this one's number and the coordinator, from the environment.

Place in the ring: read by the entry points before anything touches a device. Plain variables go
first, then a Kubernetes JobSet, then a Slurm step; without any of them a program is one process.
docs/clusters.md says how each is launched. No jax.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

COORDINATOR = "INTELLECT3_COORDINATOR"
NUM_PROCESSES = "INTELLECT3_NUM_PROCESSES"
PROCESS_ID = "INTELLECT3_PROCESS_ID"
COORDINATOR_PORT = "INTELLECT3_COORDINATOR_PORT"
LAUNCHER = "INTELLECT3_LAUNCHER"
LOCAL_DEVICES = "INTELLECT3_LOCAL_DEVICES"
START_SECONDS = "INTELLECT3_START_SECONDS"
HEARTBEAT_SECONDS = "INTELLECT3_HEARTBEAT_SECONDS"
SHUTDOWN_SECONDS = "INTELLECT3_SHUTDOWN_SECONDS"

JOBSET_NAME, JOBSET_JOB, JOB_INDEX = "JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX"
SLURM_ID, SLURM_RANK, SLURM_NODES = "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"
SLURM_COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")

DEFAULT_PORT = 8476
_MOST_PORT = 65535
_SLURM_PORTS = (61440, 4096)
"""First and number of the ports of which a Slurm job's id chooses one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """One process's place among those of its program.

  Attributes:
    launcher: what said so: `environment`, `jobset` or `slurm`.
    coordinator: host:port of process 0, where the processes meet.
    num_processes: of the program.
    process_id: this one's, from 0.
    local_devices: which of the host's accelerators are this process's; None: all it sees.
    start_seconds: how long the others may take to appear.
    heartbeat_seconds: after so long without a sign of life a process counts as dead, and the others
      are ended.
    shutdown_seconds: how long the first to finish waits for the last.
  """

  launcher: str
  coordinator: str
  num_processes: int
  process_id: int
  local_devices: tuple[int, ...] | None = None
  start_seconds: int = 600
  heartbeat_seconds: int = 60
  shutdown_seconds: int = 300


def detect(environ: Mapping[str, str]) -> Cluster | None:
  """The place of this process, or None where nothing says that there are several.

  Args:
    environ: the environment's variables.

  Raises:
    ValueError: a variable is missing, no number, or contradicts another; one line that names it.
  """
  if environ.get(LAUNCHER, "environment") != "environment":
    raise ValueError(f"{LAUNCHER}: expected environment or none, got {environ[LAUNCHER]!r}")
  numbers: dict[str, Any] = {
    "local_devices": _devices(environ),
    "start_seconds": _number(environ, START_SECONDS, 1, Cluster.start_seconds),
    "heartbeat_seconds": _number(environ, HEARTBEAT_SECONDS, 1, Cluster.heartbeat_seconds),
    "shutdown_seconds": _number(environ, SHUTDOWN_SECONDS, 1, Cluster.shutdown_seconds),
  }
  _number(environ, COORDINATOR_PORT, 1, DEFAULT_PORT, most=_MOST_PORT)
  plain = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
  in_jobset = JOB_INDEX in environ and JOBSET_NAME in environ
  if in_jobset and COORDINATOR not in environ:
    launcher, place = "jobset", _jobset(environ)
  elif any(name in environ for name in plain):
    launcher, place = "environment", _plain(environ, plain)
  elif SLURM_NODES in environ and SLURM_RANK in environ:
    launcher, place = "slurm", _slurm(environ)
  else:
    return None
  coordinator, count, index = place
  if index >= count:
    raise ValueError(
      f"{_INDEX_OF[launcher]}: expected below the number of processes, {count}, got {index}"
    )
  return Cluster(
    launcher=launcher,
    coordinator=coordinator,
    num_processes=count,
    process_id=index,
    **numbers,
  )


_INDEX_OF = {"environment": PROCESS_ID, "jobset": JOB_INDEX, "slurm": SLURM_RANK}


def variables(coordinator: str, num_processes: int, process_id: int) -> dict[str, str]:
  """The plain variables that `detect` reads, for whoever starts the processes itself."""
  return {
    LAUNCHER: "environment",
    COORDINATOR: coordinator,
    NUM_PROCESSES: str(num_processes),
    PROCESS_ID: str(process_id),
  }


def _plain(environ: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, int, int]:
  for name in names:
    if name not in environ:
      given = ", ".join(f"{other}={environ[other]}" for other in names if other in environ)
      raise ValueError(f"{name}: expected a value beside {given}, got none")
  address = environ[COORDINATOR]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) <= _MOST_PORT:
    raise ValueError(
      f"{COORDINATOR}: expected host:port, a port from 1 to {_MOST_PORT}, got {address!r}"
    )
  count, index = _number(environ, NUM_PROCESSES, 1), _number(environ, PROCESS_ID, 0)
  if LAUNCHER not in environ:
    _check_step(environ, count, index)
  return address, count, index


def _check_step(environ: Mapping[str, str], count: int, index: int) -> None:
  """Refuses plain variables that were exported for a step of several tasks, the same to all.

  A task may start several processes itself. Outside a step, or in one of a single task (which a
  shell may be), whoever set the plain variables is believed.
  """
  if SLURM_NODES not in environ or SLURM_RANK not in environ:
    return
  tasks, rank = _step_tasks(environ), _number(environ, SLURM_RANK, 0)
  each = count // tasks
  if tasks == 1 or (count % tasks == 0 and index // each == rank):
    return
  if count % tasks:
    raise ValueError(
      f"{NUM_PROCESSES}: expected {tasks}, the tasks of this Slurm step, or a multiple, got {count}"
    )
  expected = f"{rank}" if each == 1 else f"{rank * each} to {rank * each + each - 1}"
  raise ValueError(
    f"{PROCESS_ID}: expected {expected} in task {SLURM_RANK} = {rank} of {tasks}, got {index}"
  )


def _jobset(environ: Mapping[str, str]) -> tuple[str, int, int]:
  for name in (JOBSET_JOB, NUM_PROCESSES):
    if name not in environ:
      raise ValueError(
        f"{name}: expected a value beside {JOBSET_NAME}={environ[JOBSET_NAME]}, got none"
      )
  index = _number(environ, JOB_INDEX, 0)
  if PROCESS_ID in environ and _number(environ, PROCESS_ID, 0) != index:
    raise ValueError(f"{PROCESS_ID}: expected {JOB_INDEX} = {index}, got {environ[PROCESS_ID]}")
  name = environ[JOBSET_NAME]
  # A JobSet gives each pod the name JOBSET-JOB-0-INDEX.JOBSET; the program is one of its jobs.
  host = f"{name}-{environ[JOBSET_JOB]}-0-0.{name}"
  port = _number(environ, COORDINATOR_PORT, 1, DEFAULT_PORT)
  return f"{host}:{port}", _number(environ, NUM_PROCESSES, 1), index


def _slurm(environ: Mapping[str, str]) -> tuple[str, int, int]:
  tasks = _step_tasks(environ)
  first, count = _SLURM_PORTS
  chosen = first + _number(environ, SLURM_ID, 0, 0) % count
  port = _number(environ, COORDINATOR_PORT, 1, chosen)
  return (
    f"{first_host(environ[SLURM_NODES])}:{port}",
    tasks,
    _number(environ, SLURM_RANK, 0),
  )


def _step_tasks(environ: Mapping[str, str]) -> int:
  for name in SLURM_COUNTS:
    if name in environ:
      return _number(environ, name, 1)
  raise ValueError(f"{SLURM_COUNTS[0]}: expected the step's number of tasks, got none")


_HOST = r"[\w.-](?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])*"


def first_host(nodes: str) -> str:
  """The first host of a Slurm node list: `rack1gpu007` of `rack[1-2]gpu[007-012,020],other3`.

  Raises:
    ValueError: it is none.
  """
  match = re.fullmatch(f"({_HOST})(?:,{_HOST})*", nodes)
  if match is None:
    raise ValueError(f"{SLURM_NODES}: expected a list of nodes, got {nodes!r}")
  return re.sub(r"\[(\d+)[^]]*\]", r"\1", match[1])


def _devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
  given = environ.get(LOCAL_DEVICES)
  if given is None:
    return None
  numbers = given.split(",")
  if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
    raise ValueError(f"{LOCAL_DEVICES}: expected numbers like 0,1, got {given!r}")
  return tuple(map(int, numbers))


def _number(
  environ: Mapping[str, str],
  name: str,
  least: int,
  default: int | None = None,
  most: int | None = None,
) -> int:
  given = environ.get(name)
  if given is None and default is not None:
    return default
  fits = given is not None and given.isdecimal() and int(given) >= least
  if given is None or not fits or (most is not None and int(given) > most):
    bound = f">= {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name}: expected an integer {bound}, got {given!r}")
  return int(given)
