"""What a run's own configuration decides, as far as a simulation needs it.

`tools.simulated_run` fills it from a gin file; a sweep changes fields of it with
`dataclasses.replace`.
"""

import dataclasses
from collections.abc import Mapping

from intellect3.inference import weight_sync
from intellect3.rollouts import credit as credit_lib
from intellect3.rollouts import difficulty, filters, scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
  """The parameters of `rl.run`, `orchestrator.orchestrator` and `worker.worker` of these names.

  Attributes:
    scheduler: the scheduler's, the run's seed and steps among them.
    sizes: tasks by `environment/split`; a scenario that gives `tasks` overrules `train`.
    environment_weights: share of the dispatches by environment.
    pools, group_filters, credit: as the run has them.
    num_workers: worker processes; 0 is one inside the orchestrator.
    sync_mode: `in_place` or `retract`.
    The rest: see the functions named.
  """

  scheduler: scheduler.Settings
  sizes: Mapping[str, int]
  environment_weights: Mapping[str, float]
  max_new_tokens: int
  max_tokens: int
  pools: difficulty.Pools = dataclasses.field(default_factory=difficulty.Pools)
  group_filters: filters.Filters = dataclasses.field(default_factory=filters.Filters)
  credit: credit_lib.Credit = dataclasses.field(default_factory=credit_lib.Credit)
  num_workers: int = 1
  weights_lag: int = 0
  evaluation_tasks: int = 0
  sync_mode: str = "in_place"
  sync_patience_seconds: float = 30.0
  server_poll_seconds: float = 2.0
  server_patience_seconds: float = 600.0
  worker_patience_seconds: float = 600.0
  max_concurrency: int = 256
  segment_tokens: int = 4096
  spill_requests: int = 16
  wait_seconds: float = 600.0
  timeout_seconds: float = 600.0

  @property
  def settling_steps(self) -> int:
    """Steps until a run is what it will go on to be: four times the bound on staleness."""
    return max(1, 4 * self.scheduler.max_off_policy_steps)

  def __post_init__(self) -> None:
    for field, least in (
      ("max_new_tokens", 1),
      ("max_tokens", 2),
      ("num_workers", 0),
      ("weights_lag", 0),
      ("evaluation_tasks", 0),
      ("max_concurrency", 1),
      ("segment_tokens", 1),
      ("spill_requests", 0),
    ):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field}: expected an integer >= {least}, got {value!r}")
    if self.sync_mode not in weight_sync.MODES:
      raise ValueError(
        f"sync_mode: expected one of {list(weight_sync.MODES)}, got {self.sync_mode!r}"
      )
    if self.weights_lag > self.scheduler.max_off_policy_steps:
      raise ValueError(
        f"weights_lag: expected at most max_off_policy_steps "
        f"({self.scheduler.max_off_policy_steps}), got {self.weights_lag}"
      )

  @property
  def steps(self) -> int:
    """Last training step."""
    return self.scheduler.steps
