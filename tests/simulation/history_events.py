"""What can happen to a run: the events of a history. One that does not fit the moment is none."""

from intellect3 import types
from intellect3.rollouts import messages
from tests.simulation.history import PATIENCE, SIZES, WorkerDouble, World, is_written
from tests.simulation.history_ledger import Broken

DISK, WRITER = "disk full", "cannot write"


class History(World):
  """A world that things happen to. `which` chooses among what there is, modulo its number."""

  # Workers.

  def join(self):
    """The first worker that is not there says hello."""
    missing = [name for name in self.names if name not in self.links]
    if self.over or not missing:
      return
    link = WorkerDouble(missing[0], self)
    self.links[link.name] = link
    self.ghosts = [(name, message) for name, message in self.ghosts if name != link.name]
    self._alone_since.pop("worker", None)
    hello = messages.Hello(worker=link.name, sizes=SIZES)
    self.act(f"{link.name} joins", self.machine.connected, link, hello)

  def leave(self, which):
    """A worker is gone; what it had said and nobody heard may still arrive."""
    if self.over or not self.links:
      return
    name = sorted(self.links)[which % len(self.links)]
    link = self.links.pop(name)
    self.ghosts += [(name, message) for message in link.unheard]
    self.ledger.lost(self.ledger.of_worker(name))
    if not self.links and len(self.names) == self._joined():
      self._alone_since["worker"] = self.loop.time()
    self.act(f"{name} is gone", self.machine.disconnected, name)

  def _joined(self):
    """How many were there at once: patience with workers begins when all were."""
    return len(self.names) if self.machine._workers_ready.is_set() else 0

  def finish(self, which, count, pattern, kind, span, late):
    """`count` rollouts end, but for the oldest `which`: `pattern` is their rewards, bit by bit,
    `span` the versions they saw."""
    if self.over:
      return
    running = sorted((key, name) for name, link in self.links.items() for key in link.running)
    begin = which % max(1, len(running))
    for place, (key, name) in enumerate(running[begin : begin + count]):
      summary = self._summary(key, name, float(pattern >> place & 1), kind, span)
      link = self.links[name]
      link.running.discard(key)
      if summary.error is None:
        link.held.add(key)
      versions = f"v{summary.oldest_version}-{summary.newest_version}"
      line = f"rollout {key} ends: {summary.error or summary.reward} {kind} {versions}"
      if late:
        link.unheard.append(summary)
        self.act(f"{line}, not heard of yet")
      else:
        self._hear(name, summary, line)
      if self.over:
        return

  def _summary(self, key, name, reward, kind, span):
    attempt = self.ledger.attempts[key]
    newest = max(self.ledger.served, attempt.version)
    oldest = attempt.version if span != "fresh" else newest
    newest = newest if span != "old" else oldest
    empty = kind in ("error", "empty")
    dispatch = attempt.dispatch
    return messages.RolloutSummary(
      rollout_id=key,
      group_id=dispatch.group_id,
      purpose="train",
      environment=dispatch.environment,
      reward=None if kind == "error" else reward,
      error="ToolBroke" if kind == "error" else None,
      truncated=kind == "truncated",
      lengths=[] if empty else [7],
      sampled_tokens=0 if empty else 4 + key % 3,
      oldest_version=-1 if empty else oldest,
      newest_version=-1 if empty else newest,
      servers=[] if empty else [self.urls[key % len(self.urls)]],
      metrics={},
      seconds=1.0,
    )

  def hear(self, which, twice):
    """A message that was late arrives, perhaps twice."""
    links = [link for _, link in sorted(self.links.items())]
    unheard = [(link, message) for link in links for message in link.unheard]
    if self.over or not unheard:
      return
    link, message = unheard[which % len(unheard)]
    kind = "a shard" if is_written(message) else f"rollout {message.rollout_id}"
    link.unheard.remove(message)
    self._hear(link.name, message, f"{link.name} is heard late of {kind}")
    if twice and not self.over:
      self._hear(link.name, message, f"{link.name} is heard again of {kind}")

  def _hear(self, name, message, line):
    if not is_written(message) and name in self.links:
      self.ledger.finished(name, message)
    self.act(line, self.machine.received, name, message)

  def ghost(self):
    """A message arrives of a worker that is gone, or of the orchestrator's life before."""
    if self.over or not self.ghosts:
      return
    name, message = self.ghosts.pop(0)
    self.act(f"{type(message).__name__} of {name}, which is gone", self._received, name, message)

  def _received(self, name, message):
    self.machine.received(name, message)

  # Batches.

  def write(self, which, how):
    """A worker's shard is written (`ok`), and told of later (`late`), or is not (`fails`)."""
    writes = [(link, message) for _, link in sorted(self.links.items()) for message in link.writes]
    if self.over or not writes:
      return
    link, message = writes[which % len(writes)]
    link.writes.remove(message)
    if how == "fails":
      self.excuse = WRITER
      failed = messages.WorkerFailed(worker=link.name, reason=WRITER)
      return self.act(f"{link.name} cannot write", self.machine.received, link.name, failed)
    shard = types.ShardEntry(
      file=f"{link.name}_{message.attempt}",
      bytes=1,
      crc32=0,
      lengths=[7] * len(message.items),
      loss_tokens=[4] * len(message.items),
    )
    written = messages.BatchWritten(
      step=message.step, attempt=message.attempt, worker=link.name, shard=shard
    )
    line = f"{link.name} wrote its shard of batch {message.step}"
    if how == "late":
      link.unheard.append(written)
      return self.act(f"{line}, not heard of yet")
    return self._hear(link.name, written, line)

  def land(self, how):
    """The manifest is on the disk (`ok`), or is not (`fails`), or is though it failed (`torn`)."""
    if self.over or self.landing is None:
      return
    landing = self.landing
    if how == "ok":
      return self.act("the manifest lands", landing.set_result, None)
    if how == "torn":
      self._land_unseen()
    self.excuse = DISK
    self.landing = None
    return self.act(f"the manifest {how}", landing.set_exception, OSError(DISK))

  # Trainer and servers.

  def train(self, count):
    """The trainer trains on up to `count` batches that are there, and publishes the last."""
    steps, self.untrained = self.untrained[:count], self.untrained[count:]
    if steps:
      self.published = max(self.published, *steps)
      self.act(f"the trainer publishes v{self.published}")

  def bring(self, which, how):
    """A server of the sync is done: it is `ok`, `fenced` or `lost`."""
    if self.over or self.syncing is None:
      return
    left = [url for url, end in self.syncing.items() if end is None]
    url = left[which % len(left)]
    if how == "ok":
      self.served[url] = self.target
    else:
      self.served[url] = None
    self.syncing[url] = how
    self.act(f"{url} is brought v{self.target}: {how}", self._brought, url, how)

  def _brought(self, url, how):
    if how != "ok":
      self._fail(url, self.target, for_good=how == "fenced")
    self._tell_servers()

  def _fail(self, url, version, *, for_good):
    fenced = self.ledger.fenced
    fenced[url] = min(version, fenced.get(url, version))
    self.ledger.lost(self.ledger.made_by(url, version))
    self.machine.failed(url, version, "canary", for_good=for_good)
    self.ledger.distrust(url)

  def _tell_servers(self):
    having = {url: has for url, has in self.served.items() if has is not None and has >= 0}
    newest = max(having.values(), default=-1)
    told = {url: has for url, has in having.items() if has == newest}
    if told == self.told:
      return
    self.told = told
    if told:
      self._alone_since.pop("server", None)
    else:
      self._alone_since.setdefault("server", self.loop.time())
    for url in told:
      self.ledger.fenced.pop(url, None)
    self.ledger.serve(newest)
    self.tell(f"  servers {told}")
    self.machine.servers(told)

  def server_lost(self, which, fenced):
    """A server that serves gives no answer, or is found to have been wrong since its version."""
    url = self.urls[which % len(self.urls)]
    has = self.served[url]
    if self.over or has is None or has < 0 or self._brings(url):
      return
    self.served[url] = None
    self.act(f"{url} is {'fenced' if fenced else 'lost'}", self._server_lost, url, has, fenced)

  def _server_lost(self, url, version, fenced):
    if fenced:
      self._fail(url, version, for_good=True)
    self._tell_servers()

  def server_back(self, which):
    """A server that was lost, or left the list and joins it again, has the present version."""
    url = self.urls[which % len(self.urls)]
    if self.over or self.target is None or self.served[url] is not None or self._brings(url):
      return
    self.served[url] = self.target
    self.act(f"{url} is back with v{self.target}", self._tell_servers)

  def _brings(self, url):
    return self.syncing is not None and self.syncing.get(url, "no") is None

  # Time.

  def wait(self, seconds):
    """Nothing happens for a while."""
    if self.over:
      return
    until = self.loop.time() + seconds
    for since in self._alone_since.values():
      if since + PATIENCE <= until:
        self.excuse = self.excuse or "is left, for"
    self.loop.run_until_complete(self._sleep(seconds))
    self.act(f"{seconds:g} s pass")

  def restart(self, ghosts):
    """The orchestrator is stopped, if it was not over, and begins again from the last manifest."""
    for name, link in sorted(self.links.items()):
      self.ghosts += [(name, message) for message in link.unheard]
    left = self.ghosts if ghosts else []
    if self.landing is not None and ghosts:
      self._land_unseen()
    self._stop()
    self._start()
    self.ghosts = left
    for _ in range(len(left)):
      self.ghost()

  def _land_unseen(self):
    """The manifest is on the disk, but its writer does not hear of it."""
    self._land()
    self.untrained.append(self._manifest.step)

  def turn(self, rounds, which, count, pattern, span):
    """A good while: rollouts end, see `finish`, and whatever waits is done; `rounds` times."""
    for _ in range(rounds):
      while self.syncing is not None and not self.over:
        self.bring(0, "ok")
      self.finish(which, count, pattern, "ok", span, False)
      while not self.over and any(link.writes for link in self.links.values()):
        self.write(0, "ok")
      self.land("ok")
      self.train(len(self.untrained))
      self.wait(1.0)

  def straggle(self, rounds, count, pattern, span):
    """The oldest rollouts run on while others end, are trained on, and change the weights."""
    self.turn(rounds, self.config.group, 1 << 10, 0x9A5C36, "fresh")
    self.finish(0, count, pattern, "ok", span, False)

  def finish_everything(self):
    """All faults are over. The run comes to its end in bounded time, whatever went before."""
    for turn in range(60 * (self.config.steps + 1)):
      if self.done:
        return
      if self.over:
        self.restart(False)
      for _ in self.names:
        self.join()
      for index in range(len(self.urls)):
        self.server_back(index)
      while not self.over and any(link.unheard for link in self.links.values()):
        self.hear(0, False)
      self.turn(1, 0, 1 << 10, (0b1001, 0b0110, 0b0101)[turn % 3] * 0x1111, "spanning")
    raise Broken(f"the run never ends: {self.loop.waiting()}\n\n{self.trace()}")
