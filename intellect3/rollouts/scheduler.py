"""The scheduler: a pure state machine that decides what is attempted, batched, dropped and when.

No clock, no I/O, no task: every method is called by the orchestrator (or by a simulator, or by
Hypothesis) and returns what should be done. The same calls in the same order give the same result.

    dispatch() -> rollouts to start          finished(summary)    lost(ids, reason)    again(ids)
    plan_batch() -> BatchPlan | None         weights(version)     commit(plan)

Staleness (contract 2): a token trained in step n has staleness (n-1) - its version. A rollout is
dispatched only where, first in first out, it would be batched within `max_off_policy_steps`; what
comes late nevertheless is dropped or masked when its batch is planned.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intellect3.rollouts import accounting as accounting_lib
from intellect3.rollouts import credit as credit_lib
from intellect3.rollouts import difficulty, filters, in_vain, messages
from intellect3.rollouts import groups as groups_lib
from intellect3.rollouts.scheduler_settings import Settings


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """A batch to be written: which rollouts with which advantage, of which groups."""

  step: int
  oldest_version: int
  advantages: Mapping[int, float]
  group_ids: Sequence[int]
  summaries: Sequence[messages.RolloutSummary]


class Scheduler:
  """See the module's docstring."""

  def __init__(
    self,
    settings: Settings,
    sampler: difficulty.TaskSampler,
    group_filters: filters.Filters,
    credit: credit_lib.Credit,
  ) -> None:
    if settings.rollouts_per_prompt < credit.smallest_group:
      raise ValueError(
        f"rollouts_per_prompt: expected an integer >= {credit.smallest_group} with an advantage_fn "
        f"that compares the rollouts of a group, got {settings.rollouts_per_prompt}"
      )
    self._settings = settings
    self._sampler = sampler
    self._filters = group_filters
    self._credit = credit
    self.accounting = accounting_lib.Accounting()
    self.next_step = 1
    self.version = -1
    self._next_group = 0
    self._groups: dict[int, groups_lib.Group] = {}  # in dispatch order
    self._running = 0  # rollouts of all groups
    self._again: dict[int, list[int]] = {}  # group -> rollouts to be started again
    self._completed: dict[int, None] = {}  # groups with something to train, as they completed
    self._unchecked: dict[int, None] = {}  # of these, those not yet held against `_checked`
    self._checked: int | None = None  # the oldest version that was allowed at the last look
    self._in_vain = in_vain.InVain(settings.max_groups_in_vain)
    self._pool_updates: dict[int, tuple[str, int, float]] = {}
    self._baselines: credit_lib.Baselines = {}
    self._rewards: dict[int, list[tuple[str, float]]] = {}  # group -> (agent, shaped reward)
    self._shaped: dict[int, float] = {}  # rollout -> reshaped reward, until it is told
    self._forget: list[int] = []
    self._ended_lengths: list[tuple[int, str]] = []

  # What should be started.

  def dispatch(self) -> list[messages.Dispatch]:
    """The rollouts to start now, whole groups at a time; first what is to be started again."""
    started: list[messages.Dispatch] = []
    if self.version < 0 or self.next_step > self._settings.steps:
      return started
    while self._again:
      group_id, ids = next(iter(self._again.items()))
      if self._running + len(ids) > self._settings.max_rollouts_in_flight:
        return started
      del self._again[group_id]
      self._running += len(ids)
      for rollout_id in ids:
        group = self._groups[group_id]
        started.append(groups_lib.dispatch(group, rollout_id, self._settings, continued=True))
    while self._may_dispatch():
      started.extend(self._new_group())
    return started

  def _may_dispatch(self) -> bool:
    settings = self._settings
    if self._running + settings.rollouts_per_prompt > settings.max_rollouts_in_flight:
      return False
    # The step in which, first in first out, a group dispatched now would be batched. It may lie
    # after the run's last one: then the group stands in for a straggler, or is cancelled.
    step = self.next_step + len(self._groups) // settings.prompts_per_step
    return step - 1 - self.version <= settings.max_off_policy_steps

  def _new_group(self) -> list[messages.Dispatch]:
    group_id = self._next_group
    environment, index = self._sampler.draw(group_id)
    self._next_group += 1
    ids = groups_lib.members(group_id, self._settings.rollouts_per_prompt)
    group = self._groups[group_id] = groups_lib.Group(group_id, environment, index, set(ids))
    self._running += len(ids)
    started = []
    for rollout_id in ids:
      # Dispatched before, if a process did so after the last commit: the same draw, once more.
      continued = self.accounting.is_open(rollout_id)
      if not continued:
        self.accounting.dispatch(rollout_id)
      started.append(groups_lib.dispatch(group, rollout_id, self._settings, continued=continued))
    return started

  def _group_of(self, rollout_id: int) -> int:
    return rollout_id // self._settings.rollouts_per_prompt

  # What came back.

  def finished(self, summary: messages.RolloutSummary) -> None:
    """Takes a rollout's result; one that is not in flight any more (cancelled) is ignored."""
    group = self._groups.get(self._group_of(summary.rollout_id))
    if group is None or summary.rollout_id not in group.running:
      return
    group.running.remove(summary.rollout_id)
    self._running -= 1
    if summary.error is not None or summary.reward is None:
      self._end(summary.rollout_id, "errored", summary.error or "no reward")
    else:
      group.summaries[summary.rollout_id] = summary
    self._maybe_complete(group)

  def lost(self, rollout_ids: Sequence[int], reason: str) -> None:
    """Rollouts that cannot be trusted or gone on with, running or finished: errored."""
    for group, ids in self._taken_back(rollout_ids):
      for rollout_id in ids:
        group.running.discard(rollout_id)
        self._end(rollout_id, "errored", reason)
      self._maybe_complete(group)

  def again(self, rollout_ids: Sequence[int]) -> None:
    """Rollouts whose worker is gone, running or finished: another one goes on with them."""
    for group, ids in self._taken_back(rollout_ids):
      group.running.update(ids)
      self._again.setdefault(group.group_id, []).extend(ids)

  def _taken_back(self, rollout_ids: Sequence[int]) -> list[tuple[groups_lib.Group, list[int]]]:
    """Those of these that are in flight, by group, as if none had finished or been started."""
    taken: dict[int, list[int]] = {}
    for rollout_id in rollout_ids:
      group = self._groups.get(self._group_of(rollout_id))
      if group is not None and self.accounting.is_open(rollout_id):
        waiting = self._again.get(group.group_id, [])
        if rollout_id in waiting:
          waiting.remove(rollout_id)
        elif rollout_id in group.running:
          self._running -= 1
        group.summaries.pop(rollout_id, None)
        taken.setdefault(group.group_id, []).append(rollout_id)
    for group_id in taken:
      if group_id in self._completed:  # scored before: it will be scored again
        del self._completed[group_id]
        self._pool_updates.pop(group_id, None)
      self._groups[group_id].result = None
    return [(self._groups[group_id], ids) for group_id, ids in taken.items()]

  def weights(self, version: int) -> None:
    """The servers now have this version. Versions never go back."""
    if version < self.version:
      raise ValueError(f"version: expected at least {self.version}, got {version}")
    self.version = version

  def _maybe_complete(self, group: groups_lib.Group) -> None:
    if group.running:
      return
    summaries = [group.summaries[key] for key in sorted(group.summaries)]
    if group.baselines is None:
      group.baselines = self._baselines
    group.result = filters.evaluate_group(summaries, self._filters, self._credit, group.baselines)
    if self._credit.reward_fn is not None:
      self._shaped.update(group.result.rewards)
    if not group.credited:
      self._rewards[group.group_id] = [
        (credit_lib.agent_of(s.environment, s.agent), group.result.rewards[s.rollout_id])
        for s in summaries
      ]
    if group.result.mean_reward is not None:
      update = (group.environment, group.index, group.result.mean_reward)
      self._pool_updates[group.group_id] = update
    for rollout_id, reason in group.result.filtered.items():
      if self.accounting.is_open(rollout_id):
        self._end(rollout_id, "filtered", reason)
    if self._trainable(group):
      self._completed[group.group_id] = None
      self._unchecked[group.group_id] = None
    else:
      self._drop(group)

  def _drop(self, group: groups_lib.Group) -> None:
    """Nothing of a group is to be trained."""
    del self._groups[group.group_id]
    self._in_vain.ended()

  # What is trained.

  def plan_batch(self) -> BatchPlan | None:
    """The next step's batch, or None while too few groups are complete.

    Planning ends rollouts that are stale for the next step (they are stale for every later one).
    """
    if self.next_step > self._settings.steps:
      return None
    oldest = self.next_step - 1 - self._settings.max_off_policy_steps
    if self._unchecked or oldest != self._checked:
      self._drop_stale(oldest)
    chosen = self._batchable(self._settings.prompts_per_step)
    if len(chosen) < self._settings.prompts_per_step:
      return None
    advantages: dict[int, float] = {}
    summaries = []
    for group_id in chosen:
      group = self._groups[group_id]
      assert group.result is not None
      for rollout_id in self._trainable(group):
        advantages[rollout_id] = group.result.advantages[rollout_id]
        summaries.append(group.summaries[rollout_id])
    return BatchPlan(self.next_step, oldest, advantages, tuple(chosen), tuple(summaries))

  def _batchable(self, most: int) -> list[int]:
    """The `most` groups that come next, or fewer where there are not so many."""
    if len(self._completed) < most:
      return []
    if self._settings.batch_order == "completion":
      return list(itertools.islice(self._completed, most))
    ready: list[int] = []
    for group_id, group in self._groups.items():  # dispatch order; wait for the oldest
      if group.running or len(ready) == most:
        break
      ready.append(group_id)
    return ready

  def _drop_stale(self, oldest: int) -> None:
    """Ends what is too old; looks only at what may have become so since the last call."""
    looked_at = self._unchecked if oldest == self._checked else self._completed
    self._unchecked, self._checked = {}, oldest
    for group_id in [key for key in looked_at if key in self._completed]:
      group = self._groups[group_id]
      for rollout_id in self._trainable(group):
        summary = group.summaries[rollout_id]
        late = (
          summary.oldest_version
          if self._settings.staleness_rule == "drop"
          else summary.newest_version  # with `mask` a rollout is useless once every token is stale
        )
        if late < oldest:  # its reward stays: the summary is kept for the baseline
          self._end(rollout_id, "stale", self._settings.staleness_rule)
      if not self._trainable(group):
        del self._completed[group_id]
        self._drop(group)

  def _trainable(self, group: groups_lib.Group) -> list[int]:
    """Rollouts of a scored group that have an advantage and have not ended."""
    assert group.result is not None
    return [key for key in sorted(group.result.advantages) if self.accounting.is_open(key)]

  def commit(self, plan: BatchPlan) -> None:
    """The batch is on disk: its rollouts are trained, its groups are done, the pools move."""
    if plan.step != self.next_step:
      raise ValueError(f"plan.step: expected {self.next_step}, got {plan.step}")
    for rollout_id in plan.advantages:
      self._end(rollout_id, "trained")
    for group_id in plan.group_ids:
      del self._completed[group_id]
      del self._groups[group_id]
    # In dispatch order, and only here: the next tasks do not depend on who finished first.
    for _, (environment, index, mean_reward) in sorted(self._pool_updates.items()):
      self._sampler.update(environment, index, mean_reward)
    self._pool_updates.clear()
    self._move_baselines()
    self._in_vain.batched(self.accounting.reasons())
    self.next_step += 1

  def _move_baselines(self) -> None:
    """Enters the rewards of all groups that finished since the last commit, in dispatch order."""
    pairs = [pair for group_id in sorted(self._rewards) for pair in self._rewards[group_id]]
    for group_id in self._rewards:
      if group_id in self._groups:
        self._groups[group_id].credited = True
    self._rewards.clear()
    rewards = np.array([reward for _, reward in pairs], np.float64)
    self._baselines = self._credit.moved(self._baselines, rewards, [agent for agent, _ in pairs])

  def cancel_all(self, reason: str) -> list[int]:
    """Ends everything in flight as cancelled; returns the ids to be stopped."""
    ids = list(self.accounting.open_rollouts())
    for rollout_id in ids:
      self._end(rollout_id, "cancelled", reason)
    self._groups, self._completed, self._running = {}, {}, 0
    self._again.clear()
    return ids

  # What is told.

  def alarm(self) -> str | None:
    """What people should hear of groups that end in vain; raises `in_vain.NothingToTrain`."""
    return self._in_vain.alarm(len(self._completed), self.accounting)

  def take_forgotten(self) -> list[int]:
    """Finished rollouts that will never be batched, since the last call."""
    forgotten, self._forget = self._forget, []
    return forgotten

  def take_ended_lengths(self) -> list[tuple[int, str]]:
    """(sampled tokens, outcome) of the rollouts that were trained or stale since the last call."""
    ended, self._ended_lengths = self._ended_lengths, []
    return ended

  def credit_metrics(self, rollout_ids: Sequence[int]) -> Mapping[str, float]:
    """The baselines by agent, and the mean reshaped reward of these rollouts; told once of each."""
    row = {f"baseline/{agent}": value for agent, value in self._baselines.items()}
    shaped = [self._shaped.pop(key) for key in rollout_ids if key in self._shaped]
    return {**row, "shaped_reward": float(np.mean(shaped))} if shaped else row

  def is_open_group(self, group_id: int) -> bool:
    """Whether a group still runs or waits to be batched."""
    return group_id in self._groups

  def pool_counts(self) -> dict[str, int]:
    """Tasks in the easy and hard pools."""
    return self._sampler.counts()

  def state(self) -> dict[str, Any]:
    """JSON-able state after a commit: what a restart needs."""
    size = self._settings.rollouts_per_prompt
    kept = [
      group.state(key for key in groups_lib.members(group_id, size) if self.accounting.is_open(key))
      for group_id, group in self._groups.items()
    ]
    return {
      "next_step": self.next_step,
      "next_group": self._next_group,
      "rollouts_per_prompt": size,
      "groups": kept,
      "accounting": self.accounting.state(),
      "sampler": self._sampler.state(),
      "baselines": dict(self._baselines),
    }

  def restore(self, state: Mapping[str, Any] | None, dispatched: int) -> None:
    """Goes on where another process was.

    What was in flight at its last commit is started again, and what it dispatched since then will
    be: the same tasks are drawn. Their workers find what they had in the journal.

    Args:
      state: of that commit; None: there was none. ValueError where it does not fit.
      dispatched: how many rollouts were dispatched in all.
    """
    if state is not None:
      self._restore(state)
    self.accounting.reopen(range(self.accounting.counts()["dispatched"], dispatched))

  def _restore(self, state: Mapping[str, Any]) -> None:
    size = self._settings.rollouts_per_prompt
    if state.get("rollouts_per_prompt") != size:
      raise ValueError(
        f"rollouts_per_prompt: expected {state.get('rollouts_per_prompt')}, as the run was begun "
        f"with, got {size}"
      )
    self.next_step = state["next_step"]
    self._next_group = state["next_group"]
    self.accounting = accounting_lib.Accounting.restore(state["accounting"])
    self._sampler.restore(state["sampler"])
    self._baselines = credit_lib.restored(state["baselines"])
    self._in_vain.batched(self.accounting.reasons())
    for group in map(groups_lib.Group.restore, state["groups"]):
      self._groups[group.group_id] = group
      self._again[group.group_id] = sorted(group.running)
      self.accounting.reopen(group.running)

  def _end(self, rollout_id: int, outcome: str, reason: str = "") -> None:
    self.accounting.end(rollout_id, outcome, reason)
    if outcome in ("filtered", "stale"):
      self._forget.append(rollout_id)
    if outcome in ("trained", "stale"):
      group = self._groups[self._group_of(rollout_id)]
      self._ended_lengths.append((group.summaries[rollout_id].sampled_tokens, outcome))
