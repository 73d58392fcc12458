"""A second book of a run, kept by the tests: from what passes by, without the scheduler's code.

It hears of every message to and from the workers and of every manifest, knows the rules of the
contracts, and says where the orchestrator departs from them.
"""

import collections
import dataclasses

import msgspec
import numpy as np

from tests.simulation import history_tasks
from tests.simulation.history_records import ENDED, MOST_WORKERS, OPEN, Attempt, Durable
from tests.simulation.history_tasks import expect


class Ledger:
  """See the module's docstring."""

  def __init__(self, config):
    self.config = config
    self.dispatched = 0
    self.past = []  # (url, version) of servers that failed, in all lives
    self.landed = Durable(tasks=history_tasks.Tasks(config.pools))
    self.begin()

  def begin(self):
    """A new life, from the last manifest that landed: what was in flight is to be started again."""
    self.now = self.landed.copy()
    self.pending = None
    self.version = self.served = -1  # the newest that was ever served; the newest that is
    self.begun = -1  # the newest that servers may have
    self.exams = history_tasks.Exams(self.config.evaluation)
    self.attempts = self.now.kept  # in the order in which they were last sent to a worker
    self.groups = collections.defaultdict(list)
    for key, attempt in sorted(self.attempts.items()):
      self.groups[attempt.dispatch.group_id].append(key)
    in_flight = lambda key: self.attempts[key].fate in OPEN  # noqa: E731
    self.again = [list(filter(in_flight, keys)) for _, keys in sorted(self.groups.items())]
    self.limbo = set(range(self.now.dispatched, self.dispatched))  # sent after that manifest
    self.lost_with = collections.Counter()
    self.advantages = {}  # of the groups that are complete
    self._compared_with = self.now.compared_with  # group -> baselines
    self._rewards = {}  # group -> [(agent, reward)], of groups that finished since the last commit
    self._credited = self.now.credited
    self.fenced = {}
    self.distrusted = set()  # (rollout, url): it ran when the server failed

  def started(self, dispatch, worker):
    """A rollout was sent to a worker."""
    key = dispatch.rollout_id
    if key in self.attempts:
      self._started_again(key, dispatch, worker)
    else:
      self._started(key, dispatch, worker)
    running = self.count("running")
    limit = self.config.in_flight
    expect(running <= limit, f"{running} rollouts run, at most {limit} may")

  def _started_again(self, key, dispatch, worker):
    attempt = self.attempts.pop(key)
    expect(attempt.fate == "waiting", f"rollout {key} is dispatched twice")
    expect(self.again[0][0] == key, f"rollout {key} is started again, due is {self.again[0]}")
    expect(dispatch.attempt > attempt.dispatch.attempt, f"rollout {key}: its attempt must grow")
    due = msgspec.structs.replace(attempt.dispatch, attempt=dispatch.attempt)
    expect(dispatch == due, f"{dispatch} is started again, due {due}")
    attempt.dispatch = dispatch
    attempt.worker, attempt.fate, attempt.continued = worker, "running", True
    self.attempts[key] = attempt
    del self.again[0][0]
    self.again = [keys for keys in self.again if keys]

  def _started(self, key, dispatch, worker):
    expect(key not in self.now.trained, f"rollout {key} was trained and is dispatched again")
    expect(not self.again, f"rollout {key} is dispatched, and {self.again} are to be started again")
    new = dispatch.group_id not in self.groups
    expect(not new or self.may_dispatch(), f"group {dispatch.group_id} is dispatched too early")
    known = key in self.limbo
    expect(dispatch.continued == known, f"rollout {key} is told to be continued, or is not")
    expect(known or key == self.dispatched, f"rollout {key} is dispatched, due {self.dispatched}")
    self.dispatched += not known
    self.limbo.discard(key)
    self.attempts[key] = Attempt(dispatch, worker, self.served, continued=known)
    members = self.groups[dispatch.group_id]
    members.append(key)
    first = self.attempts[members[0]].dispatch
    expect((first.environment, first.index) == (dispatch.environment, dispatch.index), "two tasks")
    if new:
      self.now.tasks.drawn(dispatch.group_id, dispatch.environment, dispatch.index)

  def serve(self, version):
    """The servers have this version, or there is none (-1)."""
    if self.version < 0 <= version:
      self.exams.due = [0] if version == 0 else []
    self.version = max(self.version, version)
    self.served = version if version >= 0 else self.served

  def count(self, fate):
    return sum(attempt.fate == fate for attempt in self.attempts.values())

  def open_groups(self):
    """Groups with a rollout in flight, in dispatch order."""
    return [
      g for g in sorted(self.groups) if any(self.attempts[k].fate in OPEN for k in self.groups[g])
    ]

  def distrust(self, url, version):
    """A server failed: a mixture of weights may say that it is the version before."""
    self.past.append((url, version))
    self.distrusted |= {(key, url) for key, a in self.attempts.items() if a.fate == "running"}

  def poisoned(self, summary):
    """Whether it was made by what is fenced, or of weights that nobody has published."""
    key, oldest, newest = summary.rollout_id, summary.oldest_version, summary.newest_version
    bad = {url for url, version in self.fenced.items() if newest >= version}
    bad |= {url for other, url in self.distrusted if other == key}
    if self.attempts[key].continued:
      bad |= {url for url, version in self.past if oldest <= version}
    return newest > self.begun or not bad.isdisjoint(summary.servers)

  def finished(self, worker, summary):
    """A summary has arrived; says whether it counts."""
    attempt = self.attempts.get(summary.rollout_id)
    if attempt is None or attempt.fate != "running" or attempt.worker != worker:
      return
    if summary.error is not None or self.poisoned(summary):
      attempt.fate = "errored"
    else:
      attempt.fate, attempt.summary = "finished", summary
    self._score(attempt.dispatch.group_id)

  def lost(self, keys):
    """These cannot be gone on with."""
    lost = [key for key in keys if self.attempts[key].fate in OPEN]
    for key in lost:
      self.attempts[key].fate, self.attempts[key].summary = "errored", None
    for group in dict.fromkeys(self.attempts[key].dispatch.group_id for key in lost):
      self._score(group)

  def left(self, worker):
    """A worker is gone: others go on with what it ran or held."""
    keys = [k for k, a in self.attempts.items() if a.worker == worker and a.fate in OPEN[1:]]
    self.lost_with.update(keys)
    self.lost([key for key in keys if self.lost_with[key] >= MOST_WORKERS])
    units = collections.defaultdict(list)
    for key in keys:
      attempt = self.attempts[key]
      if attempt.fate in OPEN:
        attempt.fate, attempt.summary, attempt.worker = "waiting", None, ""
        units[attempt.dispatch.group_id].append(key)
    self.distrusted = {(key, url) for key, url in self.distrusted if key not in keys}
    self.again += units.values()
    for group in units:
      self._score(group)

  def made_by(self, url, version):
    return [
      key
      for key, attempt in self.attempts.items()
      if attempt.fate == "finished"
      and url in attempt.summary.servers
      and attempt.summary.newest_version >= version
    ]

  def is_stale(self, summary):
    oldest = self.now.next_step - 1 - self.config.off_policy
    drop = self.config.rule == "drop"
    return (summary.oldest_version if drop else summary.newest_version) < oldest

  def forgotten(self, keys):
    """The worker was told that these will not be batched."""
    for key in keys:
      attempt = self.attempts[key]
      expect(attempt.fate != "running", f"rollout {key} is forgotten while it runs")
      if attempt.fate == "finished":
        complete = attempt.dispatch.group_id in self.advantages
        expect(complete, f"rollout {key} is forgotten before its group is complete")
        expect(self.is_stale(attempt.summary), f"rollout {key} is forgotten, and is not stale")
        attempt.fate = "stale"

  def _score(self, group):
    members = [self.attempts[key] for key in self.groups[group]]
    self.advantages.pop(group, None)
    self.now.tasks.moves.pop(group, None)
    if len(members) < self.config.group or any(m.fate in OPEN[:2] for m in members):
      return
    if group not in self._compared_with:
      self._compared_with[group] = dict(self.now.baselines)
    # Those that were filtered or stale have kept theirs: their rewards stay in the baseline.
    kept = [m for m in members if m.summary is not None]
    rewards = np.array([m.summary.reward for m in kept], np.float64)
    if len(kept):
      task = kept[0].dispatch
      self.now.tasks.moves[group] = task.environment, task.index, float(rewards.mean())
    if group not in self._credited:
      self._rewards[group] = [(m.dispatch.environment, m.summary.reward) for m in kept]
    given = self._advantages(rewards, self._compared_with[group], kept)
    flat = given is None or (self.config.drop_zero and bool(np.all(np.abs(given) <= 1e-8)))
    for member in kept:
      cut = self.config.drop_truncated and member.summary.truncated
      if member.fate == "finished" and (flat or cut or member.summary.sampled_tokens == 0):
        member.fate = "filtered"
    if not flat:
      keys = [m.dispatch.rollout_id for m in kept]
      self.advantages[group] = dict(zip(keys, given.tolist(), strict=True))

  def _advantages(self, rewards, baselines, kept):
    """float64[N] by hand, or None where there is nothing to compare with."""
    if self.config.decay is None:
      return rewards - rewards.sum() / len(rewards) if len(rewards) > 1 else None
    if not len(rewards):
      return None
    agent = kept[0].dispatch.environment
    if agent in baselines:
      return rewards - baselines[agent]
    if len(rewards) == 1:
      return rewards  # its agent's first: compared with 0
    return np.array([r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)])

  def batchable(self):
    """Groups that could be batched now, by the rule of the order."""
    fresh = lambda key: (  # noqa: E731
      self.attempts[key].fate == "finished" and not self.is_stale(self.attempts[key].summary)
    )
    ready = []
    for group in self.open_groups():
      if group in self.advantages:
        if any(map(fresh, self.groups[group])):
          ready.append(group)
      elif self.config.order == "dispatch":
        break
    return ready

  def may_dispatch(self):
    config, step = self.config, self.now.next_step
    if self.version < 0 or step > config.steps:
      return False
    size = len(self.again[0]) if self.again else config.group
    if self.again or self.count("running") + size > config.in_flight:
      return self.count("running") + size <= config.in_flight
    return step + len(self.open_groups()) // config.prompts - 1 - self.version <= config.off_policy

  def committed(self, manifest, items, oldest):
    """A manifest is on its way to the disk; `items` are what its shards hold."""
    step, config = manifest.step, self.config
    expect(step == self.now.next_step, f"batch {step} follows batch {self.now.next_step - 1}")
    expect(oldest == step - 1 - config.off_policy, f"batch {step} masks below version {oldest}")
    keys = [item.rollout_id for item in items]
    expect(len(keys) == len(set(keys)) == manifest.num_rollouts, f"batch {step} holds {keys}")
    again = self.now.trained.intersection(keys)
    expect(not again, f"batch {step} trains {again} again")
    groups = {self.attempts[key].dispatch.group_id for key in keys}
    expect(len(groups) == config.prompts == manifest.num_groups, f"batch {step} of groups {groups}")
    for item in items:
      attempt = self.attempts[item.rollout_id]
      group = attempt.dispatch.group_id
      name = f"rollout {item.rollout_id} of batch {step}"
      expect(attempt.fate == "finished", f"{name} is {attempt.fate}")
      expect(not self.is_stale(attempt.summary), f"{name} is stale: {attempt.summary}")
      expect(group in self.advantages, f"{name} is of a group that is not complete")
      due = self.advantages[group][item.rollout_id]
      expect(abs(item.advantage - due) < 1e-9, f"{name}: advantage {item.advantage}, due {due}")
    for group in groups:
      for key in self.groups[group]:
        fate = self.attempts[key].fate
        expect(fate != "finished" or key in keys, f"batch {step} leaves {key} out of group {group}")
    for key in keys:
      self.attempts[key].fate = "trained"
    self.now.trained.update(keys)
    self._move(manifest.scheduler_state["baselines"])
    self.now.tasks.move(manifest.scheduler_state["sampler"]["members"])
    self.now.next_step += 1
    self.pending = self.now.copy()
    self.pending.ended, self.pending.dispatched = self.counts(), self._known()
    self._keep(self.pending)

  def _known(self):
    """Rollouts before this number are known by more than it."""
    return max([self.now.dispatched, *(key + 1 for key in self.attempts)])

  def _keep(self, durable):
    """Of groups that are open: what is in flight waits in another life, what ended is told of."""
    groups = self.open_groups()
    durable.kept = {}
    for key in (key for group in groups for key in self.groups[group]):
      attempt = dataclasses.replace(self.attempts[key], worker="", continued=True, past=True)
      if attempt.fate in OPEN:
        attempt.fate, attempt.summary, attempt.past = "waiting", None, False
      durable.kept[key] = attempt
    durable.compared_with = {g: dict(v) for g, v in self._compared_with.items() if g in groups}
    durable.credited = {group for group in self._credited if group in groups}

  def _move(self, told):
    """Baselines after all rewards since the last commit; compared with the manifest's."""
    if self.config.decay is not None:
      rewards = collections.defaultdict(list)
      for group in sorted(self._rewards):
        for agent, reward in self._rewards[group]:
          rewards[agent].append(reward)
      for agent, given in rewards.items():
        past = self.config.decay ** len(given)
        mean = sum(given) / len(given)
        before = self.now.baselines.get(agent, mean)
        self.now.baselines[agent] = past * before + (1 - past) * mean
    self._credited.update(self._rewards)
    self._rewards = {}
    due = self.now.baselines
    same = due.keys() == dict(told).keys() and all(abs(due[k] - told[k]) < 1e-9 for k in due)
    expect(same, f"baselines are {dict(told)}, due {due}")

  def has_landed(self):
    """The manifest on its way is on the disk."""
    self.landed, self.pending = self.pending, None

  def counts(self):
    """How many ended how, over all lives."""
    here = collections.Counter(
      a.fate for a in self.attempts.values() if a.fate in ENDED and not a.past
    )
    return self.now.ended + here

  def check_accounting(self, counts):
    """Contract 3, against counts that were made from the messages alone."""
    ended = self.counts()
    due = {
      "dispatched": self.dispatched,
      **{fate: ended[fate] for fate in ENDED},
      "in_flight": sum(map(self.count, OPEN)) + len(self.limbo),
    }
    total = sum(value for key, value in counts.items() if key != "dispatched")
    expect(counts["dispatched"] == total, f"dispatched != ended + in flight: {counts}")
    expect(counts == due, f"the accounting says {counts}, what passed by says {due}")
