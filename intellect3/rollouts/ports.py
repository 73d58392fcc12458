"""What the orchestrator sees of the world: its workers, servers, weights, disk, and people.

Behind these the production code and a simulator look the same to it.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from intellect3 import types
from intellect3.rollouts import messages


class Link(Protocol):
  """A connected worker, as the orchestrator sees it."""

  name: str

  def post(self, message: messages.ToWorker) -> None:
    """Sends without waiting."""


class RunFailed(RuntimeError):
  """The run cannot go on; the message says why."""


class SyncResult(Protocol):
  """The part of `inference.weight_sync.SyncReport` that the orchestrator reads."""

  @property
  def healthy(self) -> Sequence[str]: ...

  @property
  def fenced(self) -> Mapping[str, str]: ...

  @property
  def lost(self) -> Sequence[str]: ...

  @property
  def seconds(self) -> float: ...

  @property
  def metrics(self) -> Mapping[str, float]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ports:
  """Everything outside the orchestrator's own memory.

  Attributes:
    next_version: waits until a version newer than its argument is published; returns the newest.
    sync: brings that version to the servers and checks it (contract 8); `Orchestrator.servers` is
      told of each server that has it.
    commit: makes a manifest visible.
    batch_committed: tells whoever waits that this step's batch is there.
    dispatched: keeps how many rollouts were dispatched in all, for the accounting of a restart.
    distrusted: keeps that what a server made with a version or a newer one is not to be trusted,
      for rollouts that a restart goes on with.
    report: takes a metrics row of a step.
    report_evaluation: takes the scores of an evaluation of a version.
    server_metrics: what the servers counted since the last call, for the metrics row of a step.
    status: takes the phase the run is in, for people.
  """

  next_version: Callable[[int], Awaitable[int]]
  sync: Callable[[int], Awaitable[SyncResult]]
  commit: Callable[[types.Manifest], Awaitable[None]]
  batch_committed: Callable[[int], None]
  dispatched: Callable[[int], None]
  distrusted: Callable[[str, int], None]
  report: Callable[[int, Mapping[str, float]], None]
  report_evaluation: Callable[[int, Mapping[str, float]], None]
  server_metrics: Callable[[], Mapping[str, float]]
  status: Callable[[str, Mapping[str, Any]], None]
