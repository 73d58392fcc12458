"""What the roles of a run share, and how one of them, or all on this machine, are started.

Every role is built before any is started: builders check their parameters and return what does the
work, so a bad value anywhere ends the command with one line and nothing begun.
"""

import dataclasses
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from intellect3 import console as console_lib
from intellect3 import summary, supervisor
from intellect3.environments import base as environments_base
from intellect3.inference import launch
from intellect3.rendering import base as rendering_base

ROLES = ("trainer", "orchestrator", "worker", "inference")


class NotStarted(ValueError):
  """The run cannot start: the configuration or the machine is not fit. Nothing was begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """What every role of a run knows.

  Attributes:
    run_dir: the directory that the roles share.
    steps: last training step.
    seed: run seed; every random choice follows from it.
    max_off_policy_steps: bound on the staleness of a trained token.
    model_path: Hugging Face directory of the initial weights.
    renderer: chat format of the model.
    environments: by name.
    environment_weights: share of the dispatches of each.
    resume: go on from what the run directory holds.
    num_workers: worker processes; 0 means one worker inside the orchestrator.
    orchestrator_url: where workers and the trainer reach the orchestrator.
    server_urls: the inference servers.
  """

  run_dir: pathlib.Path
  steps: int
  seed: int
  max_off_policy_steps: int
  model_path: pathlib.Path
  renderer: rendering_base.Renderer
  environments: Mapping[str, environments_base.Environment]
  environment_weights: Mapping[str, float]
  resume: bool
  num_workers: int
  orchestrator_url: str
  server_urls: Sequence[str]

  @property
  def log_dir(self) -> pathlib.Path:
    """The RolloutLog."""
    return self.run_dir / "rollouts"

  @property
  def weights_dir(self) -> pathlib.Path:
    """The published weights."""
    return self.run_dir / "weights"

  @property
  def checkpoint_dir(self) -> pathlib.Path:
    """The trainer's checkpoints."""
    return self.run_dir / "checkpoints"


Main = Callable[[], None]
"""Does a role's work until it is done; built, and its parameters checked, beforehand."""


def run(
  *,
  run_dir: str,
  role: str,
  steps: int,
  model_path: str,
  renderer: rendering_base.Renderer,
  environments: Sequence[environments_base.Environment],
  trainer: Callable[[Shared], Main],
  orchestrator: Callable[..., Main],
  worker: Callable[[Shared, int], Callable],
  inference: Callable[[Shared, int], Sequence[str]],
  max_off_policy_steps: int = 8,
  environment_weights: Mapping[str, float] | None = None,
  seed: int = 0,
  num_workers: int = 1,
  num_servers: int = 1,
  host: str = "127.0.0.1",
  orchestrator_port: int = 0,
  server_port: int = 0,
  server_urls: Sequence[str] = (),
  index: int = 0,
  resume: bool = False,
  config_text: str = "",
  command: Sequence[str] = (),
) -> Main:
  """Checks a run and returns what starts the role asked for.

  Args:
    run_dir: directory of the run.
    role: one of `ROLES`, or `all`: every role on this machine, supervised.
    steps: last training step.
    model_path: Hugging Face directory of the initial weights.
    renderer: chat format of the model.
    environments: what is attempted.
    trainer: builds the trainer, `intellect3.rl.trainer.trainer` with its parameters bound.
    orchestrator: builds the orchestrator.
    worker: builds a worker's factory.
    inference: gives the command line of a server.
    max_off_policy_steps: bound on the staleness of a trained token, in steps; 0 is the synchronous
      loop.
    environment_weights: by environment name; equal shares by default.
    seed: run seed.
    num_workers: worker processes; 0 runs one worker inside the orchestrator.
    num_servers: servers started by `all`; ports follow one another.
    host: address of the orchestrator and of servers started by `all`.
    orchestrator_port: 0 with `all` takes any free port.
    server_port: of the first server; 0 with `all` takes free ports.
    server_urls: servers that run already; then none is started.
    index: of a worker or server among its kind.
    resume: go on from what `run_dir` holds.
    config_text: the configuration, kept as `config.gin`.
    command: argument vector that starts one role when `--role` and its arguments are appended.

  Raises:
    NotStarted, ValueError, TypeError: something is not fit; the message is one line.
  """
  directory = pathlib.Path(run_dir)
  check_run_directory(directory, resume=resume, role=role)
  if steps < 1:
    raise NotStarted(f"steps: expected at least 1, got {steps}")
  if num_workers < 0 or (num_servers < 1 and not server_urls):
    raise NotStarted(
      f"num_workers, num_servers: expected >= 0 and >= 1, got {num_workers}, {num_servers}"
    )
  by_name = {environment.name: environment for environment in environments}
  if not by_name or len(by_name) != len(environments):
    raise NotStarted(
      f"environments: expected at least one, each name once, got {[e.name for e in environments]}"
    )
  if role == "all":
    orchestrator_port = orchestrator_port or free_port(host)
    ports = [server_port + n if server_port else free_port(host) for n in range(num_servers)]
    for port in [orchestrator_port, *([] if server_urls else ports)]:
      launch.check_port_free(host, port)
  elif not orchestrator_port or not (server_port or server_urls):
    raise NotStarted(
      f"orchestrator_port, server_port: expected set for role {role}, "
      f"got {orchestrator_port}, {server_port}"
    )
  else:
    ports = [server_port + n for n in range(num_servers)]
  shared = Shared(
    run_dir=directory,
    steps=steps,
    seed=seed,
    max_off_policy_steps=max_off_policy_steps,
    model_path=pathlib.Path(model_path),
    renderer=renderer,
    environments=by_name,
    environment_weights=environment_weights or dict.fromkeys(by_name, 1.0),
    resume=resume,
    num_workers=num_workers,
    orchestrator_url=f"http://{host}:{orchestrator_port}",
    server_urls=tuple(server_urls) or tuple(f"http://{host}:{port}" for port in ports),
  )
  if role == "trainer":
    return trainer(shared)
  if role == "orchestrator":
    return orchestrator(shared, worker(shared, 0))
  if role == "worker":
    return _worker_main(shared, worker(shared, index))
  if role == "inference":
    return _exec(inference(shared, index))
  if role != "all":
    raise NotStarted(f"role: expected one of {('all', *ROLES)}, got {role!r}")
  # Built for their checks; the children build their own.
  trainer(shared)
  orchestrator(shared, worker(shared, 0))
  started = () if server_urls else range(num_servers)
  servers = [inference(shared, number) for number in started]
  arguments = [
    *("--set", f"rl.run.orchestrator_port={orchestrator_port}"),
    *("--set", f"rl.run.server_urls={list(shared.server_urls)!r}"),
    *(["--resume"] if resume else []),
  ]
  children = _children(shared, [*command, *arguments], servers)
  return lambda: _start_all(shared, children, config_text)


def check_run_directory(directory: pathlib.Path, *, resume: bool, role: str) -> None:
  """Refuses to write into another run's directory, or to resume what is not there."""
  begun = (directory / "config.gin").exists() or (directory / "metrics").exists()
  if role != "all":
    return  # the roles of one run share the directory
  if begun and not resume:
    raise NotStarted(f"{directory}: a run is there already; give --resume, or another --out")
  if resume and not begun:
    raise NotStarted(f"{directory}: there is no run to resume")


def free_port(host: str) -> int:
  """A port that nothing listens on now."""
  with socket.socket() as probe:
    probe.bind((host, 0))
    return probe.getsockname()[1]


def _exec(command: Sequence[str]) -> Main:
  return lambda: os.execvp(command[0], list(command))


def _worker_main(shared: Shared, make_worker: Callable) -> Main:
  import asyncio

  from intellect3.rollouts import link

  def main() -> None:
    url = shared.orchestrator_url
    asyncio.run(link.run_remote_worker(url, make_worker, patience_seconds=120.0))

  return main


def _children(
  shared: Shared, command: Sequence[str], servers: Sequence[Sequence[str]]
) -> list[supervisor.Child]:
  logs = shared.run_dir / "logs"

  def child(name: str, argv: Sequence[str], *, ends_run: bool = False) -> supervisor.Child:
    return supervisor.Child(name=name, command=argv, log=logs / f"{name}.log", ends_run=ends_run)

  return [
    *(child(f"server_{n}", server) for n, server in enumerate(servers)),
    child("trainer", [*command, "--role", "trainer"], ends_run=True),
    child("orchestrator", [*command, "--role", "orchestrator"], ends_run=True),
    *(
      child(f"worker_{n}", [*command, "--role", "worker", "--index", str(n)], ends_run=True)
      for n in range(shared.num_workers)
    ),
  ]


def _start_all(shared: Shared, children: Sequence[supervisor.Child], config_text: str) -> None:
  started = time.monotonic()
  shared.run_dir.mkdir(parents=True, exist_ok=True)
  (shared.run_dir / "config.gin").write_text(config_text)
  (shared.run_dir / "status.json").unlink(missing_ok=True)
  console = console_lib.Console(shared.run_dir, shared.steps)
  try:
    supervisor.supervise(children, tick=console.tick)
  finally:
    console.close()
  result = summary.write(shared.run_dir, time.monotonic() - started)
  print(summary.one_line(result), flush=True)
