"""Supervised examples as packed batches: element n is the batch of step n.

Where the examples come from is passed in as a function of the example's number (demonstrations of
an environment, lines of a file), so that the stream is replayable from any step.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from intellect3 import types
from intellect3.pipeline import iteration, packing

Example = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Example number -> (tokens int32[T], loss_mask bool[T]); the same for the same number."""


def batches(
  example: Example,
  *,
  examples_per_step: int,
  first_step: int,
  last_step: int | None,
  row_length: int,
  micro_rows: int,
  row_counts: Sequence[int] | None = None,
  stop: threading.Event,
  prefetch: int = 2,
  share: packing.Share = packing.WHOLE,
) -> iteration.BatchIterator:
  """The batches of steps `first_step` to `last_step` as a Grain iterator.

  Step n holds the examples (n - 1) * examples_per_step up to n * examples_per_step, whole.

  Args:
    example: the examples, by number.
    examples_per_step: examples in a batch.
    first_step: where a fresh run begins; a restored state overrules it.
    last_step: the last one; None goes on until stopped.
    row_length: tokens of a row; a longer example is an error.
    micro_rows: rows of a micro-batch.
    row_counts: allowed numbers of rows; see `packing.choose_row_count`.
    stop: ends the iteration.
    prefetch: batches made ahead in a thread.
    share: the rows that this process holds. Every process makes all examples, whose lengths the
      plan follows from.

  Returns:
    An iterator of `packing.Batch` (advantages 1 on trained tokens) with state; close it.
  """
  if examples_per_step < 1:
    raise ValueError(f"examples_per_step: expected at least 1, got {examples_per_step}")

  def make(step: int, stop: iteration.Stop) -> packing.Batch | None:
    first = (step - 1) * examples_per_step
    records = {}
    for number in range(examples_per_step):
      if stop.is_set():
        return None
      records[number] = _record(first + number, step, *example(first + number))
    plan = packing.plan_rows(
      [len(records[number].trajectory.tokens) for number in range(examples_per_step)], row_length
    )
    rows = packing.choose_row_count(len(plan), micro_rows=micro_rows, row_counts=row_counts)
    own = packing.share_rows(plan, rows, share)
    trained = [int(record.trajectory.loss_mask.sum()) for record in records.values()]
    if not any(trained):
      raise ValueError(f"step {step}: loss_mask: expected a trained token, got none")
    return packing.pack(
      records,
      own,
      row_length=row_length,
      row_count=len(own),
      step=step,
      counts=packing.Counts(sum(trained), sum(tokens > 0 for tokens in trained)),
    )

  return iteration.BatchIterator(
    make, first_step=first_step, last_step=last_step, stop=stop, prefetch=prefetch
  )


def _record(
  number: int, step: int, tokens: np.ndarray, loss_mask: np.ndarray
) -> types.TrajectoryRecord:
  """An example in the form of the log: a rollout that a teacher 'sampled' with certainty."""
  loss_mask = np.asarray(loss_mask, np.bool_)
  return types.TrajectoryRecord(
    step=step,
    rollout_id=number,
    group_id=number,
    branch=0,
    task_id=f"example/{number}",
    environment="",
    reward=1.0,
    advantage=1.0,
    trajectory=types.Trajectory(
      tokens=np.asarray(tokens, np.int32),
      loss_mask=loss_mask,
      inference_logprobs=np.zeros(len(tokens), np.float32),
      policy_versions=np.where(loss_mask, 0, types.NOT_SAMPLED).astype(np.int32),
      temperature=1.0,
    ),
  )
