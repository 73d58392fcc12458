"""Brings published weights to the servers in flight, and checks that they arrived (contract 8).

Place in the ring: weights vN -> inference. Each server on its own, all at once: pause, update,
continue, then a canary: the server scores a prompt under a cache key never used before, and its
logprobs must agree with the trainer's. A server that fails any part is fenced, with the reason: it
gets no further requests and its tokens are not trained on.

Modes: `in_place` keeps the cache of running requests (fast; what they cached is of the old weights;
new requests are told apart by the version in their cache key), `retract` drops and recomputes it
(exact, slower).
"""

import asyncio
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from intellect3.inference.control import Outcome, ServerControl

MODES = ("in_place", "retract")
PARTS = ("pause", "update", "resume", "canary")


@dataclass(frozen=True)
class Canary:
  """A prompt and the trainer's logprobs of it under the weights that are being synced.

  Attributes:
    ids: T token ids, at least two.
    logprobs: T values at temperature 1; the first, which nothing comes before, is not compared.
  """

  ids: Sequence[int]
  logprobs: Sequence[float]

  def __post_init__(self) -> None:
    if len(self.ids) < 2 or len(self.ids) != len(self.logprobs):
      raise ValueError(
        "canary: expected two or more ids with as many logprobs, "
        f"got {len(self.ids)} and {len(self.logprobs)}"
      )
    if not np.all(np.isfinite(self.logprobs)):
      raise ValueError("canary.logprobs: expected finite values, got NaN or inf")


@dataclass(frozen=True)
class ServerSync:
  """How the sync of one server went.

  Attributes:
    url: its address.
    reason: why it was fenced; None where all is well.
    seconds: all parts.
    parts: seconds of each part that was tried: pause, update, resume, canary.
    max_difference: largest difference from the trainer's canary logprobs; None where not known.
  """

  url: str
  reason: str | None
  seconds: float
  parts: Mapping[str, float]
  max_difference: float | None = None

  @property
  def ok(self) -> bool:
    return self.reason is None


@dataclass(frozen=True)
class SyncReport:
  """How a sync went.

  Attributes:
    version: the weights brought.
    mode: `in_place` or `retract`.
    bound: largest difference allowed.
    servers: one entry per server, in the control's order.
    seconds: from the first call to the last answer.
    parts: seconds of each part on the server that took longest for it.
  """

  version: int
  mode: str
  bound: float
  servers: Sequence[ServerSync]
  seconds: float
  parts: Mapping[str, float] = field(default_factory=dict)

  @property
  def healthy(self) -> tuple[str, ...]:
    """Servers that passed."""
    return tuple(server.url for server in self.servers if server.reason is None)

  @property
  def fenced(self) -> dict[str, str]:
    """Servers that did not, and why."""
    return {server.url: server.reason for server in self.servers if server.reason is not None}


async def sync(
  control: ServerControl,
  *,
  path: str | os.PathLike[str],
  version: int,
  mode: str,
  canary: Canary,
  bound: float,
) -> SyncReport:
  """Brings weights to every server of a control, checks each and fences those that fail.

  Args:
    control: its servers; those fenced before are left out.
    path: the published version's directory, as the servers see it.
    version: its number.
    mode: `in_place` or `retract`.
    canary: prompt and trainer's logprobs.
    bound: largest absolute difference of a logprob, e.g. 1e-4 at float32.

  Returns:
    What happened. Failures of servers do not raise: they are fenced in `control`, and the caller
    tells the pools, which keep their own lists.

  Raises:
    ValueError: a bad argument; nothing was sent.
  """
  if mode not in MODES:
    raise ValueError(f"mode: expected one of {list(MODES)}, got {mode!r}")
  if not bound > 0:
    raise ValueError(f"bound: expected more than 0, got {bound}")
  if version < 0:
    raise ValueError(f"version: expected at least 0, got {version}")
  clock = asyncio.get_running_loop().time
  started = clock()
  # The random part keeps the key fresh also when a version is synced again after a restart: scores
  # from a cache filled by other weights would prove nothing.
  extra_key = f"canary-{version}-{secrets.token_hex(8)}"

  async def one(url: str) -> ServerSync:
    return await _sync_server(
      control, url, path=path, version=version, mode=mode, canary=canary, bound=bound, key=extra_key
    )

  servers = await asyncio.gather(*map(one, control.urls))
  for server in servers:
    if server.reason is not None:
      control.fence(server.url, server.reason)
  return SyncReport(
    version=version,
    mode=mode,
    bound=bound,
    servers=servers,
    seconds=clock() - started,
    parts={part: max((s.parts.get(part, 0.0) for s in servers), default=0.0) for part in PARTS},
  )


def refused(control: ServerControl, version: int, mode: str, reason: str) -> SyncReport:
  """The report of a version that must not reach any server: each is fenced, none was asked.

  The servers still hold sound weights, but of a version that the run has left behind.
  """
  servers = [
    ServerSync(url, f"{url}: weights v{version}: {reason}", 0.0, {}) for url in control.urls
  ]
  for server in servers:
    control.fence(server.url, server.reason or "")
  return SyncReport(version=version, mode=mode, bound=0.0, servers=servers, seconds=0.0)


async def _sync_server(
  control: ServerControl,
  url: str,
  *,
  path: str | os.PathLike[str],
  version: int,
  mode: str,
  canary: Canary,
  bound: float,
  key: str,
) -> ServerSync:
  clock = asyncio.get_running_loop().time
  started = clock()
  parts: dict[str, float] = {}
  reasons: list[str] = []

  def note(part: str, outcomes: Mapping[str, Outcome]) -> Outcome:
    outcome = outcomes[url]
    parts[part] = outcome.seconds
    if outcome.error is not None:
      reasons.append(f"{part} failed: {outcome.error}")
    return outcome

  try:
    if note("pause", await control.pause(mode, urls=[url])).ok:
      flush = mode == "retract"
      note("update", await control.update_weights(path, version, flush_cache=flush, urls=[url]))
  finally:
    # Also after a failure or a cancellation: a server left paused would hold its requests for ever.
    note("resume", await control.resume(urls=[url]))
  difference = None
  if not reasons:
    scored = note("canary", await control.score(canary.ids, extra_key=key, urls=[url]))
    if scored.value is not None:
      difference = float(
        np.max(np.abs(scored.value.logprobs[1:] - np.asarray(canary.logprobs)[1:]))
      )
      if scored.value.version != version:
        reasons.append(f"serves version {scored.value.version}, expected {version}")
      if not difference <= bound:
        reasons.append(
          f"canary logprobs: expected within {bound:g} of the trainer's, got {difference:.3g} off"
        )
  reason = f"{url}: weights v{version}: {'; '.join(reasons)}" if reasons else None
  return ServerSync(url, reason, clock() - started, parts, difference)
