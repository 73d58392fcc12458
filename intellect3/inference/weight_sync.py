"""Brings published weights to the servers in flight, and checks that they arrived (contract 8).

Place in the ring: weights vN -> inference. Each server on its own, all at once: pause, load,
continue, then a canary: the server scores a prompt under a cache key never used before, and makes a
token; its logprobs must agree with the trainer's. A server that fails any part is fenced, with the
reason: it gets no further requests and its tokens are not trained on.

A load that fails or is broken off may have left a mixture on a server that does not stage (SGLang):
what ran there is ended while it is still paused, with the tokens it has, and whoever keeps the book
of servers is told before the server generates again.

Modes: `in_place` keeps the cache of running requests (fast; what they cached is of the old weights;
new requests are told apart by the version in their cache key), `retract` drops and recomputes it
(exact, slower). Loading is a function of its own: `from_disk` here, `tensor_sync.from_tensors`.
"""

import asyncio
import dataclasses
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from intellect3.inference.control import Outcome, ServerControl

MODES = ("in_place", "retract")
PARTS = ("pause", "load", "resume", "first_token")

Load = Callable[[ServerControl, str, bool], Awaitable[Outcome[None]]]
"""Loads weights into a paused server: (control, url, whether to flush its cache)."""


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
    parts: seconds of each part that was tried: pause, load, resume, first_token (from the request
      of the canary to its scores and one generated token).
    max_difference: largest difference from the trainer's canary logprobs; None where not known.
    answered: False where it failed because there was no answer: it may come back.
  """

  url: str
  reason: str | None
  seconds: float
  parts: Mapping[str, float]
  max_difference: float | None = None
  answered: bool = True

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
    gigabytes: size of the weights; 0.0 where not known.
  """

  version: int
  mode: str
  bound: float
  servers: Sequence[ServerSync]
  seconds: float
  parts: Mapping[str, float] = field(default_factory=dict)
  gigabytes: float = 0.0

  @property
  def metrics(self) -> dict[str, float]:
    """For the run's metrics: seconds of each part, of loading and the first token also per GB."""
    row = {f"weight_sync/{part}_seconds": seconds for part, seconds in self.parts.items()}
    differences = [s.max_difference for s in self.servers if s.max_difference is not None]
    if differences:
      row["weight_sync/canary_difference"] = max(differences)
    if self.gigabytes > 0:
      row["weight_sync/gigabytes"] = self.gigabytes
      for part in ("load", "first_token"):
        if part in self.parts:
          row[f"weight_sync/{part}_seconds_per_gb"] = self.parts[part] / self.gigabytes
    return row

  @property
  def healthy(self) -> tuple[str, ...]:
    """Servers that passed."""
    return tuple(server.url for server in self.servers if server.reason is None)

  @property
  def fenced(self) -> dict[str, str]:
    """Servers that did not, and why."""
    return {server.url: server.reason for server in self.servers if server.reason is not None}

  @property
  def lost(self) -> tuple[str, ...]:
    """Those of the fenced that gave no answer: they may come back."""
    return tuple(server.url for server in self.servers if not (server.ok or server.answered))


def report(
  version: int,
  mode: str,
  bound: float,
  servers: Sequence[ServerSync],
  seconds: float,
  *,
  gigabytes: float = 0.0,
) -> SyncReport:
  """The report of a sync from those of its servers."""
  parts = {
    part: max(server.parts[part] for server in servers if part in server.parts)
    for part in PARTS
    if any(part in server.parts for server in servers)
  }
  return SyncReport(version, mode, bound, servers, seconds, parts, gigabytes)


def from_disk(path: str | os.PathLike[str], version: int) -> Load:
  """Loads from a directory that the servers can read."""

  async def load(control: ServerControl, url: str, flush: bool) -> Outcome[None]:
    return (await control.update_weights(path, version, flush_cache=flush, urls=[url]))[url]

  return load


def check(*, version: int, mode: str, bound: float) -> None:
  """Raises ValueError for what no sync can be asked for."""
  if mode not in MODES:
    raise ValueError(f"mode: expected one of {list(MODES)}, got {mode!r}")
  if not bound > 0:
    raise ValueError(f"bound: expected more than 0, got {bound}")
  if version < 0:
    raise ValueError(f"version: expected at least 0, got {version}")


async def sync_server(
  control: ServerControl,
  url: str,
  *,
  load: Load,
  version: int,
  mode: str,
  canary: Canary,
  bound: float,
  unusable: Callable[[ServerSync], None] = lambda result: None,
  nonce: str | None = None,
) -> ServerSync:
  """Brings weights to one server and checks them; fences nothing.

  Args:
    control: carries the calls; each has its time limit.
    url: of the server.
    load: how the weights get there.
    version: their number.
    mode: `in_place` or `retract`.
    canary: prompt and trainer's logprobs.
    bound: largest absolute difference of a logprob, e.g. 1e-4 at float32.
    unusable: is told of a failed load while the server is still paused.
    nonce: part of the canary's cache key, never used before; None draws one.

  Returns:
    How it went; no failure of the server raises.

  Raises:
    ValueError: a bad argument; nothing was sent.
  """
  check(version=version, mode=mode, bound=bound)
  nonce = secrets.token_hex(8) if nonce is None else nonce
  clock = asyncio.get_running_loop().time
  started = clock()
  parts: dict[str, float] = {}
  reasons: list[str] = []
  answered = True

  def note(part: str, outcome: Outcome) -> Outcome:
    nonlocal answered
    parts[part] = outcome.seconds
    if outcome.error is not None:
      reasons.append(f"{part} failed: {outcome.error}")
      answered = answered and outcome.answered
    return outcome

  def result(difference: float | None = None) -> ServerSync:
    reason = f"{url}: weights v{version}: {'; '.join(reasons)}" if reasons else None
    return ServerSync(url, reason, clock() - started, parts, difference, answered)

  loading = False
  try:
    if note("pause", (await control.pause(mode, urls=[url]))[url]).ok:
      loading = True
      loading = not note("load", await _load(control, url, load, flush=mode == "retract")).ok
  finally:
    if loading:
      await control.abort_all(urls=[url])
      if reasons:  # who cancelled knows already
        unusable(result())
    # Also after a failure or a cancellation: a server left paused would hold its requests for ever.
    note("resume", (await control.resume(urls=[url]))[url])
  difference = None
  if not reasons:
    # The nonce keeps the key fresh also when a version is synced again after a restart: scores
    # from a cache filled by other weights would prove nothing.
    key = f"canary-{version}-{nonce}"
    scores = await control.score(canary.ids, extra_key=key, new_tokens=1, urls=[url])
    scored = note("first_token", scores[url])
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
  return result(difference)


async def _load(control: ServerControl, url: str, load: Load, *, flush: bool) -> Outcome[None]:
  """Loads, once a session is closed that somebody who died in the middle of a push left open."""
  discarded = (await control.on_each(control.discard_update, [url]))[url]
  if not discarded.ok:
    return Outcome(None, discarded.error, discarded.seconds, discarded.answered)
  outcome = await load(control, url, flush)
  return dataclasses.replace(outcome, seconds=discarded.seconds + outcome.seconds)
