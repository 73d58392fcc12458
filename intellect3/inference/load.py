"""What a server says of itself: how busy it is, and its counters.

Two ways to ask, found out once per server: the embedded engine tells all of it under
`internal_states` of `/server_info`; SGLang has `/v1/loads` for how busy it is, and no counters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from intellect3.inference import protocol

COUNTERS = (
  "generated_tokens",
  "prompt_tokens",
  "cached_tokens",
  "prefilled_tokens",
  "reprefilled_tokens",
  "retractions",
)
"""Counters since the server's start; `reprefilled_tokens` were computed again after retractions."""


@dataclass(frozen=True)
class ServerLoad:
  """How busy a server is.

  Attributes:
    running: requests that it computes.
    waiting: requests in its queue.
    counters: those of `COUNTERS` that it tells.
  """

  running: int
  waiting: int
  counters: Mapping[str, int]


class _State(msgspec.Struct, frozen=True):
  running_requests: int | None = None
  waiting_requests: int = 0
  generated_tokens: int | None = None
  prompt_tokens: int | None = None
  cached_tokens: int | None = None
  prefilled_tokens: int | None = None
  reprefilled_tokens: int | None = None
  retractions: int | None = None


class ServerInfo(msgspec.Struct, frozen=True):
  """The part of `/server_info` that we read."""

  internal_states: Sequence[_State] = ()
  tp_size: int = 1
  enable_return_routed_experts: bool = False

  @property
  def tells_load(self) -> bool:
    """Whether `load_of_info` has anything to read."""
    return any(state.running_requests is not None for state in self.internal_states)


class _Load(msgspec.Struct, frozen=True):
  num_running_reqs: int
  num_waiting_reqs: int


class _Loads(msgspec.Struct, frozen=True):
  loads: Sequence[_Load]


def load_of_info(info: ServerInfo) -> ServerLoad:
  """The load that `/server_info` tells, all data-parallel ranks together."""
  states = info.internal_states
  counters = {}
  for name in COUNTERS:
    values = [getattr(state, name) for state in states]
    if values and None not in values:
      counters[name] = sum(values)
  running = sum(state.running_requests or 0 for state in states)
  return ServerLoad(running, sum(state.waiting_requests for state in states), counters)


def parse_loads(answer: bytes) -> ServerLoad:
  """The load that `/v1/loads` tells; ProtocolError where it tells none."""
  loads = protocol.decode(answer, _Loads).loads
  if not loads:
    raise protocol.ProtocolError("/v1/loads: expected at least one rank, got none")
  running = sum(load.num_running_reqs for load in loads)
  return ServerLoad(running, sum(load.num_waiting_reqs for load in loads), {})


def counted(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
  """What was counted between two looks; a counter that fell began anew with its server."""
  return {
    name: value - before.get(name, 0) if value >= before.get(name, 0) else value
    for name, value in after.items()
  }
