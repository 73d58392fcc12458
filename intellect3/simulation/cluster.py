"""The simulated servers as the production fleet meets them: looked at, brought weights, lost.

`fleet.Fleet` decides; this says how long what it asks for takes, and whether anybody answers.
"""

import asyncio
import random
from collections.abc import Callable, Mapping

from intellect3.inference import control, load, weight_sync
from intellect3.simulation import clock, rates, scenario, server, watching

MOST_LOOKS = 1_000_000
"""Of the fleet at its servers in a row, while nothing else happens."""


class Cluster:
  """The servers. Belongs to one event loop.

  Args:
    given: the scenario.
    segment_tokens: of the run.
    flush: whether new weights drop the caches (`retract`).
    watch: is told of syncs and losses.

  Attributes:
    servers: by url.
  """

  def __init__(
    self, given: scenario.Scenario, segment_tokens: int, flush: bool, watch: watching.Watch
  ) -> None:
    pace = rates.Rates(given.servers)
    urls = [f"http://server-{index}" for index in range(given.servers.count)]
    self.servers: Mapping[str, server.Server] = {
      url: server.Server(url, given.servers, pace, segment_tokens) for url in urls
    }
    self._given = given
    self._flush = flush
    self._watch = watch
    self._loop = asyncio.get_running_loop()
    self._delays = {
      url: given.sync.spread_seconds * random.Random(f"{given.seed}/sync/{url}").random()
      for url in urls
    }
    self._retracted = 0
    self._events = self._looks = 0

  async def look(self, url: str) -> control.Outcome[tuple[int | None, load.ServerLoad]]:
    """See ServerControl.look; raises Stuck where nothing else happens any more."""
    self._looks += 1
    if self._watch.events != self._events:
      self._events, self._looks = self._watch.events, 0
    if self._looks > MOST_LOOKS:
      raise clock.Stuck(f"nothing happened in {self._looks:,} looks at servers")
    one = self.servers[url]
    if one.down:
      return control.Outcome(None, f"{url}: no answer", 0.0, answered=False)
    version = one.version if one.version >= 0 else None
    return control.Outcome((version, load.ServerLoad(one.running, one.waiting, {})), None, 0.0)

  def admit(self, url: str) -> None:
    """See ServerControl.admit: a fleet's own calls go to whichever it likes."""

  async def bring(
    self, url: str, version: int, unusable: Callable[[weight_sync.ServerSync], None]
  ) -> weight_sync.ServerSync:
    """See fleet.Bring."""
    del unusable  # where a load fails the server is gone
    sync, one, started = self._given.sync, self.servers[url], self._loop.time()
    load_seconds, losses = sync.load_seconds + self._delays[url], one.losses
    await asyncio.sleep(sync.pause_seconds)
    if one.losses == losses and not one.down:
      one.pause()
      self._watch.event("paused", server=url)
      try:
        await asyncio.sleep(load_seconds)
        if one.losses == losses:
          one.load(version, flush=self._flush)
          self._watch.event("loaded", server=url, version=version)
          await asyncio.sleep(sync.resume_seconds)
      finally:
        one.resume()
      await asyncio.sleep(sync.canary_seconds)
    seconds = self._loop.time() - started
    if one.losses != losses or one.down:
      reason = f"{url}: no answer"
      return weight_sync.ServerSync(url, reason, seconds, {}, answered=False)
    self._watch.synced(version, url, started)
    parts = {
      "pause": sync.pause_seconds,
      "load": load_seconds,
      "resume": sync.resume_seconds,
      "first_token": sync.canary_seconds,
    }
    return weight_sync.ServerSync(url, None, seconds, parts)

  def metrics(self) -> Mapping[str, float]:
    """See Ports.server_metrics."""
    total = sum(one.usage.retracted for one in self.servers.values())
    since, self._retracted = total - self._retracted, total
    there = sum(not one.down for one in self.servers.values())
    return {"servers": float(there), "reprefilled_tokens/retracted": float(since)}

  async def lose(self, url: str) -> None:
    """Loses a server from time to time, for ever."""
    one, failures = self.servers[url], self._given.failures

    def lose() -> None:
      one.lose()
      self._watch.event("server_lost", server=url)

    def restore() -> None:
      one.restart()
      self._watch.event("server_back", server=url)

    rng = random.Random(f"{self._given.seed}/failures/{url}")
    await losing(rng, failures.server_mean_seconds, failures.server_repair_seconds, lose, restore)


async def losing(
  rng: random.Random,
  mean_seconds: float,
  repair_seconds: float,
  lose: Callable[[], None],
  restore: Callable[[], None],
) -> None:
  """Loses and restores something in turn, for ever.

  Args:
    rng: draws when.
    mean_seconds: that it is there, exponentially distributed.
    repair_seconds: that it is not.
    lose, restore: do it.
  """
  while True:
    await asyncio.sleep(rng.expovariate(1.0 / mean_seconds))
    lose()
    await asyncio.sleep(repair_seconds)
    restore()
