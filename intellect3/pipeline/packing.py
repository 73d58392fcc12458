"""Packing: trajectories of many lengths into `[rows, length]` arrays.

Between the RolloutLog and the train step. A trajectory is never split over rows, padding has
segment id 0, and the plan follows from the lengths alone, so that every host of a cluster computes
the same plan from the manifest and then reads only the records of its own rows.
"""

import bisect
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from intellect3.losses import components
from intellect3.types import COMPONENTS, NOT_SAMPLED, RouterShape, Trajectory, TrajectoryRecord

Plan = tuple[tuple[int, ...], ...]
"""For each row the numbers of the trajectories in it, in the order in which they stand there."""


class Batch(NamedTuple):
  """One step's packed batch; a pytree of arrays, NumPy on the host and jax.Array once placed.

  Attributes:
    tokens: int32[rows, length].
    loss_mask: bool[rows, length], the tokens trained on.
    inference_logprobs: float32[rows, length], of the policy that sampled; 0.0 where not sampled.
    advantages: float32[rows, length], the trajectory's advantage on its loss-masked tokens, else 0.
    temperature: float32[rows, length], of sampling; 1.0 in padding.
    policy_versions: int32[rows, length]; `NOT_SAMPLED` where not sampled.
    segment_ids: int32[rows, length]; 1, 2, ... within a row, 0 in padding.
    positions: int32[rows, length], from 0 within each segment.
    step: int32[], the training step (1-based).
    loss_tokens: int32[], loss-masked tokens of the whole batch over all hosts: the denominator.
    loss_sequences: int32[], trajectories of the whole batch with a loss-masked token.
    routed_experts: uint8 or uint16[rows, length, MoE layers, A], the experts to replay; None where
      none are replayed.
    experts_recorded: bool[rows, length], the tokens that `routed_experts` is of; None with it.
    rl_weights: float32[rows, length], of the policy-gradient term, 0 off the loss mask; None where
      the log holds none.
    ce_weights: likewise of the cross-entropy term, on any token but a trajectory's first.
    ref_kl_weights: likewise of the term against the reference model, 0 off the loss mask.
    component_denominators: float32[] each, the whole batch's tokens of weight other than 0 by term
      (`loss_tokens` of a term without weights); None where the log holds no weights.
    ref_logprobs: float32[rows, length], of the reference model; None until it has scored the batch.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  inference_logprobs: np.ndarray
  advantages: np.ndarray
  temperature: np.ndarray
  policy_versions: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  step: np.ndarray
  loss_tokens: np.ndarray
  loss_sequences: np.ndarray
  routed_experts: np.ndarray | None = None
  experts_recorded: np.ndarray | None = None
  rl_weights: np.ndarray | None = None
  ce_weights: np.ndarray | None = None
  ref_kl_weights: np.ndarray | None = None
  component_denominators: components.Denominators | None = None
  ref_logprobs: np.ndarray | None = None


class Counts(NamedTuple):
  """Sums over a whole step's batch, on all hosts: what every loss divides by (contract 5).

  Attributes:
    loss_tokens: loss-masked tokens.
    loss_sequences: trajectories with a loss-masked token.
    component_tokens: tokens of weight other than 0, by loss component that the log weights.
  """

  loss_tokens: int
  loss_sequences: int
  component_tokens: Mapping[str, int] = MappingProxyType({})


def plan_rows(lengths: Sequence[int], row_length: int) -> Plan:
  """Best-fit decreasing bin packing: longest first, each into the fullest row that still holds it.

  At most 11/9 of the optimal number of rows (+1); ties go to the lower number and the older row, so
  the plan is a function of its arguments. O(n log n) comparisons.

  Args:
    lengths: tokens of each trajectory.
    row_length: tokens that a row holds.

  Returns:
    One tuple of trajectory numbers per row; every number occurs once.

  Raises:
    ValueError: a trajectory is longer than a row, or empty.
  """
  for number, length in enumerate(lengths):
    if not 1 <= length <= row_length:
      raise ValueError(
        f"plan_rows: trajectory {number}: expected 1 to row_length = {row_length} tokens, "
        f"got {length}"
      )
  rows: list[list[int]] = []
  free: list[tuple[int, int]] = []  # (free tokens, row), sorted
  for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
    length = lengths[number]
    place = bisect.bisect_left(free, (length, -1))
    if place == len(free):
      rows.append([])
      room, row = row_length, len(rows) - 1
    else:
      room, row = free.pop(place)
    rows[row].append(number)
    bisect.insort(free, (room - length, row))
  return tuple(tuple(row) for row in rows)


def choose_row_count(needed: int, *, micro_rows: int, row_counts: Sequence[int] | None) -> int:
  """The number of rows that a batch is padded to, from a small set, so that nothing recompiles.

  Args:
    needed: rows of the plan.
    micro_rows: rows of a micro-batch; the result is a multiple of it.
    row_counts: the counts allowed; None allows `micro_rows` times the powers of two.

  Returns:
    The smallest allowed count that is at least `needed`.

  Raises:
    ValueError: a count is no multiple of `micro_rows`, or none is large enough.
  """
  if micro_rows < 1:
    raise ValueError(f"micro_rows: expected at least 1, got {micro_rows}")
  if row_counts is None:
    count = micro_rows
    while count < needed:
      count *= 2
    return count
  for count in row_counts:
    if count < 1 or count % micro_rows:
      raise ValueError(f"row_counts: expected multiples of micro_rows = {micro_rows}, got {count}")
  enough = [count for count in row_counts if count >= needed]
  if not enough:
    raise ValueError(
      f"row_counts: expected a count of at least {needed} rows, got {tuple(row_counts)}"
    )
  return min(enough)


class Share(NamedTuple):
  """The part of a batch's rows that one process holds (`placement.own_share`).

  Attributes:
    blocks: numbers of the blocks, ascending; two processes may hold the same one.
    num_blocks: blocks that the rows are cut into, one after the other and equally long.
  """

  blocks: tuple[int, ...]
  num_blocks: int


WHOLE = Share((0,), 1)


def share_rows(plan: Plan, row_count: int, share: Share) -> Plan:
  """The rows of a share; those beyond the plan are empty.

  Args:
    plan: the whole batch's.
    row_count: rows of the whole batch.
    share: which of them.

  Raises:
    ValueError: the rows do not divide into the share's blocks.
  """
  if row_count % share.num_blocks:
    raise ValueError(
      f"row_counts: expected multiples of {share.num_blocks} blocks, got {row_count}"
    )
  size = row_count // share.num_blocks
  rows = [row for block in share.blocks for row in range(block * size, (block + 1) * size)]
  return tuple(plan[row] if row < len(plan) else () for row in rows)


def pack(
  records: Mapping[int, TrajectoryRecord],
  plan: Plan,
  *,
  row_length: int,
  row_count: int,
  step: int,
  counts: Counts,
  router: RouterShape | None = None,
) -> Batch:
  """Lays records out as the plan says.

  Args:
    records: by trajectory number; every number of `plan` must be there.
    plan: the rows to fill (on a cluster: this host's rows).
    row_length: tokens of a row.
    row_count: rows of the result; rows beyond the plan are padding.
    step: the training step.
    counts: of the whole batch; the components that it counts are those that the records weight.
    router: what the model's routers choose of, to pack the records' routed experts; None leaves
      them out.

  Returns:
    The batch, NumPy arrays of shape [row_count, row_length].

  Raises:
    ValueError: a record breaks contract 1, or its first token is trained on (nothing predicts it),
      or its routed experts are missing or not such as the model has, or it weights other components
      than `counts` names.
  """
  if len(plan) > row_count:
    raise ValueError(f"row_count: expected at least the plan's {len(plan)} rows, got {row_count}")
  batch = _empty(row_count, row_length, step, counts, router)
  for row, numbers in enumerate(plan):
    start = 0
    for segment, number in enumerate(numbers, start=1):
      record = records[number]
      _check(record, router, counts.component_tokens)
      trajectory = record.trajectory
      end = start + len(trajectory.tokens)
      if end > row_length:
        raise ValueError(f"plan: row {row} holds more than row_length = {row_length} tokens")
      span = (row, slice(start, end))
      batch.tokens[span] = trajectory.tokens
      batch.loss_mask[span] = trajectory.loss_mask
      batch.inference_logprobs[span] = trajectory.inference_logprobs
      batch.advantages[span] = np.where(trajectory.loss_mask, record.advantage, 0.0)
      batch.temperature[span] = trajectory.temperature
      batch.policy_versions[span] = trajectory.policy_versions
      batch.segment_ids[span] = segment
      batch.positions[span] = np.arange(end - start)
      experts = trajectory.routed_experts
      if experts is not None and batch.routed_experts is not None:
        assert batch.experts_recorded is not None
        recorded = row, slice(start, start + len(experts))
        batch.routed_experts[recorded] = experts
        batch.experts_recorded[recorded] = True
      for component in counts.component_tokens:
        weights = getattr(batch, f"{component}_weights")
        weights[span] = _counted_weights(record, component)
      start = end
  return batch


def empty_batch(
  row_count: int, row_length: int, *, step: int, loss_tokens: int, loss_sequences: int = 0
) -> Batch:
  """A batch of nothing but padding, to be filled."""
  return _empty(row_count, row_length, step, Counts(loss_tokens, loss_sequences), None)


def _empty(
  row_count: int, row_length: int, step: int, counts: Counts, router: RouterShape | None
) -> Batch:
  shape = (row_count, row_length)
  experts = recorded = denominators = None
  if router is not None:
    chosen = (router.num_moe_layers, router.num_experts_per_token)
    experts, recorded = np.zeros((*shape, *chosen), router.dtype), np.zeros(shape, np.bool_)
  weighted = counts.component_tokens
  if weighted:
    tokens = {name: weighted.get(name, counts.loss_tokens) for name in COMPONENTS}
    denominators = components.Denominators(
      **{name: np.asarray(count, np.float32) for name, count in tokens.items()}
    )
  return Batch(
    tokens=np.zeros(shape, np.int32),
    loss_mask=np.zeros(shape, np.bool_),
    inference_logprobs=np.zeros(shape, np.float32),
    advantages=np.zeros(shape, np.float32),
    temperature=np.ones(shape, np.float32),
    policy_versions=np.full(shape, NOT_SAMPLED, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    step=np.asarray(step, np.int32),
    loss_tokens=np.asarray(counts.loss_tokens, np.int32),
    loss_sequences=np.asarray(counts.loss_sequences, np.int32),
    routed_experts=experts,
    experts_recorded=recorded,
    component_denominators=denominators,
    **{f"{name}_weights": np.zeros(shape, np.float32) for name in weighted},
  )


def _counted_weights(record: TrajectoryRecord, component: str) -> np.ndarray:
  """A record's weights of a component, 0 where it does not reach; see `Batch`."""
  weights = record.token_weights[component]
  if component == "ce":
    return np.where(np.arange(len(weights)) > 0, weights, 0.0)
  return np.where(record.trajectory.loss_mask, weights, 0.0)


def _check(record: TrajectoryRecord, router: RouterShape | None, weighted: Collection[str]) -> None:
  trajectory = record.trajectory
  try:
    record.check()
    if set(record.token_weights) != set(weighted):
      raise ValueError(
        f"token_weights: expected components {sorted(weighted)}, got {sorted(record.token_weights)}"
      )
    if trajectory.loss_mask[:1].any():
      raise ValueError("Trajectory.loss_mask: expected False on the first token, got True")
    if not (trajectory.temperature >= 0.0 and np.isfinite(trajectory.temperature)):
      raise ValueError(f"Trajectory.temperature: expected >= 0, got {trajectory.temperature}")
    if not np.isfinite(record.advantage):
      raise ValueError(f"TrajectoryRecord.advantage: expected a number, got {record.advantage}")
    if router is not None:
      _check_experts(trajectory, router)
  except ValueError as error:
    raise ValueError(f"rollout {record.rollout_id} branch {record.branch}: {error}") from error


def _check_experts(trajectory: Trajectory, router: RouterShape) -> None:
  """Every token but the last, which predicts nothing, has its experts, and the model has those."""
  experts, least = trajectory.routed_experts, len(trajectory.tokens) - 1
  chosen = (router.num_moe_layers, router.num_experts_per_token)
  if experts is None or len(experts) < least or experts.shape[1:] != chosen:
    given = "none" if experts is None else f"{list(experts.shape)}"
    raise ValueError(
      f"Trajectory.routed_experts: expected [{least}, {chosen[0]} MoE layers, {chosen[1]} experts "
      f"per token] to replay, got {given}"
    )
  if experts.size and int(experts.max()) >= router.num_experts:
    raise ValueError(
      f"Trajectory.routed_experts: expected experts below {router.num_experts}, got {experts.max()}"
    )
