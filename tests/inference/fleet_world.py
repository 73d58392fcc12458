"""A fleet over simulated servers in virtual time, and a watcher that remembers what it was told."""

import asyncio

from fake_servers import VOCAB, FakeServer, FakeTransport, logprob_at, run_virtual

from intellect3.inference import fleet, weight_sync
from intellect3.inference.control import ServerControl

IDS = [9, 8, 7, 6]
CANARY = weight_sync.Canary(ids=IDS, logprobs=[0.0, *(logprob_at(p) for p in (1, 2, 3))])
A, B, C = "http://a", "http://b", "http://c"


class Told:
  """A watcher that remembers what it was told, and when."""

  def __init__(self):
    self.versions, self.busy, self.failures = [], [], []

  def servers(self, versions):
    self.versions.append((asyncio.get_running_loop().time(), versions))

  def loads(self, loads):
    self.busy.append(loads)

  def failed(self, url, version, reason, *, for_good):
    self.failures.append((url, version, for_good))

  @property
  def now(self):
    return self.versions[-1][1] if self.versions else None


class World:
  """A fleet and its servers."""

  def __init__(self, wanted=None, **servers):
    transport = FakeTransport(**servers)
    for server in servers.values():
      server.states = [{"running_requests": 0, "waiting_requests": 0}]
    self.wanted = list(transport.servers) if wanted is None else wanted
    self.told = Told()
    self.control = ServerControl(transport, vocab_size=VOCAB, timeout_seconds=600.0)
    self.fleet = fleet.Fleet(
      self.control,
      bring=self.bring,
      wanted=lambda: self.wanted,
      watcher=self.told,
      settings=fleet.Settings(poll_seconds=1.0, lost_after=2, patience_seconds=30.0),
    )

  async def bring(self, url, version, unusable):
    return await weight_sync.sync_server(
      self.control,
      url,
      load=weight_sync.from_disk(f"weights/v{version}", version),
      version=version,
      mode="in_place",
      canary=CANARY,
      bound=1e-4,
      unusable=unusable,
    )

  def run(self, scenario):
    async def run():
      watch = asyncio.ensure_future(self.fleet.watch())
      try:
        return await scenario()
      finally:
        watch.cancel()
        await self.fleet.close()

    return run_virtual(run())[0]


class Slow(FakeServer):
  """Takes its time to load weights."""

  def __init__(self, load_seconds, **options):
    super().__init__(**options)
    self.load_seconds = load_seconds

  async def _answer(self, path, body):
    if path == "/update_weights_from_disk":
      await asyncio.sleep(self.load_seconds)
    return await super()._answer(path, body)
