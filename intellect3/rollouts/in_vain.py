"""A run that gets nowhere: its groups end, one after the other, and leave nothing to train.

Every attempt may fail at once (a broken environment, a server that answers nonsense), or the
filters may keep none. No step comes of it, and rollouts would be dispatched for ever. So groups
that ended in vain are counted from one batch to the next, and held against those that wait to be
batched: a run that slowly fills a batch goes on, however slowly that is; one in which fewer than
one group of `most` is of use ends, and says what the others ended of. People are told long before.
"""

from collections.abc import Mapping

from intellect3.rollouts import accounting

_FIRST_ALARM = 128
"""The first alarm comes at this part of the limit; each further one at twice as many groups."""

_NAMED_REASONS = 3


class NothingToTrain(RuntimeError):
  """Nothing comes of a run's rollouts; the message says what they ended of."""


class InVain:
  """Groups that ended with nothing to train since the last batch.

  Args:
    most: so many, for each group that waits to be batched and one more, end the run.
  """

  def __init__(self, most: int) -> None:
    self._most = most
    self.batched({})

  def batched(self, reasons: Mapping[str, int]) -> None:
    """A batch was committed; `reasons` are the accounting's, to be left out from now on."""
    self._groups = 0
    self._before = reasons
    self._alarm = max(1, self._most // _FIRST_ALARM)

  def ended(self) -> None:
    """A group has ended with nothing to train."""
    self._groups += 1

  def alarm(self, waiting: int, account: accounting.Accounting) -> str | None:
    """What people should hear now, or None; each alarm is told once.

    Args:
      waiting: groups that are complete and wait to be batched.
      account: of all rollouts.

    Raises:
      NothingToTrain: the run is not to go on.
    """
    if self._groups < self._alarm * (1 + waiting):
      return None
    told = (
      f"{self._groups:,} groups ended since the last batch with nothing to train, {waiting:,} wait "
      f"for a batch: {self._ends(account.reasons())}"
    )
    if self._groups >= self._most * (1 + waiting):
      raise NothingToTrain(told)
    while self._groups >= self._alarm * (1 + waiting):
      self._alarm = min(2 * self._alarm, self._most)
    return told

  def _ends(self, reasons: Mapping[str, int]) -> str:
    """Rollouts by outcome since the last batch, with each outcome's most frequent reasons."""
    by_outcome: dict[str, dict[str, int]] = {}
    for key, count in reasons.items():
      outcome, _, reason = key.partition("/")
      if since := count - self._before.get(key, 0):
        by_outcome.setdefault(outcome, {})[reason] = since
    parts = []
    for outcome, counts in by_outcome.items():
      most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NAMED_REASONS]
      named = ", ".join(f"{reason} {count:,}" for reason, count in most)
      parts.append(f"{outcome} {sum(counts.values()):,} ({named})")
    return ", ".join(parts)
