"""What a plan is of: a training program's parameters, as a run binds them.

Place in the ring: beside it. `tools.plan_run` fills a Job from a run's gin file; `programs` makes
of it the functions that the composition roots jit.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing
from intellect3.sharding import mesh as mesh_lib
from intellect3.sharding.rules import TRAIN_FSDP, Rules
from intellect3.training.optimizer import Optimizer

FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}
"""What the composition roots take where a run's `model_options` do not say otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A training program without its data.

  Attributes:
    model: the model with the run's options, kernels not yet resolved.
    optimizer: of `training.optimizer`.
    rl_loss: the loss of the reinforcement-learning step; None: the run has no such step.
    sft_loss: the loss of the supervised step, as `sft.run` takes it.
    mesh: sizes of the mesh axes that the run binds; None: all devices on `fsdp`.
    rules: logical axis -> mesh axis.
    row_length: tokens of a packed row.
    micro_rows: rows of a micro-batch.
    rows: rows of the step's batch.
    trajectory_tokens: length of the trajectories that fill the rows; attention's arithmetic grows
      with it.
    head_chunk_size: tokens per chunk of the vocabulary head.
    router_bias_rate: of `training.router_bias`.
    decoupled: as `rl.trainer.trainer` takes it.
    replay_routed_experts: whether the batch holds the experts to take.
    reference: the frozen model that scores each batch; None: there is none.
  """

  model: ModelConfig
  optimizer: Optimizer
  rl_loss: Any = None
  sft_loss: Any = None
  mesh: Mapping[str, int] | None = None
  rules: Rules = TRAIN_FSDP
  row_length: int
  micro_rows: int
  rows: int
  trajectory_tokens: int
  head_chunk_size: int = 256
  router_bias_rate: float = 0.0
  decoupled: bool = False
  replay_routed_experts: bool = False
  reference: ModelConfig | None = None

  def __post_init__(self) -> None:
    """Raises ValueError naming the field, what was expected and what was given."""
    for field in ("row_length", "micro_rows", "rows", "trajectory_tokens", "head_chunk_size"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
    if self.rows % self.micro_rows:
      raise ValueError(
        f"rows: expected a multiple of micro_rows = {self.micro_rows}, got {self.rows}"
      )
    if self.trajectory_tokens > self.row_length:
      raise ValueError(
        f"trajectory_tokens: expected at most row_length = {self.row_length}, "
        f"got {self.trajectory_tokens}"
      )
    if self.rl_loss is None and self.sft_loss is None:
      raise ValueError("rl_loss, sft_loss: expected at least one, got neither")
    unknown = set(self.mesh or {}) - set(mesh_lib.AXES)
    if unknown:
      raise ValueError(f"mesh: expected axes of {mesh_lib.AXES}, got {sorted(unknown)}")

  @property
  def tokens(self) -> int:
    """Tokens of a step's batch, no row padded."""
    return self.rows * self.row_length

  @property
  def attended_pairs(self) -> int:
    """(query, key) pairs under the causal mask of a step's batch."""
    whole, rest = divmod(self.row_length, self.trajectory_tokens)
    lengths = [self.trajectory_tokens] * whole + [rest]
    return self.rows * sum(length * (length + 1) // 2 for length in lengths)

  @property
  def needs_devices(self) -> int:
    """Devices that the run's mesh is of; 1 where it takes all that there are."""
    return math.prod((self.mesh or {}).values())

  def axes(self, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes on so many devices, as the composition roots choose them."""
    return dict(self.mesh) if self.mesh is not None else {"fsdp": devices}


def rows_of(
  tokens: int, *, row_length: int, micro_rows: int, row_counts: Sequence[int] | None
) -> int:
  """Rows that a step's batch is padded to: the most it can be, every row counted as needed.

  Args:
    tokens: of the step's trajectories.
    row_length, micro_rows, row_counts: of the run; see `pipeline.packing.choose_row_count`.
  """
  needed = -(-tokens // row_length)
  if row_counts is not None and needed > max(row_counts):
    return max(row_counts)  # a run's step cannot be larger
  return packing.choose_row_count(needed, micro_rows=micro_rows, row_counts=row_counts)
