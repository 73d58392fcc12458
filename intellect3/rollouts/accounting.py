"""Contract 3: every dispatched rollout ends exactly once.

    dispatched = trained + filtered + stale + cancelled + errored + in_flight

holds at every moment. `in_flight` is what was dispatched and has not ended: it runs, or it is
finished and waits for its group or its batch.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

OUTCOMES = ("trained", "filtered", "stale", "cancelled", "errored")


class AccountingError(RuntimeError):
  """A rollout ended twice, or ended without having been dispatched."""


class Accounting:
  """Counts outcomes; the set of open rollouts is kept apart, so the identity is a real check."""

  def __init__(self) -> None:
    self._open: set[int] = set()
    self._dispatched = 0
    self._ended: collections.Counter[str] = collections.Counter()
    self._reasons: collections.Counter[str] = collections.Counter()

  def dispatch(self, rollout_id: int) -> None:
    """Opens a rollout."""
    if rollout_id in self._open:
      raise AccountingError(f"rollout {rollout_id} was dispatched twice")
    self._open.add(rollout_id)
    self._dispatched += 1

  def end(self, rollout_id: int, outcome: str, reason: str = "") -> None:
    """Ends an open rollout with one of `OUTCOMES`; `reason` is counted beside it."""
    if outcome not in OUTCOMES:
      raise AccountingError(f"outcome: expected one of {OUTCOMES}, got {outcome!r}")
    if rollout_id not in self._open:
      raise AccountingError(f"rollout {rollout_id} ended as {outcome} but is not in flight")
    self._open.remove(rollout_id)
    self._ended[outcome] += 1
    if reason:
      self._reasons[f"{outcome}/{reason}"] += 1
    self.check()

  def is_open(self, rollout_id: int) -> bool:
    """Whether the rollout was dispatched and has not ended."""
    return rollout_id in self._open

  def open_rollouts(self) -> Iterable[int]:
    """The rollouts in flight, ascending."""
    return sorted(self._open)

  @property
  def in_flight(self) -> int:
    """Rollouts dispatched and not ended."""
    return len(self._open)

  def counts(self) -> dict[str, int]:
    """`dispatched`, each outcome and `in_flight`."""
    outcomes = {outcome: self._ended[outcome] for outcome in OUTCOMES}
    return {"dispatched": self._dispatched, **outcomes, "in_flight": len(self._open)}

  def reasons(self) -> dict[str, int]:
    """`outcome/reason` -> count."""
    return dict(sorted(self._reasons.items()))

  def reopen(self, rollout_ids: Iterable[int]) -> None:
    """Rollouts that a process before this one dispatched are in flight again, or still."""
    new = set(rollout_ids) - self._open
    self._open |= new
    self._dispatched += len(new)

  def check(self) -> None:
    """Raises AccountingError where the identity does not hold."""
    if self._dispatched != self._ended.total() + len(self._open):
      raise AccountingError(f"dispatched != ended + in_flight: {self.counts()}")

  def state(self) -> dict[str, Any]:
    """JSON-able counts; which rollouts are in flight is for whoever `reopen`s them to know."""
    return {**self.counts(), "reasons": self.reasons()}

  @classmethod
  def restore(cls, state: Mapping[str, Any]) -> "Accounting":
    """Goes on from `state`, but for what was in flight."""
    accounting = cls()
    accounting._dispatched = state["dispatched"] - state["in_flight"]
    accounting._ended.update({outcome: state[outcome] for outcome in OUTCOMES})
    accounting._reasons.update(state["reasons"])
    accounting.check()
    return accounting
