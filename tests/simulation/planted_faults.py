"""Faults put into the production code by hand, which the fault lab has to find (`planted_table`).

Each is what somebody might write, and what a test of one part might not see.
"""

import contextlib
import dataclasses

import msgspec
import numpy as np
from array_record.python import array_record_module

from intellect3 import rollout_log, types
from intellect3.inference import continuation, fleet, protocol, routed_experts, weight_sync
from intellect3.rl import conducting, outside, serving
from intellect3.rollouts import (
  accounting,
  difficulty,
  holdings,
  journal,
  messages,
  orchestrator,
  scheduler,
  worker,
)


def stale_is_kept(monkeypatch):
  """The scheduler batches what is too old."""
  monkeypatch.setattr(scheduler.Scheduler, "_drop_stale", lambda self, oldest: None)


def a_failure_is_a_zero(monkeypatch):
  """A worker tells of an attempt that failed as of one that was worth nothing."""
  summarize = worker._summarize

  def told(*arguments):
    summary = summarize(*arguments)
    if summary.error is None:
      return summary
    return msgspec.structs.replace(summary, error=None, reward=0.0)

  monkeypatch.setattr(worker, "_summarize", told)


def no_canary(monkeypatch):
  """A sync does not look at what the server scores."""
  sync = weight_sync.sync_server

  async def unchecked(*arguments, **options):
    return await sync(*arguments, **{**options, "bound": 1e9})

  monkeypatch.setattr(weight_sync, "sync_server", unchecked)


def a_segment_has_one_version(monkeypatch):
  """All tokens of a reply are stamped with the version of its last one."""
  expand = protocol.expand_versions

  def last_one(spans, length):
    versions = expand(spans, length)
    return np.full_like(versions, versions[-1]) if length else versions

  monkeypatch.setattr(protocol, "expand_versions", last_one)


def a_continuation_forgets(monkeypatch):
  """What goes on elsewhere begins at the prompt again."""
  ask = continuation.Progress.next_request

  def from_the_prompt(self, prompt, **options):
    return ask(self, prompt[: len(prompt) - len(self.tokens)], **options)

  monkeypatch.setattr(continuation.Progress, "next_request", from_the_prompt)


def dispatches_are_not_kept(monkeypatch):
  """The count of dispatches is lost with the orchestrator."""
  monkeypatch.setattr(outside.LogOnDisk, "dispatched", lambda self, total: None)


def a_resume_forgets_what_ran(monkeypatch):
  """What was dispatched since the last batch was never dispatched, after a restart."""
  restore = scheduler.Scheduler.restore
  monkeypatch.setattr(
    scheduler.Scheduler, "restore", lambda self, state, dispatched: restore(self, state, 0)
  )


def nobody_looks_for_weights(monkeypatch):
  """The orchestrator trusts that it is told of each version."""
  monkeypatch.setattr(conducting, "LOOK_SECONDS", 1e9)


def a_broken_load_is_believed(monkeypatch):
  """What runs where a load broke off is taken at its server's word."""
  monkeypatch.setattr(holdings.Holdings, "distrust", lambda self, url, version: None)


def old_weights_are_told(monkeypatch):
  """Where the servers with the newest weights are gone, those with older ones are named."""
  tell = fleet.Fleet._tell

  def newest_now(self):
    self._newest = 0
    tell(self)

  monkeypatch.setattr(fleet.Fleet, "_tell", newest_now)


def a_version_is_told_too_high(monkeypatch):
  """Workers are told of the version that comes next."""
  servers = orchestrator.Orchestrator.servers

  def one_more(self, versions):
    servers(self, {url: version + 1 for url, version in versions.items()})

  monkeypatch.setattr(orchestrator.Orchestrator, "servers", one_more)


def the_lag_is_not_kept(monkeypatch):
  """Servers get the newest version, whatever lag was asked for."""
  monkeypatch.setattr(serving, "served_version", lambda newest, *, lag, steps: newest)


def experts_are_one_token_late(monkeypatch):
  """Each token is given the experts of the one before it."""
  decode = routed_experts.decode

  def late(told, *, tokens, router):
    return np.roll(decode(told, tokens=tokens, router=router), 1, axis=0)

  monkeypatch.setattr(routed_experts, "decode", late)


def pools_are_not_kept(monkeypatch):
  """A resume begins with the pools that were there at first: none."""
  restore = difficulty.TaskSampler.restore

  def empty(self, state):
    restore(self, {**state, "members": {name: [] for name in state["members"]}})

  monkeypatch.setattr(difficulty.TaskSampler, "restore", empty)


def pools_move_the_wrong_way(monkeypatch):
  """What was easy becomes hard."""
  pool_of = difficulty.Pools.pool_of

  def turned(self, mean_reward):
    pool = pool_of(self, mean_reward)
    return "hard" if pool == "easy" else pool

  monkeypatch.setattr(difficulty.Pools, "pool_of", turned)


def the_advantage_is_logged_as_the_reward(monkeypatch):
  """A record's reward is not what its environment gave."""
  records = worker._records

  def mixed_up(batch, rollout, advantage):
    for record in records(batch, rollout, advantage):
      yield msgspec.structs.replace(record, reward=advantage)

  monkeypatch.setattr(worker, "_records", mixed_up)


def a_dispatch_that_comes_twice_runs_twice(monkeypatch):
  """A worker does not know that it runs a rollout already."""
  handle = worker.Worker.handle

  def forgetful(self, message):
    if isinstance(message, messages.Dispatch):
      self._running.pop(message.rollout_id, None)
    handle(self, message)

  monkeypatch.setattr(worker.Worker, "handle", forgetful)


def a_summary_that_comes_twice_counts_twice(monkeypatch):
  """A rollout that ended ends again when it is told of again."""
  monkeypatch.setattr(
    holdings.Holdings, "runs", lambda self, name, rollout_id: self._owner.get(rollout_id) == name
  )
  finished = scheduler.Scheduler.finished

  def again(self, summary):
    group = self._groups.get(summary.rollout_id // self._settings.rollouts_per_prompt)
    if group is not None and summary.rollout_id in group.summaries:
      self.accounting._ended["errored"] += 1
    finished(self, summary)

  monkeypatch.setattr(scheduler.Scheduler, "finished", again)
  monkeypatch.setattr(accounting.Accounting, "check", lambda self: None)


def what_is_trained_counts_as_cancelled(monkeypatch):
  """The identity holds, and is not true."""
  end = accounting.Accounting.end

  def mistaken(self, rollout_id, outcome, reason=""):
    end(self, rollout_id, "cancelled" if outcome == "trained" else outcome, reason)

  monkeypatch.setattr(accounting.Accounting, "end", mistaken)


def a_resume_numbers_groups_anew(monkeypatch):
  """After a restart the first groups are dispatched again."""
  restore = scheduler.Scheduler._restore
  monkeypatch.setattr(
    scheduler.Scheduler,
    "_restore",
    lambda self, state: restore(self, {**state, "next_group": 0}),
  )


def a_result_is_kept_later(monkeypatch):
  """A rollout goes on before its tool's result is on the disk."""

  async def later(self, path, result):
    self._keep(journal._Effect(path, result))

  monkeypatch.setattr(journal._Kept, "keep_effect", later)


def journals_are_not_read(monkeypatch):
  """Whoever takes a rollout over begins it again."""
  monkeypatch.setattr(journal, "read", lambda path: [])


def distrust_ends_with_the_process(monkeypatch):
  """A restart trusts what a server made while its weights were a mixture."""
  monkeypatch.setattr(outside.LogOnDisk, "distrusted", lambda self, url, version: None)


def a_batch_lacks_a_group(monkeypatch):
  """A batch is one group short."""
  plan_batch = scheduler.Scheduler.plan_batch

  def short(self):
    plan = plan_batch(self)
    if plan is None or len(plan.group_ids) < 2:
      return plan
    size = self._settings.rollouts_per_prompt
    kept = plan.group_ids[:-1]
    return dataclasses.replace(
      plan,
      group_ids=kept,
      advantages={key: a for key, a in plan.advantages.items() if key // size in kept},
      summaries=tuple(s for s in plan.summaries if s.group_id in kept),
    )

  monkeypatch.setattr(scheduler.Scheduler, "plan_batch", short)


def a_cut_batch_is_trusted(monkeypatch):
  """Who reads a batch takes what is there of it for all of it."""

  def read_records(log_dir, manifest, wanted):
    records = []
    for entry in manifest.shards:
      path = rollout_log.step_directory(log_dir, manifest.step) / entry.file
      with contextlib.suppress(RuntimeError):  # nothing of it can be read
        reader = array_record_module.ArrayRecordReader(str(path))
        records += [types.decode(data, types.TrajectoryRecord) for data in reader.read_all()]
    return dict(enumerate(records))

  monkeypatch.setattr(rollout_log, "read_records", read_records)


def a_batch_is_committed_before_it_is_written(monkeypatch):
  """A worker says that a shard is there when it has begun with it."""
  write = worker.Worker._write

  async def early(self, batch, rollouts):
    whole = self._write_shard

    async def begun(path, records):
      records = list(records)
      entry = rollout_log.write_shard(path.with_name(f"{path.name}.ahead"), records)
      self._spawn(_later(whole, path, records))
      return msgspec.structs.replace(entry, file=path.name)

    self._write_shard = begun
    try:
      await write(self, batch, rollouts)
    finally:
      self._write_shard = whole

  monkeypatch.setattr(worker.Worker, "_write", early)


async def _later(write, path, records):
  await write(path, records)


def a_full_disk_is_kept_quiet_by_a_worker(monkeypatch):
  """A worker that cannot write says nothing."""
  send = worker.Worker.__init__

  def quiet(self, *arguments, **options):
    send(self, *arguments, **options)
    told = self._send
    self._send = lambda m: None if isinstance(m, messages.WorkerFailed) else told(m)

  monkeypatch.setattr(worker.Worker, "__init__", quiet)


def a_full_disk_is_kept_quiet_by_the_orchestrator(monkeypatch):
  """A manifest that cannot be written is left out, and the run goes on."""
  commit = orchestrator.Orchestrator._commit

  async def quiet(self, plan):
    with contextlib.suppress(OSError):
      await commit(self, plan)

  monkeypatch.setattr(orchestrator.Orchestrator, "_commit", quiet)


def damaged_weights_are_sent(monkeypatch):
  """Nobody compares what was published with its manifest."""
  monkeypatch.setattr(outside.manifests, "verify", lambda directory: [])


def a_refusal_leaves_out_the_lost(monkeypatch):
  """Where weights are damaged, servers that are lost may come back with the ones before."""
  refuse = fleet.Fleet.refuse

  def of_present(self, version, reason):
    members = self._members
    self._members = {u: m for u, m in members.items() if m.state != "lost"}
    try:
      return refuse(self, version, reason) or [
        weight_sync.ServerSync("nobody", reason, 0.0, {}, answered=False)
      ]
    finally:
      self._members = members

  monkeypatch.setattr(fleet.Fleet, "refuse", of_present)
