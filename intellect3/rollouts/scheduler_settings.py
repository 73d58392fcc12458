"""What the scheduler is asked to do: those of a run's parameters that decide what is trained."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the scheduler is asked to do.

  Attributes:
    steps: last training step of the run.
    prompts_per_step: groups with at least one trainable rollout in a batch.
    rollouts_per_prompt: G; 1 only where the baseline is not the group's.
    max_off_policy_steps: bound on staleness; 0 is the synchronous loop.
    max_rollouts_in_flight: rollouts running at once (rounded down to whole groups, at least one).
    staleness_rule: `drop` the stale rollout, or `mask` its stale tokens.
    batch_order: `completion` (groups as they finish) or `dispatch` (deterministic mode).
    temperature: of the training rollouts.
    max_groups_in_vain: so many groups that left nothing to train since the last batch, for each
      group that waits for the next one and one more, end the run (`in_vain`).
    seed: run seed; a rollout's seed follows from it, the group and the sample.
  """

  steps: int
  prompts_per_step: int
  rollouts_per_prompt: int
  max_off_policy_steps: int
  max_rollouts_in_flight: int
  staleness_rule: str = "drop"
  batch_order: str = "completion"
  temperature: float = 1.0
  max_groups_in_vain: int = 10_000
  seed: int = 0

  def __post_init__(self) -> None:
    for field, low in (
      ("steps", 1),
      ("prompts_per_step", 1),
      ("rollouts_per_prompt", 1),
      ("max_off_policy_steps", 0),
      ("max_rollouts_in_flight", 1),
      ("max_groups_in_vain", 1),
    ):
      value = getattr(self, field)
      if not isinstance(value, int) or value < low:
        raise ValueError(f"{field}: expected an integer >= {low}, got {value!r}")
    if self.staleness_rule not in ("drop", "mask"):
      raise ValueError(f"staleness_rule: expected 'drop' or 'mask', got {self.staleness_rule!r}")
    if self.batch_order not in ("completion", "dispatch"):
      raise ValueError(
        f"batch_order: expected 'completion' or 'dispatch', got {self.batch_order!r}"
      )
    if self.temperature <= 0:
      raise ValueError(f"temperature: expected > 0 for training, got {self.temperature}")
    if self.max_rollouts_in_flight < self.rollouts_per_prompt:
      raise ValueError(
        f"max_rollouts_in_flight: expected at least one group of {self.rollouts_per_prompt}, "
        f"got {self.max_rollouts_in_flight}"
      )
