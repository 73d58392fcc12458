"""What the orchestrator role has outside its own memory: weights, log, list of servers, people.

Place in the ring: composition. A run finds all of it in its directory (`of_run`); a simulator
brings its own. Behind these the wiring of `rl.conducting` is the same.
"""

import asyncio
import dataclasses
import json
import logging
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from intellect3 import rollout_log, summary, telemetry, types
from intellect3.inference import transport
from intellect3.rl.roles import Shared
from intellect3.rl.servers import ServerList
from intellect3.rollouts import journal
from intellect3.weights import manifest as manifests

logger = logging.getLogger(__name__)


class Weights(Protocol):
  """The published versions."""

  def latest(self) -> int | None:
    """The newest, or None."""

  def directory(self, version: int) -> pathlib.Path:
    """Where servers read a version: an absolute path."""

  def read(self, version: int) -> manifests.WeightsManifest:
    """Its manifest; raises FileNotFoundError where it is not there (any more)."""

  async def verify(self, version: int) -> Sequence[str]:
    """What of its bytes is not as its manifest says."""


class Log(Protocol):
  """The RolloutLog's commits, and the count of dispatches beside it."""

  def left(self) -> "Left":
    """What a process before this one left; what it did not commit is removed."""

  async def commit(self, manifest: types.Manifest) -> None:
    """Makes a batch visible."""

  def is_committed(self, step: int) -> bool:
    """Whether a step's batch is visible."""

  def dispatched(self, total: int) -> None:
    """Keeps how many rollouts were dispatched in all."""

  def distrusted(self, url: str, version: int) -> None:
    """Keeps that what a server made with this version or a newer one is not to be trusted."""

  def complete(self) -> None:
    """The run is: nobody will go on with a rollout that did not end."""


class Reporter(Protocol):
  """Who is told how the run goes."""

  def step(self, step: int, row: Mapping[str, float]) -> None:
    """Takes a step's metrics row."""

  def evaluation(self, version: int, row: Mapping[str, float]) -> None:
    """Takes the scores of an evaluation."""

  def status(self, phase: str, detail: Mapping[str, Any]) -> None:
    """Takes the phase that the run is in."""

  def truncate_after(self, step: int) -> None:
    """Drops the rows of later steps: they will be made again."""

  def close(self) -> None:
    """Ends it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
  """What a resume finds.

  Attributes:
    step: the last that was committed; 0 for none.
    scheduler_state: of its manifest.
    dispatched: rollouts dispatched in all.
    distrusted: (url, oldest version) of servers whose rollouts are not to be trusted.
    lives: processes that orchestrated the run before this one.
  """

  step: int = 0
  scheduler_state: Mapping[str, Any] | None = None
  dispatched: int = 0
  distrusted: Sequence[tuple[str, int]] = ()
  lives: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outside:
  """All of it.

  Attributes:
    http: carries requests to servers.
    weights: the published versions.
    log: the batches.
    servers: the list of servers as of now.
    reporter: who is told.
    nonce: a word that no process of this run has said before.
  """

  http: transport.Transport
  weights: Weights
  log: Log
  servers: Callable[[], Sequence[str]]
  reporter: Reporter
  nonce: Callable[[], str]

  def __enter__(self) -> "Outside":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
  ) -> None:
    self.reporter.close()


def nonce() -> str:
  """16 random hexadecimal digits."""
  return secrets.token_hex(8)


def of_run(shared: Shared) -> Outside:
  """A run's own: its directory, and HTTP. Writes the list of servers."""
  return Outside(
    http=transport.HttpTransport(),
    weights=WeightsOnDisk(shared.weights_dir),
    log=LogOnDisk(shared.log_dir, shared.journal_dir),
    servers=ServerList(shared.run_dir, shared.server_urls, shared.orchestrator_url),
    reporter=Files(shared.run_dir),
    nonce=nonce,
  )


class WeightsOnDisk:
  """Implements `Weights` over a directory."""

  def __init__(self, weights_dir: pathlib.Path) -> None:
    self._root = weights_dir

  def latest(self) -> int | None:
    """See Weights."""
    return manifests.latest(self._root)

  def directory(self, version: int) -> pathlib.Path:
    """See Weights."""
    return manifests.version_directory(self._root, version).absolute()

  def read(self, version: int) -> manifests.WeightsManifest:
    """See Weights."""
    return manifests.read(self._root, version)

  async def verify(self, version: int) -> Sequence[str]:
    """See Weights; reads every byte, in a thread."""
    return await asyncio.to_thread(manifests.verify, self.directory(version))


def last_batch(log_dir: pathlib.Path) -> types.Manifest | None:
  """The manifest of the last batch of a log, or None."""
  committed = rollout_log.committed_steps(log_dir)
  return rollout_log.read_manifest(log_dir, committed[-1]) if committed else None


class LogOnDisk:
  """Implements `Log` over a directory."""

  def __init__(self, log_dir: pathlib.Path, journal_dir: pathlib.Path) -> None:
    self._root = log_dir
    self._dispatched = log_dir / "dispatched"
    self._lives = log_dir / "lives"
    self._distrusted = log_dir / "distrusted.jsonl"
    self._journal_dir = journal_dir

  def left(self) -> Left:
    """See Log."""
    total = int(self._dispatched.read_text() or 0) if self._dispatched.exists() else 0
    for name in rollout_log.remove_uncommitted(self._root):
      logger.warning("removed %s: it was never committed", name)
    lives = 1 + (int(self._lives.read_text() or 0) if self._lives.exists() else 0)
    self._keep(self._lives, lives)
    left = Left(dispatched=total, distrusted=self._read_distrusted(), lives=lives)
    manifest = last_batch(self._root)
    if manifest is None:
      return left
    return dataclasses.replace(left, step=manifest.step, scheduler_state=manifest.scheduler_state)

  def _read_distrusted(self) -> list[tuple[str, int]]:
    if not self._distrusted.exists():
      return []
    lines = self._distrusted.read_text().splitlines(keepends=True)
    pairs = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut
    return [(url, version) for url, version in pairs]

  async def commit(self, manifest: types.Manifest) -> None:
    """See Log."""
    rollout_log.commit_manifest(self._root, manifest)

  def is_committed(self, step: int) -> bool:
    """See Log."""
    return rollout_log.read_manifest(self._root, step) is not None

  def dispatched(self, total: int) -> None:
    """See Log."""
    self._keep(self._dispatched, total)

  def _keep(self, path: pathlib.Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(str(count))
    temporary.rename(path)

  def distrusted(self, url: str, version: int) -> None:
    """See Log."""
    self._distrusted.parent.mkdir(parents=True, exist_ok=True)
    with self._distrusted.open("a") as file:
      file.write(f"{json.dumps([url, version])}\n")

  def complete(self) -> None:
    """See Log."""
    journal.clear(self._journal_dir)


class Files:
  """Implements `Reporter`: metrics files, `status.json`, the role's log."""

  def __init__(self, run_dir: pathlib.Path) -> None:
    self._run_dir = run_dir
    self._steps = telemetry.MetricsWriter(run_dir, "orchestrator")
    self._evaluations = telemetry.MetricsWriter(run_dir, "evaluation")

  def step(self, step: int, row: Mapping[str, float]) -> None:
    """See Reporter."""
    self._steps.write(step, row)

  def evaluation(self, version: int, row: Mapping[str, float]) -> None:
    """See Reporter."""
    self._evaluations.write(version, row)

  def status(self, phase: str, detail: Mapping[str, Any]) -> None:
    """See Reporter."""
    logger.info("%s %s", phase, dict(detail))
    summary.write_status(self._run_dir, phase, detail)

  def truncate_after(self, step: int) -> None:
    """See Reporter."""
    self._steps.truncate_after(step)

  def close(self) -> None:
    """See Reporter."""
    self._steps.close()
    self._evaluations.close()
