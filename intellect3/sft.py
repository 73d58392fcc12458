"""Supervised fine-tuning: the composition root of the warm-up.

    examples -> packed Batch -> train step -> RUN/model (Hugging Face), RUN/checkpoints, RUN/metrics

The same pipeline, step, optimizer and checkpoints as reinforcement learning; only the source of the
batches and the loss differ.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from intellect3 import telemetry
from intellect3.distributed import arrays, watchdog
from intellect3.distributed import processes as starting
from intellect3.losses.supervised import negative_log_likelihood
from intellect3.models import hf, kernel_choice
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing, placement, sft_source
from intellect3.rl import batch_sums, checks
from intellect3.sharding.mesh import make_mesh
from intellect3.sharding.rules import TRAIN_FSDP, Rules
from intellect3.training import checkpoint, flops, layout, loss_inputs, router_bias
from intellect3.training import state as states
from intellect3.training.optimizer import Optimizer
from intellect3.training.step import make_train_step, supervised
from intellect3.weights import export

Report = Callable[[dict[str, Any]], None]

# Files that whoever starts the run may have put into its directory already.
_EXPECTED_FILES = {"config.gin", "logs"}


def run(
  *,
  run_dir: str | os.PathLike[str],
  example: sft_source.Example,
  steps: int,
  examples_per_step: int,
  row_length: int,
  micro_rows: int,
  optimizer: Optimizer,
  model_config: ModelConfig | None = None,
  model_path: str | os.PathLike[str] | None = None,
  model_options: Mapping[str, Any] | None = None,
  row_counts: Sequence[int] | None = None,
  loss_fn: Callable[..., Any] = negative_log_likelihood,
  head_chunk_size: int = 256,
  router_bias_rate: float = 0.0,
  mesh: Mesh | None = None,
  rules: Rules = TRAIN_FSDP,
  seed: int = 0,
  checkpoint_every: int | None = None,
  keep_checkpoints: int = 2,
  write_tokenizer: Callable[[pathlib.Path], None] | None = None,
  resume: bool = False,
  stop: threading.Event | None = None,
  report: Report | None = None,
  stall_seconds: float = 3600.0,
) -> Callable[[], dict[str, Any]]:
  """Checks a supervised run and returns what trains the model on its examples and exports it.

  Args:
    run_dir: where everything goes: `metrics/sft.jsonl`, `checkpoints/`, `model/`, `summary.json`.
    example: the examples by number; see `pipeline.examples`.
    steps: optimizer steps in all.
    examples_per_step: examples in each step's batch.
    row_length: tokens of a packed row; an example that is longer is an error.
    micro_rows: rows of a micro-batch.
    optimizer: see `training.optimizer`.
    model_config: a fresh model of this description, initialised from `seed`; or
    model_path: a Hugging Face directory to start from (its tokenizer is exported along).
    model_options: fields of ModelConfig to change (dtype, remat_policy, ...);
      parameters are float32 in any case.
    row_counts: allowed numbers of rows of a batch; None: `micro_rows` times the powers of two.
    loss_fn: `(logprobs, loss_mask, *, denominator) -> (loss, metrics)`; see
      `training.step.supervised`.
    head_chunk_size: tokens per chunk of the vocabulary head.
    router_bias_rate: of `training.router_bias`; 0 leaves the routers' correction bias frozen.
    mesh: of `sharding.mesh.make_mesh`; None lays all devices along `fsdp`.
    rules: logical axis -> mesh axis, of `sharding.rules`.
    seed: of the initial parameters.
    checkpoint_every: steps between checkpoints; None saves only the last step.
    keep_checkpoints: how many to keep.
    write_tokenizer: writes tokenizer files into the exported model's directory.
    resume: go on from the last whole checkpoint of `run_dir`.
    stop: ends the run after the step in progress, with a checkpoint and without an export.
    report: called with each metrics row; None prints a line now and then.
    stall_seconds: a step, checkpoint or export that takes longer ends the process, with its stacks
      on stderr (`distributed.watchdog`).

  Of several processes (`distributed`) each calls this alike; the first writes what is not an array,
  and its `stop` is everybody's.

  Returns:
    A function that does the run. It gives the summary, as in `summary.json`: `loss_start`,
    `loss_end`, `steps`, `tokens_per_second` (of tokens trained on or conditioned on, without
    padding, compilation aside), `wall_seconds`, `stopped`.

  Raises:
    ValueError: `run_dir` holds a run and `resume` is off, or none and it is on; both or neither of
      `model_config` and `model_path`; or a bad number.
  """
  run_dir = pathlib.Path(run_dir)
  if (model_config is None) == (model_path is None):
    raise ValueError("model_config, model_path: expected exactly one of the two")
  for field, value in (
    ("steps", steps),
    ("checkpoint_every", 1 if checkpoint_every is None else checkpoint_every),
    ("keep_checkpoints", keep_checkpoints),
    ("examples_per_step", examples_per_step),
    ("row_length", row_length),
    ("head_chunk_size", head_chunk_size),
  ):
    if value < 1:
      raise ValueError(f"{field}: expected at least 1, got {value}")
  packing.choose_row_count(1, micro_rows=micro_rows, row_counts=row_counts)
  loss_inputs.check(supervised(loss_fn))
  checks.rules("rules", rules)
  checks.number("stall_seconds", stall_seconds, 0, above=True)
  processes = starting.here()
  mesh = mesh or make_mesh(fsdp=jax.device_count())
  placement.check_rows(mesh, micro_rows=micro_rows, row_length=row_length)
  if run_dir.exists() and not run_dir.is_dir():
    raise ValueError(f"run_dir: expected a directory, got the file {run_dir}")
  # The first process alone: the files of this very run may appear while another looks.
  if (
    resume
    and processes.is_first
    and not any((run_dir / name).exists() for name in ("metrics", "checkpoints"))
  ):
    raise ValueError(f"run_dir: expected a run, got {run_dir}: there is no run to resume")
  if not resume and run_dir.exists():
    found = sorted({entry.name for entry in run_dir.iterdir()} - _EXPECTED_FILES)
    if found:
      raise ValueError(f"run_dir: expected none, or resume; got {run_dir} with {', '.join(found)}")
  with jax.set_mesh(mesh):
    config = kernel_choice.resolve(_config(model_config, model_path, model_options or {}))
  router_bias.check(config, router_bias_rate)
  shardings = layout.state_shardings(config, optimizer, mesh, rules)

  def start() -> dict[str, Any]:
    processes.barrier("checked")  # before the first file of the run is there
    began = time.monotonic()
    step = make_train_step(
      config,
      supervised(loss_fn),
      optimizer,
      micro_rows=micro_rows,
      head_chunk_size=head_chunk_size,
      router_bias_rate=router_bias_rate,
    )
    train_step = layout.compile_step(step, shardings, mesh, rules)
    share = placement.own_share(mesh)
    batches = sft_source.batches(
      example,
      examples_per_step=examples_per_step,
      first_step=1,
      last_step=steps,
      row_length=row_length,
      micro_rows=micro_rows,
      row_counts=row_counts,
      stop=threading.Event(),  # whether to stop is agreed on before each batch
      share=share,
    )
    with (
      watchdog.watched(
        f"process {processes.index} of {processes.count}", stall_seconds
      ) as watching,
      batches,
      checkpoint.Checkpointer(run_dir / "checkpoints", keep=keep_checkpoints) as checkpoints,
      contextlib.ExitStack() as stack,
    ):
      # Not kept in a variable: the state alone holds the parameters.
      state = layout.make_state(
        config,
        optimizer,
        shardings,
        **(
          {"seed": seed}
          if model_path is None
          else {"params": hf.load_sharded(model_path, config, shardings.params, dtype="float32")}
        ),
      )
      if resume and checkpoints.latest_step() is not None:
        state = checkpoints.restore(state, batches).state
      writer = None
      if processes.is_first:
        writer = stack.enter_context(telemetry.MetricsWriter(run_dir, "sft"))
        writer.truncate_after(int(state.step))
      rows = _Rows(writer, config, steps, report or _print_row, share, processes)
      state = _train(
        lambda state, batch: train_step(state, placement.place(batch, mesh)),
        state,
        _until_stopped(batches, stop, processes, watching),
        lambda state: checkpoints.save(state, batches),
        checkpoint_every,
        rows,
      )
      stopped = int(state.step) < steps
      watching.enter("the export", steps)
      if not stopped:
        _export(run_dir / "model", config, state.params, model_path, write_tokenizer, processes)
    summary = None
    if processes.is_first:
      summary = _summary(run_dir, int(state.step), stopped, time.monotonic() - began)
      (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return processes.broadcast("summary", summary)

  return start


def _config(
  model_config: ModelConfig | None,
  model_path: str | os.PathLike[str] | None,
  model_options: Mapping[str, Any],
) -> ModelConfig:
  """The config, and a check of the directory that the parameters will come from."""
  if model_config is not None:
    return dataclasses.replace(model_config, **model_options)
  assert model_path is not None
  return hf.check(model_path, **{"dtype": "float32", "param_dtype": "float32", **model_options})


def _until_stopped(
  batches: Iterator[packing.Batch],
  stop: threading.Event | None,
  processes: starting.Processes,
  watching: watchdog.Watchdog,
) -> Iterator[packing.Batch]:
  """The batches until the first process's `stop` is set, which all look at before each."""
  while not processes.broadcast("stop", stop is not None and stop.is_set()):
    watching.enter(watchdog.WAITING, 0)
    batch = next(batches, None)
    if batch is None:
      return
    watching.enter("the train step or its checkpoint", int(batch.step))
    yield batch


def _train(
  train_step: Callable[..., Any],
  state: states.TrainState,
  batches: Iterator[packing.Batch],
  save: Callable[[states.TrainState], None],
  checkpoint_every: int | None,
  rows: "_Rows",
) -> states.TrainState:
  """Takes every batch, with a checkpoint now and then and after the last one."""
  saved = done = int(state.step)
  for batch in batches:
    state, metrics = train_step(state, batch)
    done = int(batch.step)
    rows.add(done, batch, metrics)
    if checkpoint_every is not None and done % checkpoint_every == 0:
      rows.flush()
      save(state)
      saved = done
  rows.flush()
  if done > saved:
    save(state)
  return state


class _Rows:
  """Writes each step's metrics one step late, so that fetching them does not hold up the device.

  Of several processes all fetch, and the one with a writer writes.
  """

  def __init__(
    self,
    writer: telemetry.MetricsWriter | None,
    config: ModelConfig,
    steps: int,
    report: Report,
    share: packing.Share,
    processes: starting.Processes,
  ):
    self._writer, self._config, self._steps, self._report = writer, config, steps, report
    self._share, self._processes = share, processes
    self._peak = flops.peak_flops() if writer is not None else 1.0
    self._pending: tuple[int, packing.Batch, Any] | None = None
    self._last = time.monotonic()
    self._warm = False

  def add(self, step: int, batch: packing.Batch, metrics: Any) -> None:
    self.flush()
    self._pending = (step, batch, metrics)

  def flush(self) -> None:
    if self._pending is None:
      return
    step, batch, metrics = self._pending
    self._pending = None
    values = arrays.fetch(metrics)
    told = self._processes.gather("batch_sums", batch_sums.of_blocks(batch, self._share))
    sums = batch_sums.merge(told, self._share.num_blocks)
    now = time.monotonic()
    seconds, self._last = max(now - self._last, 1e-9), now
    if self._writer is None:
      return
    work = flops.train_flops(self._config, tokens=sums.tokens, attended_pairs=sums.attended_pairs)
    row = {
      "steps": self._steps,
      **values,
      "tokens": sums.tokens,
      "loss_tokens": int(batch.loss_tokens),
      "rows": sums.rows,
      "padding_share": 1.0 - sums.tokens / sums.slots,
      "seconds": seconds,
      "tokens_per_second": sums.tokens / seconds,
      "mfu": flops.mfu(work, seconds, self._peak, jax.device_count()),
      # The first step of a process compiles, and so does a new number of rows.
      "compiled": not self._warm,
    }
    self._warm = True
    self._writer.write(step, row)
    self._report({"step": step, **row})


def _print_row(row: dict[str, Any]) -> None:
  every = max(row["steps"] // 20, 1)
  if row["step"] % every == 0 or row["step"] in (1, row["steps"]):
    print(
      f"sft step {row['step']}/{row['steps']}  loss {row['loss']:.4f}  "
      f"grad_norm {row['grad_norm']:.3f}  tokens/s {row['tokens_per_second']:,.0f}",
      flush=True,
    )


def _export(
  directory: pathlib.Path,
  config: ModelConfig,
  params: Any,
  tokenizer_from: str | os.PathLike[str] | None,
  write_tokenizer: Callable[[pathlib.Path], None] | None,
  processes: starting.Processes,
) -> None:
  if processes.count == 1:
    hf.save(directory, config, params, source=tokenizer_from)
  else:
    export.export(directory, config, params, source=tokenizer_from, processes=processes)
  if write_tokenizer is not None and processes.is_first:
    write_tokenizer(directory)


def _summary(
  run_dir: pathlib.Path, steps: int, stopped: bool, wall_seconds: float
) -> dict[str, Any]:
  rows = telemetry.read_metrics(telemetry.metrics_path(run_dir, "sft"))
  warm = [row for row in rows if not row["compiled"]]
  seconds = float(np.sum([row["seconds"] for row in warm]))
  return {
    "loss_start": rows[0]["loss"] if rows else None,
    "loss_end": rows[-1]["loss"] if rows else None,
    "steps": steps,
    "tokens_per_second": sum(row["tokens"] for row in warm) / seconds if warm else None,
    "wall_seconds": wall_seconds,
    "stopped": stopped,
  }
