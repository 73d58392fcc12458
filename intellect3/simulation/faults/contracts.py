"""What has to hold in every world, whatever goes wrong; a breach ends the schedule that shows it.

Judged from outside: from what environments gave, what servers really had, what was said on the way
and what lies on the disk. Contract 2: staleness of every trained token within its bound, no token
of weights that were not yet there, each stamped with the weights that made it. Contract 3: the
identity of the accounting at every moment, no rollout trained twice, none dispatched and not
counted. Contract 4: what failed is in no batch. Contract 7: no tool is called again whose result
is kept. Experts are of the token and place they stand at, and difficulty pools hold what was earned
(`pools`).
"""

import collections
import random
import re
import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from intellect3 import types
from intellect3.rollouts import accounting, conversation, groups, messages
from intellect3.simulation.faults import pools, schedule, truth

REWARDS = (0.25, 0.5, 0.75, 1.0)
"""What an attempt may be worth: never 0, so that a failure that was scored shows."""

_SERVER_FAULTS = tuple(
  kind for kind in schedule.KINDS if kind.startswith(("server_", "load_", "answers_"))
)
REASONS: Mapping[str, Sequence[str]] = {
  r"No space left on device": ("disk_full",),
  r"no server is left after the sync of version \d+: .*fingerprints": ("weights_cut",),
  r"no server is left": _SERVER_FAULTS,
  r"no server after \d+ s": _SERVER_FAULTS,
  r"groups ended since the last batch with nothing to train": _SERVER_FAULTS,
  r"trainer: .*(bytes|crc32|records): expected": ("shard_cut",),
}
"""How a run may end before its last step, and which faults excuse it."""


class Breach(AssertionError):
  """A contract does not hold; the message says which, and where."""


class Ledger:
  """What the lab knows by itself of a run, over all lives of its processes."""

  def __init__(self, plan: schedule.Schedule) -> None:
    self._world = plan.world
    self._seed = plan.seed
    self.happened: set[str] = set()
    self.felt: set[str] = set()
    self.rewards: dict[int, list[float]] = {}
    self.posted = 0
    self._sent: collections.Counter[int] = collections.Counter()
    self._journaled: dict[int, int] = {}  # rollouts, by what names them to their environment
    self._kept: set[tuple[int, int]] = set()  # (that name, tool)
    self.trained: dict[int, int] = {}
    self.committed: dict[int, types.Manifest] = {}
    self._batches: dict[int, int] = {}
    self._published = -1
    self._told = -1
    self._pools = pools.Judge(
      pools.POOLS[plan.world.pools],
      tasks_of(plan.world),
      plan.world.rollouts_per_prompt,
    )
    self.breach: Breach | None = None

  def _breach(self, text: str) -> Breach:
    """Keeps the first breach: production code may take it for a failure of its own and go on."""
    breach = Breach(text)
    self.breach = self.breach or breach
    return breach

  # Events.

  def attempted(self, key: int, reward: float) -> None:
    """An environment scored an attempt; `key` names the rollout."""
    self.rewards.setdefault(key, []).append(reward)
    if len(self.rewards[key]) > self._sent[key]:
      raise self._breach(
        f"contract 3: a rollout was sent {self._sent[key]} times, {len(self.rewards[key])} attempts"
      )

  def acted(self, key: int, number: int) -> None:
    """A rollout's tool is called."""
    if (key, number) in self._kept:
      raise self._breach(
        f"contract 7: rollout {self._journaled[key]}, tool {number}: it is called again, its "
        "result was used"
      )

  def went_on(self, key: int, number: int) -> None:
    """A rollout has its tool's result; with a journal it is on the disk now."""
    if (key, number) in self._kept:
      self.felt.add("results of tools from a journal")
    if key in self._journaled and self._world.journal_seconds is not None:
      self._kept.add((key, number))

  def let_go(self, rollout_ids: Collection[int]) -> None:
    """Nothing of these is kept any longer; a restart that goes on before may begin them again."""
    self._kept = {each for each in self._kept if self._journaled[each[0]] not in rollout_ids}

  def published(self, version: int) -> None:
    """The trainer published a version."""
    if version != self._published + 1:
      raise self._breach(f"versions: v{version} was published after v{self._published}")
    self._published = version

  def told(self, servers: messages.Servers) -> None:
    """Workers are told of servers: of the newest version that was ever told, or a newer one."""
    for version in servers.versions.values():
      if version < self._told:
        raise self._breach(f"versions: workers are told of v{version} after v{self._told}")
      if version > self._published:
        raise self._breach(
          f"versions: workers are told of v{version}, v{self._published} is the newest"
        )
    self._told = max(self._told, *servers.versions.values(), -1)

  def dispatched(self, dispatch: messages.Dispatch) -> None:
    """A rollout is sent to a worker."""
    key = rollout_key(random.Random(conversation.derive_seed(dispatch.seed, "random")))
    self._sent[key] += 1
    if dispatch.continued:
      self.felt.add("rollouts gone on with by another process")
    if dispatch.purpose != "train":
      self.felt.add("evaluation rollouts")
      return
    self._journaled[key] = dispatch.rollout_id
    self.posted += not dispatch.continued
    wrong = self._pools.dispatched(dispatch)
    if wrong is not None:
      raise self._breach(wrong)

  def summarized(self, summary: messages.RolloutSummary) -> None:
    """A worker tells of a rollout."""
    if (summary.error is None) != (summary.reward in REWARDS):
      raise self._breach(
        f"contract 4: rollout {summary.rollout_id}: error {summary.error}, reward {summary.reward}"
      )
    if summary.error is not None:
      self.let_go([summary.rollout_id])
    if summary.purpose == "train":
      self._pools.summarized(summary)

  def moment(self, account: accounting.Accounting) -> None:
    """Any moment of the orchestrator's life (contract 3)."""
    counts = account.counts()
    ended = sum(counts[outcome] for outcome in accounting.OUTCOMES)
    if counts["dispatched"] != ended + len(list(account.open_rollouts())):
      raise self._breach(f"contract 3: {counts}")
    if min(counts.values()) < 0 or counts["dispatched"] < self.posted:
      raise self._breach(
        f"contract 3: {self.posted} dispatches were sent, the account has {counts}"
      )

  def commits(self, manifest: types.Manifest) -> None:
    """The orchestrator makes a batch visible."""
    if manifest.step in self.committed or manifest.step != len(self.committed) + 1:
      raise self._breach(f"step {manifest.step} is committed after {sorted(self.committed)}")
    self.committed[manifest.step] = manifest
    total = sum(each.num_rollouts for each in self.committed.values())
    trained = manifest.scheduler_state["accounting"]["trained"]
    if trained != total:
      raise self._breach(
        f"contract 3: {total} rollouts are in batches, {trained} counted as trained"
      )
    wrong = self._pools.commits(manifest)
    if wrong is not None:
      raise self._breach(wrong)
    if self._pools.used:
      self.felt.add("tasks in difficulty pools")

  # Batches, as the trainer reads them.

  def read(self, manifest: types.Manifest, records: Sequence[types.TrajectoryRecord]) -> None:
    """The trainer reads a step's batch, once or again."""
    step = manifest.step
    digest = zlib.crc32(b"".join(types.encode(record) for record in records))
    if self._batches.setdefault(step, digest) != digest:
      raise self._breach(f"step {step}: the batch is another one when it is read again")
    rollouts = sorted({record.rollout_id for record in records})
    if len(rollouts) != manifest.num_rollouts:
      raise self._breach(
        f"step {step}: {manifest.num_rollouts} rollouts, {len(rollouts)} in the log"
      )
    groups = {record.group_id for record in records}
    if len(groups) != self._world.prompts_per_step:
      raise self._breach(
        f"step {step}: expected {self._world.prompts_per_step} groups, got {groups}"
      )
    for rollout_id in rollouts:
      if self.trained.setdefault(rollout_id, step) != step:
        raise self._breach(
          f"contract 3: rollout {rollout_id} is trained twice, the last in step {step}"
        )
    for record in records:
      self._check(step, record)

  def _check(self, step: int, record: types.TrajectoryRecord) -> None:
    name = f"step {step}, rollout {record.rollout_id}"
    rewards = self.rewards.get(self._key(record), [])
    if record.reward not in rewards:
      raise self._breach(
        f"contract 4: {name}: reward {record.reward}, its environment gave {rewards}"
      )
    trajectory = record.trajectory
    versions = trajectory.policy_versions
    sampled = versions != types.NOT_SAMPLED
    oldest = step - 1 - self._world.max_off_policy_steps
    kept = sampled if self._world.staleness_rule == "drop" else trajectory.loss_mask
    newest = max(0, step - 1 - self._world.weights_lag)
    for where in np.flatnonzero(kept):
      if not oldest <= versions[where] <= newest:
        raise self._breach(
          f"contract 2: {name}, token {where}: version {versions[where]}, "
          f"expected {oldest} to {newest}"
        )
    if np.any(trajectory.loss_mask & ~sampled):
      raise self._breach(f"contract 1: {name}: a token that was not sampled is trained on")
    expected = truth.logprobs(versions, trajectory.tokens)
    wrong = np.flatnonzero(sampled & (np.abs(trajectory.inference_logprobs - expected) > 1e-6))
    if wrong.size:
      raise self._breach(
        f"contract 2: {name}, token {wrong[0]}: weights v{versions[wrong[0]]} are stamped on it "
        "and did not make it"
      )
    self._note_kinds(trajectory, oldest)
    experts = trajectory.routed_experts
    if not self._world.routed_experts:
      if experts is not None:
        raise self._breach(f"experts: {name}: nobody asked for them")
    elif experts is None or not np.array_equal(experts, truth.experts(trajectory.tokens[:-1])):
      raise self._breach(f"experts: {name}: they are not those of its tokens")

  def _note_kinds(self, trajectory: types.Trajectory, oldest: int) -> None:
    """What a batch has that not every batch has."""
    versions = trajectory.policy_versions[trajectory.policy_versions != types.NOT_SAMPLED]
    if versions.size and versions.min() < versions.max():
      self.felt.add("trajectories over several versions")
    if versions.size and versions.min() < oldest:
      self.felt.add("stale tokens masked")

  def _key(self, record: types.TrajectoryRecord) -> int:
    sample = record.rollout_id % self._world.rollouts_per_prompt
    index = int(record.task_id.rpartition("/")[2])
    seed = groups.rollout_seed(self._seed, record.environment, index, record.group_id, sample)
    return rollout_key(random.Random(conversation.derive_seed(seed, "random")))

  # The end.

  def ended(self, reason: str) -> None:
    """A life of the run ended with a reason: is there a fault that excuses it?

    Where solved tasks are left out, all may have been solved.
    """
    if self._world.pools == "easy" and re.search(r"tasks is normal any more", reason):
      return
    for pattern, kinds in REASONS.items():
      if re.search(pattern, reason) and self.happened & set(kinds):
        return
    raise self._breach(f"no fault excuses this end: {reason} (there were {sorted(self.happened)})")

  def complete(self, steps_read: Collection[int]) -> None:
    """The run says that all is trained."""
    expected = list(range(1, self._world.steps + 1))
    if sorted(self.committed) != expected or sorted(steps_read) != expected:
      raise self._breach(
        f"the run is done with steps {sorted(self.committed)}, {sorted(steps_read)}"
      )
    if self._published != self._world.steps:
      raise self._breach(f"the run is done with v{self._published}")


def tasks_of(world: schedule.World) -> int:
  """Tasks of each split: few with difficulty pools, so that they come again."""
  return 10 if world.pools else 40


def rollout_key(rng: random.Random) -> int:
  """What names a rollout to its environment: its first draw."""
  return rng.getrandbits(48)
