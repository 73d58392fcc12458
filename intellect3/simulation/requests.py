"""What a simulated server is asked for, and what it counts."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(slots=True, eq=False)
class Request:
  """A generation on one server.

  Attributes:
    group: whose members share the prompt.
    prompt: tokens of the conversation's first turn.
    context: tokens so far, the sampled ones too.
    known: of these, how many are in this server's cache under `version`.
    version: weights under which the known tokens were cached.
    left: tokens still to be sampled.
    ended: is called back, once, when none is left; None after `withdraw`.
    made: sampled tokens by version, ascending.
    reprefilled: known tokens that were computed again.
    longest_segment: seconds, its wait in the queue included.
    failed: is called back, once, where the server is lost before.
    unfinished: sampled tokens of the segment that was broken off last.
  """

  group: str
  prompt: int
  context: int
  known: int
  version: int
  left: int
  ended: Callable[[], object] | None
  made: dict[int, int] = dataclasses.field(default_factory=dict)
  reprefilled: int = 0
  longest_segment: float = 0.0
  failed: Callable[[], object] | None = None
  unfinished: int = 0
  asked: float = 0.0
  begun: float = 0.0  # service at the start of the running segment
  start: float = 0.0  # the same, or at the last version
  segment: int = 0
  end: float = 0.0  # service at the end of the running segment
  order: int = -1  # of its turn among the running; -1: not running


@dataclasses.dataclass(slots=True)
class Usage:
  """Where a server's time went, in seconds, and what it held on average.

  Attributes:
    decoding, prefilling, paused, lost: seconds; what is left is idle.
    running, waiting: requests, times seconds.
    most_waiting: at one time.
    sampled, prefilled: tokens.
    retracted: tokens of running requests that were computed again after a flush or eviction.
    evicted: requests put back since the cache was full.
  """

  decoding: float = 0.0
  prefilling: float = 0.0
  paused: float = 0.0
  lost: float = 0.0
  running: float = 0.0
  waiting: float = 0.0
  most_waiting: int = 0
  sampled: float = 0.0
  prefilled: int = 0
  retracted: int = 0
  evicted: int = 0


def lose_segment(request: Request) -> None:
  """Takes back what was sampled of the segment that was broken off: nobody was told of it."""
  lost = request.unfinished
  for version in sorted(request.made, reverse=True):
    less = min(lost, request.made[version])
    request.made[version] -= less
    request.left += less
    request.context -= less
    lost -= less
    if not request.made[version]:
      del request.made[version]
  request.unfinished = 0
