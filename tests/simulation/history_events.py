"""What can happen to a run: the events of a history. One that does not fit the moment is none."""

import functools

from intellect3 import types
from intellect3.rollouts import messages
from tests.simulation.history import POLL, World
from tests.simulation.history_tasks import SIZES
from tests.simulation.history_workers import WorkerDouble, is_written

DISK, WRITER = "disk full", "cannot write"
DONE = {
  "pause": "pauses",
  "load": "loads v{version}",
  "resume": "goes on",
  "canary": "passes the canary of v{version}",
}
NOT_DONE = {
  "refused": "refuses to {what}",
  "lost": "is to {what}, and does not answer",
  "unheard": ", but its answer is lost",
  "wrong": "fails the canary of v{version}",
}


def _what(message):
  if isinstance(message, messages.RolloutSummary):
    return f"{'rollout' if message.purpose == 'train' else 'held-out'} {message.rollout_id}"
  return f"its shard of batch {message.step}" if is_written(message) else message.reason


def _how(summary):
  if summary.error is not None:
    return "in an error"
  oldest, newest = summary.oldest_version, summary.newest_version
  tokens = f"v{oldest}" if oldest == newest else f"v{oldest} to v{newest}"
  cut = ", cut short" if summary.truncated else ""
  return f"with reward {summary.reward:g}{cut}, {f'of {tokens}' if newest >= 0 else 'of no tokens'}"


def single(function):
  """Notes an event that is not made of others, so that a history can be told again."""

  @functools.wraps(function)
  def noted(self, *arguments):
    self.events.append((function.__name__, arguments))
    lasts = function.__name__ in ("restart", "train", "die", "back")
    return function(self, *arguments) if lasts or not self.over else None

  return noted


class History(World):
  """A world that things happen to. `which` chooses among what there is, modulo its number."""

  def __init__(self, *arguments, **options):
    self.events, self.finishing = [], None
    super().__init__(*arguments, **options)

  # Workers.

  @single
  def join(self):
    """The first worker that is not there says hello."""
    missing = [name for name in self.names if name not in self.links]
    if not missing:
      return
    link = WorkerDouble(missing[0], self)
    self.links[link.name] = link
    self.ghosts = [(name, message) for name, message in self.ghosts if name != link.name]
    self.echoes = [(name, message) for name, message in self.echoes if name != link.name]
    self.none_since.pop("worker", None)
    hello = messages.Hello(worker=link.name, sizes=SIZES)
    self.act(f"{link.name} joins", self.machine.connected, link, hello)

  @single
  def leave(self, which):
    """A worker is gone; what it had said and nobody heard may still arrive."""
    if not self.links:
      return
    name = sorted(self.links)[which % len(self.links)]
    link = self.links.pop(name)
    self.ghosts += [(name, message) for message in link.unheard]
    self.ledger.left(name)
    self.ledger.exams.left(name)
    if not self.links and self.machine._workers_ready.is_set():  # all were there
      self.none_since["worker"] = self.loop.time()
    self.act(f"{name} is gone", self.machine.disconnected, name)

  @single
  def end(self, key, reward, kind, span, late):
    """A rollout ends, if not this one then another.

    `span` are the versions it saw: that of its begin (old), of its end (fresh), or both.
    """
    running = sorted(key for link in self.links.values() for key in link.running)
    if not running:
      return
    key = key if key in running else running[key % len(running)]
    links = [link for link in self.links.values() if key in link.running]
    summary = self._summary(key, reward, kind, span)
    if summary is None:
      return
    links[0].running.discard(key)
    if summary.error is None:
      links[0].held.add(key)
    self._say(links[0], summary, f"rollout {key} ends {_how(summary)}", late)

  def _summary(self, key, reward, kind, span):
    """None where it cannot end now: no server that it could be on makes tokens."""
    attempt = self.ledger.attempts[key]
    empty = kind in ("error", "empty")
    doubles = [double for double in self.doubles.values() if double.makes_tokens]
    if not doubles and not empty:
      return None
    double = doubles[key % len(doubles)] if doubles else None
    has = double.version if double else 0
    oldest, newest = sorted((attempt.version, has))
    oldest, newest = {"old": (oldest, oldest), "fresh": (has, has)}.get(span, (oldest, newest))
    if kind == "unpublished":
      newest = self.ledger.begun + 1
    saw = range(oldest, newest + 1) if not empty else ()
    self.made[key] = [(double.url, double.load_of[v]) for v in saw if v in double.load_of]
    return messages.RolloutSummary(
      rollout_id=key,
      group_id=attempt.dispatch.group_id,
      purpose="train",
      environment=attempt.dispatch.environment,
      reward=None if kind == "error" else reward,
      error="ToolBroke" if kind == "error" else None,
      truncated=kind == "truncated",
      lengths=[] if empty else [7],
      sampled_tokens=0 if empty else 4 + key % 3,
      oldest_version=-1 if empty else oldest,
      newest_version=-1 if empty else newest,
      servers=[] if empty else [double.url],
      metrics={},
      seconds=1.0,
    )

  @single
  def score(self, which, reward, late):
    """A held-out task is done; `reward` is None where it failed."""
    open_ = sorted((key, name) for name, link in self.links.items() for key in link.exams)
    if not open_:
      return
    key, name = open_[which % len(open_)]
    self.links[name].exams.discard(key)
    summary = messages.RolloutSummary(
      rollout_id=key,
      group_id=key,
      purpose="eval",
      environment=self.ledger.exams.environment(key),
      reward=reward,
      error=None if reward is not None else "ToolBroke",
      truncated=False,
      lengths=[7],
      sampled_tokens=4,
      oldest_version=self.ledger.served,
      newest_version=self.ledger.served,
      servers=[],
      metrics={},
      seconds=1.0,
    )
    how = "in an error" if reward is None else f"with reward {reward:g}"
    self._say(self.links[name], summary, f"held-out {key} ends {how}", late)

  def _say(self, link, message, line, late):
    if late:
      link.unheard.append(message)
      self.act(f"{line}, not heard of yet")
    else:
      self._hear(link.name, message, line)

  @single
  def hear(self, which, twice):
    """A message that was late arrives; perhaps it will once more."""
    links = [link for _, link in sorted(self.links.items())]
    unheard = [(link, message) for link in links for message in link.unheard]
    if not unheard:
      return
    link, message = unheard[which % len(unheard)]
    link.unheard.remove(message)
    # The numbers of held-out tasks come again: an echo of one could be taken for another's.
    if twice and getattr(message, "purpose", "train") == "train":
      self.echoes.append((link.name, message))
    self._hear(link.name, message, f"{link.name} is heard late of {_what(message)}")

  @single
  def echo(self, which):
    """A message that was heard arrives again."""
    if self.echoes:
      name, message = self.echoes.pop(which % len(self.echoes))
      if name in self.links:
        self._hear(name, message, f"{name} is heard again of {_what(message)}")

  def _hear(self, name, message, line):
    if isinstance(message, messages.WorkerFailed):
      self.excuse = self.excuse or message.reason
    elif not is_written(message) and message.purpose == "eval":
      self.ledger.exams.finished(name, message)
    elif not is_written(message):
      self.ledger.finished(name, message)
    self.act(line, self.machine.received, name, message)

  @single
  def ghost(self):
    """A message arrives of a worker that is gone, or of the orchestrator's life before."""
    self._ghost()

  def _ghost(self):
    if self.over or not self.ghosts:
      return
    name, message = self.ghosts.pop(0)
    self.act(f"{name}, which is gone, is heard of {_what(message)}", self.machine.received, name,
             message)  # fmt: skip

  # Batches.

  @single
  def write(self, which, how):
    """A worker's shard is written (`ok`), and told of later (`late`), or is not (`fails`), which
    may be told of later, too (`fails late`)."""
    writes = [(link, message) for _, link in sorted(self.links.items()) for message in link.writes]
    if not writes:
      return
    link, message = writes[which % len(writes)]
    link.writes.remove(message)
    if how.startswith("fails"):
      failed = messages.WorkerFailed(worker=link.name, reason=WRITER)
      return self._say(link, failed, f"{link.name} cannot write", how == "fails late")
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
    return self._say(link, written, line, how == "late")

  @single
  def land(self, how):
    """The manifest is on the disk (`ok`), or is not (`fails`), or is though it failed (`torn`)."""
    if self.landing is None:
      return
    landing = self.landing
    if how == "ok":
      return self.act("the manifest lands", landing.set_result, None)
    if how == "torn":
      self._land_unseen()
    self.excuse = DISK
    self.landing = None
    return self.act(f"the manifest {how}", landing.set_exception, OSError(DISK))

  def _land_unseen(self):
    """The manifest is on the disk, but its writer does not hear of it."""
    self._land()
    self.untrained.append(self._manifest.step)

  # Trainer.

  @single
  def train(self, count, damaged):
    """The trainer trains on up to `count` batches that are there, and publishes the last."""
    steps, self.untrained = self.untrained[:count], self.untrained[count:]
    if not steps or max(steps) <= self.published:
      return
    self.published = max(steps)
    if damaged:
      self.weights.damaged.add(self.published)
    how = ", damaged" if damaged else ""
    self.act(f"the trainer publishes v{self.published}{how}")

  # Servers.

  @single
  def pause(self, which, how):
    """A server that is to pause does, or fails as one of `history_servers.ENDS`."""
    self._answer("pause", which, how)

  @single
  def load(self, which, how):
    """The same, of loading weights."""
    self._answer("load", which, how)

  @single
  def resume(self, which, how):
    """The same, of going on."""
    self._answer("resume", which, how)

  @single
  def canary(self, which, how):
    """The same, of scoring the canary."""
    self._answer("canary", which, how)

  def calls(self, what):
    """(server, call) of those that wait."""
    doubles = self.doubles.values()
    return [(double, call) for double in doubles for call in double.calls if call.what == what]

  def _answer(self, what, which, how):
    calls = self.calls(what)
    if not calls:
      return
    double, call = calls[which % len(calls)]
    version = call.body.get("weight_version", double.version)
    done = DONE[what].format(version=version)
    end = "refused" if how == "wrong" and what != "canary" else how
    doing = "score the canary" if what == "canary" else what
    told = NOT_DONE.get(end, "").format(what=doing, version=version)
    line = done if how == "ok" else f"{done}{told}" if how == "unheard" else told
    self.act(f"{double.url} {line}", double.end, call, how)

  @single
  def die(self, which):
    """A server's process ends."""
    double = list(self.doubles.values())[which % len(self.doubles)]
    if double.up:
      self.act(f"{double.url} is gone", double.die)

  @single
  def back(self, which, fresh):
    """A server that is gone is started again, with the weights it had or the initial ones."""
    gone = [double for double in self.doubles.values() if not double.up]
    if gone:
      double = gone[which % len(gone)]
      version = 0 if fresh or double.mixed else double.version
      self.act(f"{double.url} is back with v{version}", self._back, double, version)

  def _back(self, double, version):
    double.start(version)
    if double.url in (self.told or {}):  # nobody has missed it
      double.used, double.load_of[version] = True, double.loads

  @single
  def listing(self, which):
    """A server leaves the list of servers, or joins it again; which is seen at the next look."""
    double = list(self.doubles.values())[which % len(self.doubles)]
    double.listed = not double.listed
    double.good = None
    self.act(f"{double.url} {'joins' if double.listed else 'leaves'} the list", seconds=POLL)

  # Time, and the orchestrator's own.

  @single
  def wait(self, seconds):
    """Nothing is told for a while."""
    self.act(f"{seconds:g} s pass", seconds=seconds)

  @single
  def restart(self, ghosts):
    """The orchestrator is stopped, if it was not over, and begins again from the last manifest."""
    for name, link in sorted(self.links.items()):
      self.ghosts += [(name, message) for message in link.unheard]
    left = self.ghosts if ghosts else []
    if self.landing is not None and ghosts:
      self._land_unseen()
    self._stop()
    self.weights.damaged.clear()
    self._start()
    self.ghosts = left
    for _ in range(len(left)):
      self._ghost()
