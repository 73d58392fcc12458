"""The orchestrator role at work: its parts, wired. What is outside of them comes behind protocols.

Place in the ring: composition. `rl.orchestrator` checks a run's parameters and starts this over the
run's directory and HTTP; the fault lab starts it over simulated ones, under a virtual clock.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from intellect3.rl import serving
from intellect3.rl.outside import Left, Outside
from intellect3.rl.roles import Shared
from intellect3.rollouts import link, scheduler
from intellect3.rollouts import orchestrator as orchestrator_lib

LOOK_SECONDS = 0.5
"""Between two looks at the published weights, where nobody tells of new ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The part of the orchestrator's parameters that the wiring reads.

  Attributes:
    serving: how weights are synced.
    weights_lag: versions that servers are kept behind the newest.
    evaluation_tasks: held-out tasks per environment.
    server_patience_seconds: how long the run waits for a server when there is none.
    worker_patience_seconds: how long for a worker, once all were there.
  """

  serving: serving.Settings
  weights_lag: int
  evaluation_tasks: int
  server_patience_seconds: float
  worker_patience_seconds: float


class Door(Protocol):
  """Where workers and the trainer come in."""

  async def start(self) -> None:
    """Lets them in."""

  def batch_committed(self, step: int) -> None:
    """Tells whoever waits that a step's batch is there."""

  async def close(self) -> None:
    """Sends what is posted, then ends every connection."""


MakeDoor = Callable[[orchestrator_lib.Orchestrator, Callable[[int], None]], Door]
"""Builds the door from the orchestrator and what hears of published versions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """What an orchestrator is made of, its parameters checked.

  Attributes:
    shared: what the roles share.
    settings: see there.
    make_scheduler: builds the scheduler from the environments' training sizes.
    make_worker: a worker's factory, used where `shared.num_workers` is 0.
  """

  shared: Shared
  settings: Settings
  make_scheduler: Callable[[Mapping[str, int]], scheduler.Scheduler]
  make_worker: link.MakeWorker


async def conduct(parts: Parts, outside: Outside, make_door: MakeDoor) -> None:
  """Runs the orchestrator until the last step is trained; closes what it opened, `outside` too.

  Args:
    parts: see there.
    outside: see there.
    make_door: see there.

  Raises:
    rollouts.ports.RunFailed: the run cannot go on; the message says why.
    TimeoutError: a server of the start did not answer.
  """
  shared, settings = parts.shared, parts.settings
  published = asyncio.Event()
  closing: list[Callable[[int], None]] = []
  hands: list[serving.Serving] = []
  with outside:
    left = outside.log.left() if shared.resume else Left()
    if shared.resume:
      outside.reporter.truncate_after(left.step)
    orchestrator = orchestrator_lib.Orchestrator(
      make_scheduler=parts.make_scheduler,
      ports=orchestrator_lib.Ports(
        next_version=lambda version: _next_version(
          shared, outside, published, version, settings.weights_lag
        ),
        sync=lambda version: hands[0].sync(version),
        commit=outside.log.commit,
        batch_committed=lambda step: closing[0](step),
        dispatched=outside.log.dispatched,
        distrusted=outside.log.distrusted,
        report=outside.reporter.step,
        report_evaluation=outside.reporter.evaluation,
        server_metrics=lambda: hands[0].metrics(),
        status=outside.reporter.status,
      ),
      num_workers=max(1, shared.num_workers),
      steps=shared.steps,
      seed=shared.seed,
      server_patience_seconds=settings.server_patience_seconds,
      worker_patience_seconds=settings.worker_patience_seconds,
      evaluation_tasks=settings.evaluation_tasks,
      scheduler_state=left.scheduler_state,
      dispatched=left.dispatched,
      distrusted=left.distrusted,
      lives=left.lives,
    )
    door = make_door(orchestrator, lambda version: published.set())
    closing.append(door.batch_committed)
    hands.append(
      serving.Serving(
        shared,
        outside.http,
        settings.serving,
        orchestrator,
        weights=outside.weights,
        wanted=outside.servers,
        nonce=outside.nonce,
      )
    )
    await door.start()
    local: link.InProcessLink | None = None
    try:
      outside.reporter.status("starting servers", {})
      await hands[0].start()
      if shared.num_workers == 0:
        local = link.InProcessLink(orchestrator, parts.make_worker)
      await orchestrator.run()
      outside.log.complete()
    finally:
      if local is not None:
        await local.close()
      await hands[0].close()
      await door.close()
      await outside.http.close()


async def _next_version(
  shared: Shared, outside: Outside, published: asyncio.Event, version: int, weights_lag: int
) -> int:
  """Waits for weights newer than `version`: told by the trainer, or seen by looking."""
  while True:
    newest = outside.weights.latest()
    if newest is not None:
      served = serving.served_version(newest, lag=weights_lag, steps=shared.steps)
      if served > version:
        return served
    # Not `wait_for`: Python 3.11's loses a cancellation that comes together with the news.
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(LOOK_SECONDS):
        await published.wait()
    published.clear()


class SocketDoor:
  """Implements `Door` over `rollouts.link.OrchestratorServer`."""

  def __init__(self, server: link.OrchestratorServer, host: str, port: int) -> None:
    self._server = server
    self._host = host
    self._port = port

  async def start(self) -> None:
    """Listens; raises OSError where the port is taken."""
    await self._server.start(self._host, self._port)

  def batch_committed(self, step: int) -> None:
    """See Door."""
    self._server.batch_committed(step)

  async def close(self) -> None:
    """See Door."""
    await self._server.close()


def socket_door(shared: Shared, is_committed: Callable[[int], bool]) -> MakeDoor:
  """What listens at the orchestrator's address of a run."""

  def make(
    orchestrator: orchestrator_lib.Orchestrator, version_published: Callable[[int], None]
  ) -> Any:
    host, _, port = shared.orchestrator_url.removeprefix("http://").rpartition(":")
    server = link.OrchestratorServer(
      orchestrator,
      version_published=version_published,
      batch_exists=is_committed,
      poll_seconds=2.0,
    )
    return SocketDoor(server, host, int(port))

  return make
