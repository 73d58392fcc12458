"""A finished run as a scenario: what its own files say of its cluster, and what came of it.

Place in the ring: beside it; `tools.simulate_demo` measures the first steps of a run with this,
simulates, and holds the prediction against the steps that follow. Nothing here is fitted to idle
shares, staleness or step times: those are what is predicted.

What is measured, and from where:

    decode rate      rollout_seconds_mean R against rollouts running n (metrics/orchestrator.jsonl),
                     R = idle + n / served by least squares, without the time servers stood still;
                     where n hardly varied, n / served
    at once          rollouts_spanning_versions: those that a sync found between their first token
                     and their last; the others waited before the one or after the other
    weight sync      weight_sync/*_seconds and weight_sync_seconds, likewise
    trainer          step_seconds over tokens, publish_seconds, weights/*_seconds; for reading, how
                     long after its commit a batch was begun (`pickup_seconds`)
    messages         how many of the rollouts in flight ran at a worker: `waits.message_seconds`
    lengths, tasks   the RolloutLog's records

The servers' prefill, the clients' and the environments' own time are all in R, and have no part of
their own. Where servers were never idle, n / served is what the run made: then the step's time
follows from it nearly by itself, and shares and staleness are what is put to the test.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from intellect3 import rollout_log, telemetry, types
from intellect3.simulation import scenario as scenarios

Rows = Sequence[Mapping[str, Any]]

SPAN = 2.0
"""Of n over the blocks, largest over smallest, from which on a line is fitted."""
BLOCKS = 15
"""Of the measured steps, over which R and n are averaged: a single step's are noise."""
FREE = 1e12
"""Tokens a second of what R contains already."""
TABLE = 12
"""Places of the decode table."""
FEW = 0.5
"""Share of rollouts that span versions, up to which their number tells how many run at once."""


@dataclasses.dataclass(frozen=True)
class Service:
  """How long a rollout takes where n run: `idle_seconds + n / rollouts_per_second`.

  Attributes:
    idle_seconds: of one that runs alone, nearly.
    rollouts_per_second: that all servers together end, at most.
    running: n of each block that it was fitted to.
    seconds: R of each block, without the servers' pauses.
  """

  idle_seconds: float
  rollouts_per_second: float
  running: Sequence[float]
  seconds: Sequence[float]

  def at(self, running: float) -> float:
    """Seconds of a rollout among so many."""
    return self.idle_seconds + running / self.rollouts_per_second


@dataclasses.dataclass(frozen=True)
class Observed:
  """What some steps of a run came to.

  Attributes:
    trainer_idle_share: of the trainer's time, waiting for batches.
    mean_staleness: of trained rollouts, in steps.
    step_seconds: from one step's end to the next one's.
  """

  trainer_idle_share: float
  mean_staleness: float
  step_seconds: float


def rows_of(run_dir: pathlib.Path, role: str, steps: Collection[int]) -> Rows:
  """The metrics rows of some steps.

  Raises:
    ValueError: one is missing.
  """
  file = telemetry.metrics_path(run_dir, role)
  rows = [row for row in telemetry.read_metrics(file) if row["step"] in set(steps)]
  if not rows or len(rows) != len(steps):
    missing = sorted(set(steps) - {row["step"] for row in rows})
    raise ValueError(f"{file}: expected {len(steps)} steps, got {len(rows)}; not {missing[:3]}")
  return rows


def alternate(first: int, last: int, block: int) -> tuple[list[int], list[int]]:
  """Two halves of a run's steps, block by block: one to measure, one to predict.

  Halves in a row would differ by whatever else the machine did meanwhile.
  """
  steps = range(first, last + 1)
  odd = [step for step in steps if (step - first) // block % 2]
  return sorted(set(steps) - set(odd)), odd


def observed(run_dir: pathlib.Path, steps: Collection[int]) -> Observed:
  """What became of some steps of a run."""
  trainer = rows_of(run_dir, "trainer", steps)
  orchestrator = rows_of(run_dir, "orchestrator", steps)
  loop = _total(trainer, "loop_seconds")
  return Observed(
    trainer_idle_share=_total(trainer, "wait_seconds") / loop,
    mean_staleness=_mean(orchestrator, "staleness_mean"),
    step_seconds=loop / len(trainer),
  )


def measured(
  run_dir: pathlib.Path,
  steps: Collection[int],
  *,
  num_servers: int,
  max_running: int,
  tasks: Mapping[str, int],
) -> tuple[scenarios.Scenario, Service]:
  """The scenario of a run, from some of its steps alone.

  Args:
    run_dir: of a run that wrote `rollout_seconds_mean`.
    steps: to look at; leave those out that compile.
    num_servers: of the run.
    max_running: requests that each server computes at once at most; see `at_once`.
    tasks: training tasks by environment.

  Returns:
    The scenario, and how its decode rate was found.

  Raises:
    ValueError: the files lack a metric or a step.
  """
  trainer = rows_of(run_dir, "trainer", steps)
  orchestrator = rows_of(run_dir, "orchestrator", steps)
  found = service(orchestrator)
  sync = _sync(orchestrator)
  tokens = _mean(orchestrator, "sampled_length_mean")
  max_running = at_once(orchestrator, num_servers=num_servers, most=max_running)
  batch = np.unique(np.geomspace(1, max_running, TABLE).round())
  publish = _mean(trainer, "publish_seconds")
  waited = _mean(trainer, "weights/wait_seconds")
  scenario = scenarios.Scenario(
    name=f"{run_dir.name}, {len(steps)} steps from {min(steps)} to {max(steps)}",
    servers=scenarios.Servers(
      count=num_servers,
      max_running=max_running,
      decode_batch=tuple(map(float, batch)),
      decode_tokens_per_second=tuple(
        float(count * tokens / found.at(count * num_servers)) for count in batch
      ),
      prefill_tokens_per_second=FREE,
    ),
    sync=sync,
    trainer=scenarios.Trainer(
      fixed_seconds=_mean(trainer, "checkpoint_seconds"),
      seconds_per_token=_total(trainer, "step_seconds") / _total(trainer, "tokens"),
      read_seconds=pickup_seconds(run_dir, steps),
      gather_seconds=publish - waited,
      write_seconds=_mean(trainer, "weights/write_seconds"),
    ),
    environments=_environments(run_dir, steps, tasks),
  )
  return scenario, found


def service(rows: Rows) -> Service:
  """Fits R = idle + n / served to the orchestrator's rows.

  R and n are averaged over blocks of steps, each weighted by its rollouts; the share of the time
  in which servers stood still is taken out of R, since it is simulated by itself: once a step, for
  a row tells of its syncs what they took, not how many they were.

  Raises:
    ValueError: a metric is missing.
  """
  running, seconds = [], []
  stood = [_stood_still(row) for row in rows if "weight_sync_seconds" in row]
  stood_still = float(np.mean(stood)) if stood else 0.0
  for block in np.array_split(np.arange(len(rows)), min(BLOCKS, len(rows))):
    some = [rows[index] for index in block]
    window = _total(some, "collect_seconds")
    if not any(row["sampled_tokens"] > 0 for row in some):  # no rollout ended
      continue
    ended, each = _ended(some)
    spent = float(np.dot(ended, each))
    still = stood_still * len(some) / window
    running.append(spent / window)
    seconds.append(spent / ended.sum() * max(0.0, 1 - still))
  slope, idle = 0.0, 0.0
  if max(running) >= SPAN * min(running):
    slope, idle = np.polyfit(running, seconds, 1)
  if slope <= 0 or idle < 0:  # nothing to be told apart: what was ended a second, at any n
    slope, idle = sum(seconds) / sum(running), 0.0
  return Service(float(idle), 1 / float(slope), running, seconds)


def at_once(rows: Rows, *, num_servers: int, most: int) -> int:
  """Requests that a server computes at once.

  Each sync makes those span two versions that have their first token and not their last. Where
  nearly all do, as with long rollouts, that tells nothing: then it is `most`.

  Args:
    rows: the orchestrator's.
    num_servers: of the run.
    most: that each server has room for.
  """
  spanning, rollouts = _mean(rows, "rollouts_spanning_versions"), _mean(rows, "batch_rollouts")
  if spanning > FEW * rollouts:
    return most
  return min(most, max(1, round(spanning / num_servers)))


def pickup_seconds(run_dir: pathlib.Path, steps: Collection[int]) -> float:
  """From a batch's commit to the begin of its step, where the trainer waited for it.

  Trainer and orchestrator each tell how long their steps took, one after the other. The clocks are
  set so that the quickest pick-up takes as long as the trainer's shortest waits (the batch lay
  ready, and was read). A run that was resumed in between has other clocks after it.

  Args:
    run_dir: of the run.
    steps: to average over.

  Raises:
    ValueError: a step up to the last of them is missing.
  """
  last = max(steps)
  trainer, orchestrator = (
    rows_of(run_dir, role, range(1, last + 1)) for role in ("trainer", "orchestrator")
  )
  waited, took = _column(trainer, "wait_seconds"), _column(trainer, "loop_seconds")
  begun = np.cumsum(took) - took + waited
  committed = np.cumsum(_column(orchestrator, "collect_seconds"))
  chosen = np.array(sorted(steps)) - 1
  apart = (begun - committed)[chosen]
  ready = float(np.quantile(waited[chosen], 0.05))
  idle = waited[chosen] > 2 * ready
  if not idle.any():
    return ready
  return ready + float(np.mean(apart[idle] - apart[idle].min()))


def running(rows: Rows) -> float:
  """Rollouts that ran at the workers, on average, by Little's law: those of each that ended."""
  return float(np.dot(*_ended(rows)) / _total(rows, "collect_seconds"))


def ended_per_second(rows: Rows) -> float:
  """Rollouts that ended well."""
  return float(_ended(rows)[0].sum() / _total(rows, "collect_seconds"))


def _ended(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Rollouts that ended in each row in which some did, and the seconds of one."""
  busy = [row for row in rows if row["sampled_tokens"] > 0]
  ended = _column(busy, "sampled_tokens") / _column(busy, "sampled_length_mean")
  return ended, _column(busy, "rollout_seconds_mean")


def _stood_still(row: Mapping[str, Any]) -> float:
  """Seconds of one of a row's syncs in which a server decoded nothing."""
  return row.get("weight_sync/load_seconds", 0.0) + row.get("weight_sync/resume_seconds", 0.0)


def _sync(rows: Rows) -> scenarios.Sync:
  synced = [row for row in rows if "weight_sync_seconds" in row]
  if not synced:
    raise ValueError("weight_sync_seconds: expected it in some row, got none")
  parts = {
    part: _mean(synced, f"weight_sync/{part}_seconds")
    for part in ("pause", "load", "resume", "first_token")
  }
  whole = _mean(synced, "weight_sync_seconds")
  return scenarios.Sync(
    verify_seconds=max(0.0, whole - sum(parts.values())),
    pause_seconds=parts["pause"],
    load_seconds=parts["load"],
    resume_seconds=parts["resume"],
    canary_seconds=parts["first_token"],
  )


def _environments(
  run_dir: pathlib.Path, steps: Collection[int], tasks: Mapping[str, int]
) -> dict[str, scenarios.Environment]:
  """Lengths, prompts and how often each task was solved, of the trained rollouts."""
  sampled: dict[str, list[int]] = {name: [] for name in tasks}
  prompts: dict[str, list[int]] = {name: [] for name in tasks}
  rewards: dict[str, dict[int, list[float]]] = {name: {} for name in tasks}
  for step in sorted(steps):
    manifest = rollout_log.read_manifest(run_dir / "rollouts", step)
    if manifest is None:
      raise ValueError(f"{run_dir}: expected the batch of step {step}, got none")
    count = sum(len(shard.lengths) for shard in manifest.shards)
    for record in rollout_log.read_records(run_dir / "rollouts", manifest, range(count)).values():
      ours = int((record.trajectory.policy_versions != types.NOT_SAMPLED).sum())
      name = record.environment
      sampled[name].append(ours)
      prompts[name].append(len(record.trajectory.tokens) - ours)
      rewards[name].setdefault(record.group_id, []).append(record.reward)
  return {
    name: scenarios.Environment(
      lengths=scenarios.Lengths(empirical=tuple(sorted(sampled[name]))),
      prompt_tokens=max(1, round(float(np.mean(prompts[name])))),
      solved=tuple(
        float(np.clip(share, 0, 1))
        for share in sorted(float(np.mean(group)) for group in rewards[name].values())
      ),
      tasks=tasks[name],
    )
    for name in tasks
  }


def _column(rows: Rows, key: str) -> np.ndarray:
  missing = [row["step"] for row in rows if key not in row]
  if missing:
    raise ValueError(f"{key}: expected it in every row, step {missing[0]} has none")
  return np.array([row[key] for row in rows], np.float64)


def _total(rows: Rows, key: str) -> float:
  return float(_column(rows, key).sum())


def _mean(rows: Rows, key: str) -> float:
  return float(_column(rows, key).mean())
