"""Schedules made by hand: a quiet world, and the faults that a test is about."""

from intellect3.simulation.faults import schedule


def plan(*faults, seed=1, **changes):
  """A schedule of these faults; `changes` of the quiet world."""
  world = dict(
    steps=4,
    prompts_per_step=2,
    rollouts_per_prompt=2,
    max_off_policy_steps=2,
    groups_in_flight=4,
    staleness_rule="mask",
    deterministic=False,
    sync_mode="retract",
    num_servers=2,
    num_workers=2,
    stages=False,
    evaluation_tasks=0,
    server_room=16,
    failing=0.0,
    train_seconds=1.0,
    checkpoint_every=2,
    operator_restarts=0,
    sync_transport="disk",
    bucket_bytes=4,
    routed_experts=False,
    weights_lag=0,
    pools="",
    turns=2,
    journal_seconds=0.5,
  )
  faults = sorted(faults, key=lambda fault: fault.at)
  return schedule.Schedule(seed, schedule.World(**{**world, **changes}), faults)


def fault(at, kind, target=0, seconds=3.0, detail=""):
  """One fault."""
  return schedule.Fault(at=at, kind=kind, target=target, seconds=seconds, detail=detail)
