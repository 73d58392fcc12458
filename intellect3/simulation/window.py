"""The part of a simulation that its report is of: what had been counted at its two ends.

Servers, clients and orchestrator go round with the batches: from one batch's commit to another's is
a whole number of rounds. A window that ended with the trainer's last step would count a time in
which nobody asks the servers for anything, since no further batch is wanted.
"""

import collections
import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from intellect3.simulation import server, watching
from intellect3.simulation import traffic as traffic_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """What had been counted at a moment.

  Attributes:
    seconds: on the virtual clock.
    usages: of each server.
    counts: of the accounting.
    outcomes, groups: entries of the watch's `outcomes` and `group_seconds`.
    slow_segments: see the watch.
    messages, bytes: of the traffic, by kind.
  """

  seconds: float
  usages: Sequence[server.Usage]
  counts: Mapping[str, int]
  outcomes: int
  groups: int
  slow_segments: int
  messages: collections.Counter[str]
  bytes: collections.Counter[str]


def mark(
  seconds: float,
  *,
  servers: Iterable[server.Server],
  counts: Mapping[str, int],
  watch: watching.Watch,
  traffic: traffic_lib.Traffic,
) -> Mark:
  """The counts of now; the servers' longest queues are counted afresh from here.

  Args:
    seconds: on the virtual clock.
    servers: all of them.
    counts: of the accounting.
    watch: of the run.
    traffic: of the run.
  """
  usages = []
  for one in servers:
    usage = one.settle()
    usages.append(copy.copy(usage))
    usage.most_waiting = one.waiting
  return Mark(
    seconds=seconds,
    usages=usages,
    counts=dict(counts),
    outcomes=len(watch.outcomes),
    groups=len(watch.group_seconds),
    slow_segments=watch.slow_segments,
    messages=traffic.messages.copy(),
    bytes=traffic.bytes.copy(),
  )
