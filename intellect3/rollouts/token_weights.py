"""Per-token weights of the loss components: which tokens teach what, decided where tokens are.

Place in the ring: a worker asks as it writes a rollout into the RolloutLog, so token arrays need
not travel and the trainer stays blind to the algorithm: it sums weighted components
(`losses.components`). A run picks a function, `worker.worker.token_weights = @token_weights.echo`;
without one, every loss-masked token has weight 1.

A function gets the record as it would be written without weights (tokens that are stale under the
rule `mask` have lost their loss mask already) and returns float32[T] by component, one of
`types.COMPONENTS`. It must name the same components for every record of a run.
"""

from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from intellect3 import types

TokenWeights = Callable[[types.TrajectoryRecord], Mapping[str, np.ndarray]]
"""From a record to float32[T] by component."""


def echo(record: types.TrajectoryRecord, *, weight: float = 0.1) -> Mapping[str, np.ndarray]:
  """Cross-entropy on what the environment answered, beside the policy gradient on what was sampled.

  The policy learns to predict its observations (tool results, users' turns): the tokens that were
  not sampled after the first that was, so never the opening prompt. After prime-rl's `echo`
  algorithm, which gives tool results the weight 0.1; it leaves out the chat template's own tokens
  (role tags, separators) where its renderer marks them, here they count.

  Args:
    record: of any run; one of a single turn has no observations.
    weight: of an observation's token; its denominator is the number of observations' tokens.

  Returns:
    `ce`: float32[T]. The policy gradient keeps weight 1 on every loss-masked token.
  """
  _finite("weight", weight)
  sampled = record.trajectory.policy_versions != types.NOT_SAMPLED
  observed = np.logical_or.accumulate(sampled) & ~sampled
  return {"ce": np.where(observed, weight, 0.0).astype(np.float32)}


def imitate(
  record: types.TrajectoryRecord,
  *,
  reward_threshold: float = 1.0,
  weight: float = 1.0,
  rl_weight: float = 0.0,
) -> Mapping[str, np.ndarray]:
  """Cross-entropy on the policy's own good rollouts, the policy gradient elsewhere.

  A rollout whose reward is at least the threshold is imitated, as in rejection-sampling fine-tuning
  (RAFT, arXiv 2304.06767) and self-imitation (arXiv 1806.05635). What the filters keep out of the
  batch is not: where all rollouts of a group are good, `filters.Filters.zero_advantage = False`
  keeps them.

  Args:
    record: of any run.
    reward_threshold: least reward, as the environment gave it, of a rollout to be imitated.
    weight: of its loss-masked tokens in the cross-entropy.
    rl_weight: of its loss-masked tokens in the policy gradient: 0 leaves that to the other
      rollouts, 1 keeps it everywhere.

  Returns:
    `ce` and `rl`: float32[T], 0 outside the loss mask.
  """
  _finite("weight", weight)
  _finite("rl_weight", rl_weight)
  good = record.reward >= reward_threshold
  mask = record.trajectory.loss_mask.astype(np.float32)
  return {
    "ce": mask * np.float32(weight if good else 0.0),
    "rl": mask * np.float32(rl_weight if good else 1.0),
  }


def weighted(
  record: types.TrajectoryRecord, token_weights: TokenWeights | None
) -> types.TrajectoryRecord:
  """The record with its weights, yet to be checked as every record is when it is written.

  Raises:
    ValueError: what the function gives is no mapping.
  """
  if token_weights is None:
    return record
  given = token_weights(record)
  if not isinstance(given, Mapping):
    raise ValueError(f"token_weights: expected weights by component, got {given!r}")
  return msgspec.structs.replace(record, token_weights=dict(given))


def check(token_weights: TokenWeights, environment: str) -> None:
  """Tries a run's function on a solved and an unsolved record of two turns.

  Raises:
    ValueError: it is no function of a record, or gives what is no fit.
  """
  try:
    named = []
    for reward in (0.0, 1.0):
      record = weighted(_example(environment, reward), token_weights)
      record.check()
      named.append(sorted(record.token_weights))
    if named[0] != named[1] or not named[0]:
      raise ValueError(f"it names the components {named[0]} and then {named[1]}")
  except Exception as error:  # a run's own function: whatever it raises, it does not fit
    name = getattr(token_weights, "__name__", repr(token_weights))
    raise ValueError(
      "token_weights: expected a function from a record to float32[T] by component, at least one "
      f"and the same ones for every record, got {name}: {error}"
    ) from error


def _example(environment: str, reward: float) -> types.TrajectoryRecord:
  versions = np.array([-1, -1, 0, 0, -1, 0], np.int32)
  sampled = versions != types.NOT_SAMPLED
  return types.TrajectoryRecord(
    step=1,
    rollout_id=0,
    group_id=0,
    branch=0,
    task_id=f"{environment}/train/0",
    environment=environment,
    reward=reward,
    advantage=reward - 0.5,
    trajectory=types.Trajectory(
      tokens=np.arange(6, dtype=np.int32),
      loss_mask=sampled,
      inference_logprobs=np.where(sampled, -0.5, 0.0).astype(np.float32),
      policy_versions=versions,
      temperature=1.0,
    ),
  )


def _finite(field: str, value: float) -> None:
  if isinstance(value, bool) or not np.isfinite(value):
    raise ValueError(f"{field}: expected a finite number, got {value!r}")
