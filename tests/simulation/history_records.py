"""Records of the second book: what a run is to do, its rollouts, what a restart finds again."""

import collections
import copy
import dataclasses

from intellect3.rollouts import messages
from tests.simulation import history_tasks

ENDED = ("trained", "filtered", "stale", "cancelled", "errored")
OPEN = ("waiting", "running", "finished")  # waiting: to be started again
MOST_WORKERS = 4  # that a rollout may be lost with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What a run is asked to do."""

  steps: int = 3
  prompts: int = 1
  group: int = 2
  off_policy: int = 1
  in_flight: int = 8
  rule: str = "drop"
  order: str = "completion"
  drop_zero: bool = True
  drop_truncated: bool = False
  decay: float | None = None  # of a moving baseline; None is the group's mean
  pools: str = "none"  # a key of `history_tasks.POOLS`
  evaluation: int = 0  # tasks of each environment
  lag: int = 0  # versions that servers are kept behind
  mode: str = "in_place"

  def __str__(self):
    groups = f"{self.prompts} x {self.group} rollouts a step, at most {self.in_flight} at once"
    rest = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != field.default
      and field.name not in ("steps", "prompts", "group", "in_flight", "off_policy")
    }
    more = "".join(f", {name} {value}" for name, value in rest.items())
    return f"{self.steps} steps, {groups}, at most {self.off_policy} steps off policy{more}"


@dataclasses.dataclass
class Attempt:
  """A rollout that this life of the orchestrator knows of.

  Attributes:
    version: the oldest that it may have tokens of.
    continued: whether it was begun by another worker or in another life.
    past: whether it ended in another life, and is in the book for its group alone.
  """

  dispatch: messages.Dispatch
  worker: str
  version: int
  fate: str = "running"
  summary: messages.RolloutSummary | None = None
  continued: bool = False
  past: bool = False


@dataclasses.dataclass
class Durable:
  """What a restart finds again.

  Attributes:
    dispatched: rollouts up to here are known; of later ones only how many there were.
    kept: attempts of the groups that were open, `compared_with` and `credited` of these.
  """

  next_step: int = 1
  ended: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  trained: set = dataclasses.field(default_factory=set)
  baselines: dict = dataclasses.field(default_factory=dict)
  tasks: history_tasks.Tasks | None = None
  dispatched: int = 0
  kept: dict = dataclasses.field(default_factory=dict)
  compared_with: dict = dataclasses.field(default_factory=dict)
  credited: set = dataclasses.field(default_factory=set)

  def copy(self):
    """One that changes alone."""
    values = {name: copy.copy(value) for name, value in vars(self).items()}
    kept = {key: dataclasses.replace(attempt) for key, attempt in self.kept.items()}
    return Durable(**{**values, "kept": kept, "tasks": self.tasks.copy()})
