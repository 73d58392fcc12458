"""The RolloutLog as packed batches: element n is the whole batch of step n.

Packing happens inside an element, so batches never cross steps, and it follows from the manifest's
lengths alone, so on a cluster every host plans the same rows and opens only the records of its own.
How one waits for a manifest is passed in: by polling files, or by a message that it is there.
"""

import os
import threading
from collections.abc import Callable, Sequence

from intellect3 import rollout_log, types
from intellect3.pipeline import iteration, packing

Wait = Callable[[int, iteration.Stop], types.Manifest | None]
"""Waits for the manifest of a step; None when stopped before it came."""


def poll_manifests(
  log_dir: str | os.PathLike[str],
  *,
  interval_seconds: float = 0.05,
  notify: threading.Event | None = None,
) -> Wait:
  """Waits by looking at the file system.

  Args:
    log_dir: the RolloutLog.
    interval_seconds: between two looks.
    notify: an event that somebody sets when a manifest is there; the next look is then at once.
  """

  def wait(step: int, stop: iteration.Stop) -> types.Manifest | None:
    while not stop.is_set():
      if notify is not None:
        notify.clear()  # before the look: a message that comes during it counts for the next one
      manifest = rollout_log.read_manifest(log_dir, step)
      if manifest is not None:
        return manifest
      (notify or stop).wait(interval_seconds)
    return None

  return wait


def load_batch(
  log_dir: str | os.PathLike[str],
  manifest: types.Manifest,
  *,
  row_length: int,
  micro_rows: int,
  row_counts: Sequence[int] | None = None,
  router: types.RouterShape | None = None,
  share: packing.Share = packing.WHOLE,
  process_index: int = 0,
  process_count: int = 1,
) -> packing.Batch:
  """Reads, checks and packs one committed step.

  Args:
    log_dir: the RolloutLog.
    manifest: the step's.
    row_length: tokens of a row.
    micro_rows: rows of a micro-batch.
    row_counts: allowed numbers of rows over all hosts; see `packing.choose_row_count`.
    router: what the model's routers choose of, to have the records' choices in the batch.
    share: the rows that this process holds; it opens their records alone.
    process_index: this process's number.
    process_count: processes; each verifies its part of the shards' checksums.

  Returns:
    The batch, NumPy [rows of the share, row_length].

  Raises:
    ValueError: shards and manifest differ, a trajectory does not fit, or rows do not divide.
  """
  lengths = [length for entry in manifest.shards for length in entry.lengths]
  plan = packing.plan_rows(lengths, row_length)
  rows = packing.choose_row_count(len(plan), micro_rows=micro_rows, row_counts=row_counts)
  own = packing.share_rows(plan, rows, share)
  records = rollout_log.read_records(
    log_dir,
    manifest,
    [number for row in own for number in row],
    process_index=process_index,
    process_count=process_count,
  )
  return packing.pack(
    records,
    own,
    row_length=row_length,
    row_count=len(own),
    step=manifest.step,
    counts=count(manifest),
    router=router,
  )


def count(manifest: types.Manifest) -> packing.Counts:
  """A step's global counts, from its manifest alone: every host divides by the same numbers."""
  components: dict[str, int] = {}
  for entry in manifest.shards:
    for component, tokens in entry.component_tokens.items():
      components[component] = components.get(component, 0) + sum(tokens)
  return packing.Counts(
    loss_tokens=manifest.loss_tokens,
    loss_sequences=sum(tokens > 0 for entry in manifest.shards for tokens in entry.loss_tokens),
    component_tokens=components,
  )


def batches(
  log_dir: str | os.PathLike[str],
  *,
  first_step: int,
  last_step: int | None,
  row_length: int,
  micro_rows: int,
  row_counts: Sequence[int] | None = None,
  router: types.RouterShape | None = None,
  stop: threading.Event,
  notify: threading.Event | None = None,
  wait: Wait | None = None,
  prefetch: int = 1,
  share: packing.Share = packing.WHOLE,
  process_index: int = 0,
  process_count: int = 1,
) -> iteration.BatchIterator:
  """The batches of steps `first_step` to `last_step` as a Grain iterator.

  Args:
    log_dir: the RolloutLog.
    first_step: where a fresh run begins; a restored state overrules it.
    last_step: the last one; None goes on until stopped.
    row_length: tokens of a row.
    micro_rows: rows of a micro-batch.
    row_counts: allowed numbers of rows.
    router: as for `load_batch`.
    stop: ends the iteration, also while it waits.
    notify: see `poll_manifests`; only without `wait`.
    wait: how to wait for a manifest; by default `poll_manifests`.
    prefetch: batches made ahead in a thread; 0 makes them when asked.
    share: as for `load_batch`.
    process_index: this process's number.
    process_count: number of processes.

  Returns:
    An iterator of `packing.Batch` whose state is `{"next_step": n}`; close it.
  """
  if wait is not None and notify is not None:
    raise ValueError("notify: expected None where wait is given, got both")
  waiting = wait or poll_manifests(log_dir, notify=notify)

  def make(step: int, stop: iteration.Stop) -> packing.Batch | None:
    manifest = waiting(step, stop)
    if manifest is None:
      return None
    rollout_log.check_manifest(manifest, step)
    return load_batch(
      log_dir,
      manifest,
      row_length=row_length,
      micro_rows=micro_rows,
      row_counts=row_counts,
      router=router,
      share=share,
      process_index=process_index,
      process_count=process_count,
    )

  return iteration.BatchIterator(
    make, first_step=first_step, last_step=last_step, stop=stop, prefetch=prefetch
  )
