"""The trainer's loop: a batch, a step, its weights published, its metrics written; again.

Every process of a trainer runs it, step for step the same; the first one writes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from intellect3.distributed import arrays, watchdog
from intellect3.distributed.processes import Processes
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing
from intellect3.rl import batch_sums, reference
from intellect3.training import flops, step
from intellect3.training import state as states


class Parts(NamedTuple):
  """What a step is made of; see `rl.trainer`."""

  place: Callable[[packing.Batch], packing.Batch]
  score: reference.Scorer | None
  train_step: Callable[[states.TrainState, Any], tuple[states.TrainState, step.Metrics]]
  publish: Callable[[states.TrainState], Mapping[str, float]]
  save: Callable[[states.TrainState], None]
  write: Callable[[int, Mapping[str, Any]], None]


def run(
  config: ModelConfig,
  state: states.TrainState,
  batches: Iterator[packing.Batch],
  parts: Parts,
  *,
  last_step: int,
  checkpoint_every: int,
  share: packing.Share,
  processes: Processes,
  watching: watchdog.Watchdog,
) -> None:
  """Trains on every batch.

  Args:
    config: the model.
    state: before the first of them.
    batches: this process's share of each step's rows.
    parts: what to do with them.
    last_step: is always saved.
    checkpoint_every: steps between checkpoints.
    share: which rows `batches` holds.
    processes: that do the same.
    watching: is told what is being done.
  """
  peak = flops.peak_flops()
  ended = time.perf_counter()
  watching.enter(watchdog.WAITING, int(state.step) + 1)
  for batch in batches:
    arrived = time.perf_counter()
    number = int(batch.step)
    watching.enter("the train step", number)
    placed, reference_seconds = parts.place(batch), 0.0
    if parts.score is not None:
      placed, reference_seconds = parts.score(placed)
    state, device_metrics = parts.train_step(state, placed)
    metrics = arrays.fetch(device_metrics)  # waits for the step
    stepped = time.perf_counter()
    watching.enter("publishing", number)
    publishing = parts.publish(state)
    published = time.perf_counter()
    if number % checkpoint_every == 0 or number == last_step:
      watching.enter("the checkpoint", number)
      parts.save(state)
    done = time.perf_counter()
    sums = batch_sums.merge(
      processes.gather("batch_sums", batch_sums.of_blocks(batch, share)), share.num_blocks
    )
    parts.write(
      number,
      {
        **metrics,
        **effective_sample_share(metrics),
        **batch_sums.metrics(batch, sums),
        "wait_seconds": arrived - ended,
        **({} if parts.score is None else {"reference_seconds": reference_seconds}),
        "step_seconds": stepped - arrived - reference_seconds,
        "publish_seconds": published - stepped,
        **publishing,
        "checkpoint_seconds": done - published,
        "loop_seconds": done - ended,
        "trained_tokens_per_second": float(batch.loss_tokens) / (done - ended),
        "mfu": flops.mfu(
          flops.train_flops(config, tokens=sums.tokens, attended_pairs=sums.attended_pairs),
          done - ended,
          peak,
          jax.device_count(),
        ),
      },
    )
    ended = done
    watching.enter(watchdog.WAITING, number + 1)


def effective_sample_share(metrics: Mapping[str, Any]) -> dict[str, float]:
  """`(sum r)^2 / (N sum r^2)` of the importance ratios, 1 / N to 1, where the loss gives both sums.

  Kish's effective sample size over the loss-masked tokens of the whole batch, as a share.
  """
  mean, square = metrics.get("importance_ratio"), metrics.get("importance_ratio_squared")
  if mean is None or not square:
    return {}
  return {"effective_sample_share": float(mean) ** 2 / float(square)}
