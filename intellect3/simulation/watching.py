"""What a simulation is seen to do: kept for the report, and written out as a trace where asked.

A trace is JSON lines, each with the virtual second `t` and the `event`; the same run, scenario and
seeds give the same bytes in every process. Its events, in the order of a rollout's life:

    dispatched, asked (a turn, of which server), finished, and how it was accounted for: trained,
    filtered, stale, errored, cancelled
    batch (its rollouts, as workers are asked to write them), committed, stepped, published
    paused, loaded, synced (a server); server_lost, server_back, worker_lost, worker_back
    status, evaluated (the run)

Messages, and segments within a turn, are counted and not traced.
"""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intellect3.rollouts import accounting, messages


@dataclasses.dataclass(slots=True)
class Group:
  """When a group was dispatched, which of its rollouts run, and when the first one ended."""

  dispatched: float
  running: set[int]
  first: float | None = None


class Watch:
  """Collects. Belongs to one event loop.

  Args:
    group_size: rollouts of a group.
    trace: takes the lines of a trace; None for none.
    timeout_seconds: of a segment, as clients have it.

  Attributes:
    started: when the first weights had been brought to the servers; None before.
    rows: the orchestrator's metrics, by step.
    steps: of the trainer: marks on the clock, and the batch's tokens.
    commits: by step, when its batch was committed.
    lengths: sampled tokens of each rollout that ended well, by id.
    outcomes: (sampled tokens, outcome, tokens masked for staleness) of each that has ended.
    staleness: by step, the tokens of its batch by staleness.
    group_seconds: from a group's dispatch to the (first, last) end of a rollout.
    syncs: (version, url, from, to) of each server's sync.
    slow_segments: rollouts with a segment that took longer than clients wait.
  """

  def __init__(
    self,
    *,
    group_size: int,
    trace: Callable[[str], Any] | None,
    timeout_seconds: float,
  ) -> None:
    self._loop = asyncio.get_running_loop()
    self._group_size = group_size
    self._trace = trace
    self._timeout_seconds = timeout_seconds
    self._groups: dict[int, Group] = {}
    self._masked: dict[int, int] = {}
    self.started: float | None = None
    self.rows: dict[int, Mapping[str, float]] = {}
    self.steps: dict[int, Mapping[str, float]] = {}
    self.commits: dict[int, float] = {}
    self.lengths: dict[int, int] = {}
    self.outcomes: list[tuple[int, str, int]] = []
    self.staleness: dict[int, collections.Counter[int]] = {}
    self._attempts: dict[int, int] = {}  # by step, the last at its batch
    self.group_seconds: list[tuple[float, float]] = []
    self.syncs: list[tuple[int, str, float, float]] = []
    self.slow_segments = 0
    self.events = 0

  def event(self, event: str, /, **fields: Any) -> None:
    """Something happened; a line of the trace."""
    self.events += 1
    if self._trace is not None:
      self._trace(json.dumps({"t": self._loop.time(), "event": event, **fields}) + "\n")

  def dispatched(self, rollout_id: int) -> None:
    """A training rollout was opened."""
    group = rollout_id // self._group_size
    if group not in self._groups:
      ids = range(group * self._group_size, (group + 1) * self._group_size)
      self._groups[group] = Group(self._loop.time(), set(ids))
    self.event("dispatched", rollout=rollout_id)

  def attempted(self, longest_segment: float) -> None:
    """A rollout ended at its worker; its longest segment took so many seconds."""
    self.slow_segments += longest_segment > self._timeout_seconds

  def finished(self, summary: messages.RolloutSummary) -> None:
    """The orchestrator is about to hear of a rollout's end."""
    if summary.purpose == "train":
      self._left(summary.rollout_id)
      if summary.error is None:
        self.lengths[summary.rollout_id] = summary.sampled_tokens
    self.event(
      "finished",
      rollout=summary.rollout_id,
      tokens=summary.sampled_tokens,
      versions=(summary.oldest_version, summary.newest_version),
      reward=summary.reward,
    )

  def _left(self, rollout_id: int) -> None:
    """A rollout of a group does not run any more."""
    group = self._groups.get(rollout_id // self._group_size)
    if group is None:
      return  # all were through, and another worker goes on with one that it had
    group.running.discard(rollout_id)
    now = self._loop.time()
    if group.first is None:
      group.first = now
    if not group.running:
      self.group_seconds.append((group.first - group.dispatched, now - group.dispatched))
      del self._groups[rollout_id // self._group_size]

  def batch(self, step: int, attempt: int, worker: str, rollout_ids: Sequence[int]) -> None:
    """A worker is asked to write its rollouts of a step's batch."""
    self.event("batch", step=step, attempt=attempt, worker=worker, rollouts=rollout_ids)

  def trained(
    self, step: int, attempt: int, rollout_id: int, made: Mapping[int, int], oldest_version: int
  ) -> None:
    """A rollout goes into a step's batch; a later attempt at that replaces the ones before."""
    if self._attempts.get(step) != attempt:
      self._attempts[step], self.staleness[step] = attempt, collections.Counter()
    staleness = self.staleness[step]
    for version, tokens in made.items():
      if version >= oldest_version:
        staleness[step - 1 - version] += tokens
    masked = sum(tokens for version, tokens in made.items() if version < oldest_version)
    if masked:
      self._masked[rollout_id] = masked

  def ended(self, rollout_id: int, outcome: str, reason: str) -> None:
    """A rollout was accounted for."""
    if outcome == "errored":  # its worker or server may be gone without a word
      self._left(rollout_id)
    length = self.lengths.pop(rollout_id, None)
    if length is not None:
      self.outcomes.append((length, outcome, self._masked.pop(rollout_id, 0)))
    self.event(outcome, rollout=rollout_id, reason=reason)

  def committed(self, step: int) -> None:
    """A step's batch is committed."""
    self.commits[step] = self._loop.time()

  def stepped(self, step: int, tokens: int, waiting: float, marks: Mapping[str, float]) -> None:
    """The trainer is through with a step; since `waiting` it had waited for its batch."""
    self.steps[step] = {"tokens": tokens, "waiting": waiting, **marks}
    self.event("stepped", step=step, tokens=tokens)

  def synced(self, version: int, url: str, since: float) -> None:
    """A server has a version."""
    self.syncs.append((version, url, since, self._loop.time()))
    self.event("synced", version=version, server=url)


class Ledger(accounting.Accounting):
  """The production accounting, watched.

  Args:
    watch: is told.
  """

  def __init__(self, watch: Watch) -> None:
    super().__init__()
    self._watch = watch

  def dispatch(self, rollout_id: int) -> None:
    """See Accounting."""
    super().dispatch(rollout_id)
    self._watch.dispatched(rollout_id)

  def end(self, rollout_id: int, outcome: str, reason: str = "") -> None:
    """See Accounting."""
    super().end(rollout_id, outcome, reason)
    self._watch.ended(rollout_id, outcome, reason)
