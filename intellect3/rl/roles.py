"""What the roles of a run share, and how one of them, or all on this machine, are started.

Every role is built before any is started: builders check their parameters and return what does the
work, so a bad value anywhere ends the command with one line and nothing begun.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

from intellect3 import console as console_lib
from intellect3 import summary, supervisor, types
from intellect3.distributed import cluster as clusters
from intellect3.environments import base as environments_base
from intellect3.inference import launch
from intellect3.rendering import base as rendering_base
from intellect3.rl import checks
from intellect3.rl.checks import NotStarted

__all__ = ["ROLES", "Main", "NotStarted", "Shared", "Trainer", "run"]

ROLES = ("trainer", "orchestrator", "worker", "inference")


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
    router: what the model's routers choose of, where the trainer replays the servers' choices;
      None: it chooses for itself.
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
  router: types.RouterShape | None = None

  @property
  def log_dir(self) -> pathlib.Path:
    """The RolloutLog."""
    return self.run_dir / "rollouts"

  @property
  def journal_dir(self) -> pathlib.Path:
    """The journals of unfinished rollouts."""
    return self.run_dir / "journal"

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


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A built trainer.

  Attributes:
    main: does the work of one of its processes.
    processes: that it is a program of; None: as many as are started.
  """

  main: Main
  processes: int | None = None

  def __call__(self) -> None:
    """Does the work."""
    self.main()


def run(
  *,
  run_dir: str,
  role: str,
  steps: int,
  model_path: str,
  renderer: rendering_base.Renderer,
  environments: Sequence[environments_base.Environment],
  trainer: Callable[[Shared], Trainer],
  orchestrator: Callable[..., Main],
  worker: Callable[[Shared, int], Callable],
  inference: Callable[[Shared, int], Sequence[str]],
  max_off_policy_steps: int = 8,
  replay_routed_experts: bool = False,
  environment_weights: Mapping[str, float] | None = None,
  seed: int = 0,
  num_workers: int = 1,
  num_servers: int = 1,
  server_restarts: int = 3,
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
    replay_routed_experts: whether servers tell which experts computed each token, and the trainer
      takes the same ones (weighted by its own scores); for a mixture of experts only.
    environment_weights: by environment name; equal shares by default.
    seed: run seed.
    num_workers: worker processes; 0 runs one worker inside the orchestrator.
    num_servers: servers started by `all`; the run goes on while one of them lives.
    server_restarts: how many times `all` starts each of them again after it failed, on its port and
      after a wait that doubles.
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
  if role not in ("all", *ROLES):
    raise NotStarted(f"role: expected one of {('all', *ROLES)}, got {role!r}")
  checks.path("run_dir", run_dir)
  checks.path("model_path", model_path)
  directory = pathlib.Path(run_dir)
  checks.run_directory(directory, resume=resume, role=role)
  for field, value, least, most in (
    ("steps", steps, 1, None),
    ("max_off_policy_steps", max_off_policy_steps, 0, None),
    ("seed", seed, 0, 2**63 - 1),
    ("num_workers", num_workers, 0, None),
    ("num_servers", num_servers, 1, None),
    ("server_restarts", server_restarts, 0, None),
    ("orchestrator_port", orchestrator_port, 0, 65535),
    ("server_port", server_port, 0, 65535),
  ):
    checks.integer(field, value, least, most)
  by_name = checks.by_name(environments)
  if environment_weights is None:
    environment_weights = dict.fromkeys(by_name, 1.0)
  checks.environment_weights(environment_weights, by_name)
  if not isinstance(replay_routed_experts, bool):
    raise NotStarted(f"replay_routed_experts: expected a bool, got {replay_routed_experts!r}")
  if isinstance(server_urls, str):
    raise NotStarted(f"server_urls: expected a list, got {server_urls!r}")
  orchestrator_port, urls = _addresses(
    role, host, orchestrator_port, server_port, num_servers, server_urls
  )
  if role == "worker" and not num_workers:
    raise NotStarted("num_workers: expected at least 1 for role worker, got 0")
  if role in ("worker", "inference"):
    checks.integer("index", index, 0, (num_workers if role == "worker" else len(urls)) - 1)
  shared = Shared(
    run_dir=directory,
    steps=steps,
    seed=seed,
    max_off_policy_steps=max_off_policy_steps,
    model_path=pathlib.Path(model_path),
    renderer=renderer,
    environments=by_name,
    environment_weights=environment_weights,
    resume=resume,
    num_workers=num_workers,
    orchestrator_url=f"http://{host}:{orchestrator_port}",
    server_urls=urls,
    router=checks.router_shape(pathlib.Path(model_path)) if replay_routed_experts else None,
  )
  if role == "trainer":
    built = trainer(shared)
    _check_processes(built)
    return built
  if role == "orchestrator":
    return _orchestrator_main(shared, orchestrator(shared, worker(shared, 0)), config_text)
  if role == "worker":
    return _worker_main(shared, worker(shared, index))
  if role == "inference":
    return _exec(inference(shared, index))
  # Built for their checks; the children build their own.
  built = trainer(shared)
  orchestrator(shared, worker(shared, 0))
  started = () if server_urls else range(num_servers)
  servers = [inference(shared, number) for number in started]
  arguments = [
    *("--set", f"rl.run.orchestrator_port={orchestrator_port}"),
    *("--set", f"rl.run.server_urls={list(shared.server_urls)!r}"),
    *(["--resume"] if resume else []),
  ]
  children = _children(
    shared, [*command, *arguments], servers, server_restarts, built.processes or 1
  )
  return lambda: _start_all(shared, children, config_text)


def _check_processes(built: Trainer) -> None:
  """Refuses an environment that is not fit, or that starts another number of trainers than said."""
  found = clusters.detect(os.environ)
  count = 1 if found is None else found.num_processes
  if built.processes not in (None, count):
    told = "no variable of a launcher" if found is None else f"{count} by {found.launcher}"
    raise NotStarted(
      f"trainer.processes: expected as many as are started ({told}), got {built.processes}"
    )


def _addresses(
  role: str,
  host: str,
  orchestrator_port: int,
  server_port: int,
  num_servers: int,
  server_urls: Sequence[str],
) -> tuple[int, tuple[str, ...]]:
  """The orchestrator's port and the servers' urls; what this process will listen on is free."""
  listens = role in ("all", "orchestrator")
  if listens:
    checks.host(host)
  if role == "all":
    drawn = checks.free_ports(host, 1 + num_servers)
    orchestrator_port = orchestrator_port or drawn[0]
    ports = [server_port + n for n in range(num_servers)] if server_port else drawn[1:]
  elif not orchestrator_port or not (server_port or server_urls):
    raise NotStarted(
      f"orchestrator_port, server_port: expected set for role {role}, "
      f"got {orchestrator_port}, {server_port}"
    )
  else:
    ports = [server_port + n for n in range(num_servers)]
  urls = tuple(server_urls) or tuple(f"http://{host}:{port}" for port in ports)
  checks.addresses(f"http://{host}:{orchestrator_port}", urls)
  if listens:
    launch.check_port_free(host, orchestrator_port)
  for port in ports if role == "all" and not server_urls else ():
    launch.check_port_free(host, port)
  return orchestrator_port, urls


def _orchestrator_main(shared: Shared, main: Main, config_text: str) -> Main:
  """Keeps the configuration first, where `all` has not: of the roles there is one orchestrator."""

  def start() -> None:
    config = shared.run_dir / "config.gin"
    if not config.exists():
      shared.run_dir.mkdir(parents=True, exist_ok=True)
      config.write_text(config_text)
    main()

  return start


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
  shared: Shared,
  command: Sequence[str],
  servers: Sequence[Sequence[str]],
  server_restarts: int,
  trainers: int,
) -> list[supervisor.Child]:
  logs = shared.run_dir / "logs"

  # Said also of one: a cluster's own variables may be there, and are not about these processes.
  coordinator = f"127.0.0.1:{checks.free_ports('127.0.0.1', 1)[0]}"

  def child(name: str, argv: Sequence[str], *, ends_run: bool = False) -> supervisor.Child:
    return supervisor.Child(name=name, command=argv, log=logs / f"{name}.log", ends_run=ends_run)

  return [
    *(
      dataclasses.replace(child(f"server_{n}", server), group="servers", restarts=server_restarts)
      for n, server in enumerate(servers)
    ),
    *(
      dataclasses.replace(
        child("trainer" if not n else f"trainer_{n}", [*command, "--role", "trainer"]),
        ends_run=True,
        environment=clusters.variables(coordinator, trainers, n),
      )
      for n in range(trainers)
    ),
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
