"""A world for the orchestrator: a coin to toss, a policy without a server, a trainer, a log."""

import asyncio
import dataclasses

import numpy as np

from intellect3 import rollout_log, types
from intellect3.environments import base
from intellect3.rollouts import difficulty, filters, link, messages, orchestrator, worker
from tests.rollouts.helpers import all_records, make_scheduler, make_settings


@dataclasses.dataclass
class Coin:
  """An environment whose reward the conversation draws; some attempts fail."""

  name: str = "coin"
  failing: float = 0.0

  def size(self, split):
    return 40

  def task(self, split, index):
    return types.Task(
      task_id=f"coin/{split}/{index}", environment=self.name, prompt=[], info={"index": index}
    )

  async def run(self, task, conversation):
    await conversation.send(task.prompt)
    if conversation.random.random() < self.failing:
      raise RuntimeError("the tool broke")
    return base.Score(reward=float(conversation.random.random() < 0.5))


class FakeConversation:
  """Samples four tokens with the version of the moment, after a moment."""

  def __init__(self, dispatch, version, delay):
    import random

    self.random = random.Random(dispatch.seed)
    self.truncated = False
    self.reprefilled_tokens = 2
    self._dispatch, self._version, self._delay = dispatch, version, delay
    self._trajectories = []

  async def send(self, prompt):
    first = self._version()
    await asyncio.sleep(self._delay(self._dispatch))
    versions = np.array([-1, -1, first, first, self._version(), self._version()], np.int32)
    sampled = versions >= 0
    self._trajectories.append(
      types.Trajectory(
        tokens=np.arange(6, dtype=np.int32),
        loss_mask=sampled,
        inference_logprobs=np.where(sampled, -0.5, 0.0).astype(np.float32),
        policy_versions=versions,
        temperature=1.0,
      )
    )

  def trajectories(self):
    return self._trajectories

  def servers(self):
    return ["http://a"]


class FakePool:
  def __init__(self, version_changed=lambda version: None):
    self.urls, self.fenced, self.version_changed = (), {}, version_changed

  def set_servers(self, urls, versions=None):
    self.urls = tuple(urls)
    self.version_changed(max(versions.values(), default=0))

  def set_loads(self, loads):
    self.loads = loads

  def fence(self, url, reason):
    self.fenced[url] = reason


@dataclasses.dataclass
class Sync:
  healthy: tuple = ("http://a",)
  fenced: dict = dataclasses.field(default_factory=dict)
  lost: tuple = ()
  seconds: float = 0.01
  metrics: dict = dataclasses.field(default_factory=lambda: {"weight_sync/load_seconds": 0.005})


class World:
  """A trainer that makes v(n) soon after step n's batch, a log on disk, and the orchestrator."""

  def __init__(self, tmp_path, *, steps=5, failing=0.0, delay=lambda dispatch: 0.002, **settings):
    self.log_dir = tmp_path / "rollouts"
    self.steps = steps
    self.committed = asyncio.Queue()
    self.versions = asyncio.Queue()
    self.rows, self.evaluations, self.phases = {}, {}, []
    self.environment = Coin(failing=failing)
    self.delay = delay
    self.sync_results = {}
    self.pools = settings.pop("pools", difficulty.Pools())
    self.filters = settings.pop("group_filters", filters.Filters())
    self.credit = settings.pop("credit", None)
    self.token_weights = settings.pop("token_weights", None)
    self.settings = make_settings(steps=steps, **settings)
    self.second_step = asyncio.Event()

  def orchestrator(self, **changes):
    async def next_version(version):
      newest = await self.versions.get()
      while not self.versions.empty():
        newest = self.versions.get_nowait()
      return newest

    async def sync(version):
      result = self.sync_results.get(version, Sync())
      for url, reason in result.fenced.items():
        machine.failed(url, version, reason, for_good=True)
      machine.servers(dict.fromkeys(result.healthy, version))
      return result

    async def commit(manifest):
      rollout_log.commit_manifest(self.log_dir, manifest)

    machine = orchestrator.Orchestrator(
      **{
        **dict(
          make_scheduler=lambda sizes: make_scheduler(
            self.settings,
            sizes=sizes,
            pools=self.pools,
            group_filters=self.filters,
            credit=self.credit,
          ),
          ports=orchestrator.Ports(
            next_version=next_version,
            sync=sync,
            commit=commit,
            batch_committed=self.committed.put_nowait,
            dispatched=lambda total: None,
            distrusted=lambda url, version: None,
            report=self.report,
            report_evaluation=self.evaluations.__setitem__,
            server_metrics=lambda: {"reprefilled_tokens/retracted": 3.0},
            status=lambda phase, detail: self.phases.append((phase, detail)),
          ),
          num_workers=1,
          steps=self.steps,
          seed=0,
        ),
        **changes,
      }
    )
    return machine

  def report(self, step, row):
    self.rows[step] = row
    if step == 2:
      self.second_step.set()

  def make_worker(self, name="worker_0"):
    version = [0]

    async def release():
      pass

    return lambda send: worker.Worker(
      name,
      environments={"coin": self.environment},
      make_conversation=lambda d, journal: FakeConversation(d, lambda: version[0], self.delay),
      pool=FakePool(lambda new: version.__setitem__(0, new)),
      send=send,
      log_dir=self.log_dir,
      release=release,
      token_weights=self.token_weights,
    )

  async def trainer(self, first_step=1):
    self.versions.put_nowait(first_step - 1)
    for _ in range(first_step, self.steps + 1):
      step = await self.committed.get()
      manifest = rollout_log.read_manifest(self.log_dir, step)
      records = all_records(self.log_dir, manifest)
      assert manifest.loss_tokens == sum(r.trajectory.loss_mask.sum() for r in records)
      await asyncio.sleep(0.005)
      self.versions.put_nowait(step)

  async def run(self, *, first_step=1, **changes):
    machine = self.orchestrator(**changes)
    local = link.InProcessLink(machine, self.make_worker())
    try:
      await asyncio.wait_for(asyncio.gather(machine.run(), self.trainer(first_step)), 30)
    finally:
      await local.close()


class SlowShards:
  """A link whose worker answers WriteBatch when told to; everything else passes through."""

  def __init__(self, machine, make_worker):
    self._machine = machine
    self._worker = make_worker(self._from_worker)
    self.name = self._worker.name
    self.held = []
    self.holding = True
    machine.connected(self, self._worker.hello())

  def post(self, message):
    asyncio.get_running_loop().call_soon(self._worker.handle, message)

  def _from_worker(self, message):
    if isinstance(message, messages.BatchWritten) and self.holding:
      self.held.append(message)
    else:
      asyncio.get_running_loop().call_soon(self._machine.received, self.name, message)

  def release(self):
    self.holding = False
    for message in self.held:
      self._machine.received(self.name, message)

  async def close(self):
    await self._worker.close()
