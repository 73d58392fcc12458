"""What passes between orchestrator and workers, counted at the size that it has on the wire."""

import collections

from intellect3.rollouts import messages


class Traffic:
  """Messages and bytes between orchestrator and workers, by kind."""

  def __init__(self) -> None:
    self.messages: collections.Counter[str] = collections.Counter()
    self.bytes: collections.Counter[str] = collections.Counter()
    self._last: tuple[object, int] = None, 0  # what goes to all workers is encoded once

  def count(self, message: messages.ToWorker | messages.FromWorker, times: int = 1) -> None:
    """Counts a message, sent so many times, at the size that it would have on the wire."""
    if message is not self._last[0]:
      self._last = message, len(messages.encode(message))
    kind = type(message).__name__
    self.messages[kind] += times
    self.bytes[kind] += times * self._last[1]
