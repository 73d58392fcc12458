"""Worlds and faults from a seed: how large the run is, what goes wrong in it, when."""

import dataclasses
import random
from collections.abc import Sequence

from intellect3.simulation.faults import servers, truth


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
  """A small run.

  Attributes:
    steps: last training step.
    prompts_per_step: groups in a batch.
    rollouts_per_prompt: rollouts of a group.
    max_off_policy_steps: bound on staleness.
    groups_in_flight: groups running at once.
    staleness_rule: `drop` or `mask`.
    deterministic: batches in dispatch order.
    sync_mode: `in_place` or `retract`.
    num_servers: inference servers.
    num_workers: worker processes; 0: one inside the orchestrator.
    stages: whether a server's failed load leaves the old weights.
    evaluation_tasks: held-out tasks.
    server_room: requests that a server takes.
    failing: share of attempts whose environment fails.
    train_seconds: of a step.
    checkpoint_every: steps between the trainer's checkpoints.
    operator_restarts: how often somebody starts the run again that ended with a reason.
    sync_transport: `disk` or `tensor`.
    bucket_bytes: of `tensor`.
    routed_experts: whether they are asked for (`replay_routed_experts`).
    weights_lag: versions that servers are kept behind.
    pools: difficulty pools: none, `easy` (what is solved is left out) or `both` (with shares).
    turns: of a rollout at most; with three there are several branches.
    journal_seconds: see `rl.worker`; None keeps no journal.
  """

  steps: int
  prompts_per_step: int
  rollouts_per_prompt: int
  max_off_policy_steps: int
  groups_in_flight: int
  staleness_rule: str
  deterministic: bool
  sync_mode: str
  num_servers: int
  num_workers: int
  stages: bool
  evaluation_tasks: int
  server_room: int
  failing: float
  train_seconds: float
  checkpoint_every: int
  operator_restarts: int
  sync_transport: str
  bucket_bytes: int
  routed_experts: bool
  weights_lag: int
  pools: str
  turns: int
  journal_seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """One thing that goes wrong.

  Attributes:
    at: virtual second.
    kind: one of `KINDS`.
    target: which server or worker, modulo how many there are.
    seconds: how long it lasts, or until what was lost returns.
    detail: of what sort, where there are several.
  """

  at: float
  kind: str
  target: int = 0
  seconds: float = 0.0
  detail: str = ""

  def __str__(self) -> str:
    return f"{self.at:.3f} {self.kind} {self.target} {self.seconds:.1f} {self.detail}".rstrip()


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A world and its faults, in the order of their time."""

  seed: int
  world: World
  faults: Sequence[Fault]


KINDS = {
  "server_killed": 3.0,
  "server_restarted_stale": 2.0,
  "server_slow": 2.0,
  "server_hung": 2.0,
  "server_garbage": 3.0,
  "server_cut_off": 1.0,
  "server_unlisted": 1.0,
  "load_fails": 1.0,
  "load_wrong": 1.5,
  "answers_lost": 2.0,
  "worker_killed": 3.0,
  "workers_killed": 1.0,
  "worker_late": 1.0,
  "worker_twice": 1.0,
  "trainer_stalled": 1.0,
  "trainer_killed": 2.0,
  "checkpoint_lost": 1.0,
  "orchestrator_killed": 3.0,
  "disk_full": 1.0,
  "disk_slow": 1.0,
  "shard_cut": 0.3,
  "weights_cut": 0.3,
  "writer_killed": 1.5,
}
"""What goes wrong, and how often it is drawn."""

POINTS = (
  "log.dispatched",
  "log.distrusted",
  "log.commit.before",
  "log.commit.after",
  "shard.before",
  "shard.after",
  "weights.verified",
)
"""Where the orchestrator may be killed, besides any time."""


def draw(seed: int) -> Schedule:
  """The schedule of a seed; the same in every process."""
  rng = random.Random(truth.draw(seed, "schedule"))
  rollouts = rng.choice((2, 2, 3))
  off_policy = rng.choice((0, 1, 1, 2, 4))
  world = World(
    steps=rng.choice((3, 4, 5)),
    prompts_per_step=rng.choice((1, 2, 2)),
    rollouts_per_prompt=rollouts,
    max_off_policy_steps=off_policy,
    groups_in_flight=rng.choice((2, 3, 4, 6)),
    staleness_rule=rng.choice(("drop", "mask")),
    deterministic=rng.random() < 0.3,
    sync_mode=rng.choice(("in_place", "retract")),
    num_servers=rng.choice((1, 2, 2, 3)),
    num_workers=rng.choice((0, 1, 2, 2)),
    stages=rng.random() < 0.5,
    evaluation_tasks=rng.choice((0, 0, 1, 2)),
    server_room=rng.choice((2, 4, 16)),
    failing=rng.choice((0.0, 0.1, 0.3)),
    train_seconds=rng.choice((0.2, 1.0, 4.0)),
    checkpoint_every=rng.choice((1, 2, 3)),
    operator_restarts=rng.choice((0, 4, 4, 4)),
    sync_transport=rng.choice(("disk", "tensor")),
    bucket_bytes=rng.choice((4, 8, 1 << 20)),
    routed_experts=rng.random() < 0.4,
    weights_lag=rng.randrange(off_policy + 1) if rng.random() < 0.3 else 0,
    pools=rng.choice(("", "", "easy", "both")),
    turns=rng.choice((1, 2, 2, 4)),
    journal_seconds=rng.choice((None, 0.0, 0.5, 5.0)),
  )
  length = 6.0 + world.steps * (world.train_seconds + 4.0)
  faults = [_fault(rng, length, world) for _ in range(rng.choice((0, 1, 2, 3, 4, 6)))]
  return Schedule(seed, world, sorted(faults, key=lambda fault: fault.at))


def _fault(rng: random.Random, length: float, world: World) -> Fault:
  kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
  detail = ""
  if kind == "server_garbage":
    experts = servers.EXPERTS_GARBAGE if world.routed_experts else ()
    detail = rng.choice((*servers.GARBAGE, *experts))
  elif kind == "orchestrator_killed" and rng.random() < 0.6:
    detail = f"{rng.choice(POINTS)} {rng.randrange(1, 5)}"
  elif kind == "server_restarted_stale":
    plain = (f"0 {servers.PLAIN}",) if world.routed_experts else ()
    detail = rng.choice(("0", "0", "default", "1", "40", *plain))
  elif kind == "writer_killed":
    detail = "shard" if world.journal_seconds is None else rng.choice(("shard", "journal"))
  elif kind in ("answers_lost", "worker_twice"):
    detail = str(rng.randrange(1, 6))
  return Fault(
    at=rng.random() * length,
    kind=kind,
    target=rng.randrange(6),
    seconds=rng.choice((0.5, 3.0, 10.0, 40.0)),
    detail=detail,
  )
