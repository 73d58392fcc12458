"""What many schedules covered: of each fault and each kind of world, how many, and with effect."""

import collections
from collections.abc import Mapping, Sequence

from intellect3.simulation.faults import schedule
from intellect3.simulation.faults.lab import Outcome

FELT = (
  "evaluation rollouts",
  "half a batch file that is not committed",
  "half a record of a journal",
  "journals written",
  "message: a request comes twice",
  "message: a request is done after its sender gave up",
  "message: lost with its connection",
  "message: news late",
  "message: news lost",
  "message: news out of order",
  "message: news twice",
  "orchestrator ended with rollouts in flight",
  "results of tools from a journal",
  "rollouts gone on with by another process",
  "rollouts of several branches",
  "rollouts of several turns",
  "stale tokens masked",
  "steps trained again from an older checkpoint",
  "tasks in difficulty pools",
  "trajectories over several versions",
)
"""What a schedule may bring besides the faults that it plans."""
GROUPS: Mapping[str, Sequence[str]] = {
  "server lost": ("server_killed", "server_cut_off", "server_unlisted"),
  "server slow": ("server_slow", "server_hung"),
  "server returns with old weights": ("server_restarted_stale",),
  "server answers garbage": ("server_garbage", "load_fails", "load_wrong"),
  "worker lost": ("worker_killed", "workers_killed"),
  "trainer stalled, killed, resumed": ("trainer_stalled", "trainer_killed", "checkpoint_lost"),
  "orchestrator killed, resumed": ("orchestrator_killed",),
  "messages late, lost, twice": ("worker_late", "worker_twice", "answers_lost"),
  "disk full, slow": ("disk_full", "disk_slow"),
  "a file half written": ("writer_killed", "shard_cut", "weights_cut"),
}
"""Kinds of faults by what they are about; every kind is in one."""


class Coverage:
  """Counts of many schedules."""

  def __init__(self) -> None:
    self.schedules = 0
    self.planned: collections.Counter[str] = collections.Counter()
    self.struck: collections.Counter[str] = collections.Counter()
    self.felt: collections.Counter[str] = collections.Counter()
    self.worlds: dict[str, collections.Counter[str]] = {}

  def add(self, plan: schedule.Schedule, outcome: Outcome) -> None:
    """Counts a schedule once for each thing that it had."""
    self.schedules += 1
    self.planned.update({fault.kind for fault in plan.faults})
    self.struck.update(outcome.happened)
    self.felt.update(outcome.felt)
    for name, value in dimensions(plan.world).items():
      self.worlds.setdefault(name, collections.Counter())[value] += 1

  def table(self) -> list[str]:
    """Lines for people."""
    lines = [f"{'fault, in schedules':52}{'planned':>9}{'struck':>9}{'felt':>9}"]
    for group, kinds in GROUPS.items():
      lines.append(group)
      for kind in kinds:
        counts = self.planned[kind], self.struck[kind], self.felt[kind]
        lines.append(f"  {kind:50}" + "".join(f"{count:9,}" for count in counts))
    lines.append("met besides")
    lines += [f"  {name:68}{self.felt[name]:9,}" for name in FELT]
    lines.append("worlds")
    for name, counter in self.worlds.items():
      values = ", ".join(f"{value} {counter[value]:,}" for value in sorted(counter))
      lines.append(f"  {name:28}{values}")
    return lines


def dimensions(world: schedule.World) -> dict[str, str]:
  """What a world is of each kind, as words."""

  def yes(value: object) -> str:
    return "yes" if value else "no"

  return {
    "weight sync": world.sync_transport,
    "sync mode": world.sync_mode,
    "server stages weights": yes(world.stages),
    "staleness rule": world.staleness_rule,
    "staleness bound": f"{world.max_off_policy_steps}",
    "weights lag": f"{world.weights_lag}",
    "deterministic order": yes(world.deterministic),
    "routed experts": yes(world.routed_experts),
    "difficulty pools": world.pools or "none",
    "journal after seconds": f"{world.journal_seconds}",
    "turns at most": f"{world.turns}",
    "evaluation tasks": f"{world.evaluation_tasks}",
    "servers": f"{world.num_servers}",
    "worker processes": f"{world.num_workers}",
    "attempts that fail": f"{world.failing:.0%}",
  }
