"""The trainer role: batches of the RolloutLog -> train steps -> published weights, checkpoints.

A pure function of (initial weights, configuration, RolloutLog): it never sees a server or an
environment. It reads step n's batch, makes weights v(n), publishes them and says so.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from intellect3 import telemetry
from intellect3.distributed import processes as starting
from intellect3.distributed import watchdog
from intellect3.models import hf, kernel_choice, parallel, transformer
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing, placement, rollout_source
from intellect3.rl import canary, checks, feed, reference, train_loop
from intellect3.rl.publisher import Publisher
from intellect3.rl.roles import NotStarted, Shared, Trainer
from intellect3.sharding import mesh as mesh_lib
from intellect3.sharding.rules import TRAIN_FSDP, Rules
from intellect3.training import checkpoint, flops, layout, loss_inputs, router_bias, step
from intellect3.training import optimizer as optimizers
from intellect3.training import state as states
from intellect3.weights import publish

logger = logging.getLogger(__name__)


def trainer(
  shared: Shared,
  *,
  loss_fn: step.Loss,
  optimizer: optimizers.Optimizer,
  row_length: int,
  micro_rows: int,
  row_counts: Sequence[int] | None = None,
  head_chunk_size: int = 256,
  router_bias_rate: float = 0.0,
  decoupled: bool = False,
  reference_path: str | None = None,
  reference_dtype: str | None = None,
  mesh: Mapping[str, int] | None = None,
  rules: Rules = TRAIN_FSDP,
  model_options: Mapping[str, Any] | None = None,
  weights_dtype: str | None = None,
  keep_weights: int = 4,
  weights_shard_bytes: int = publish.SHARD_BYTES,
  weights_threads: int = publish.THREADS,
  canary_tokens: int = 64,
  checkpoint_every: int = 50,
  keep_checkpoints: int = 2,
  processes: int | None = None,
  stall_seconds: float = 3600.0,
) -> Trainer:
  """Builds the trainer.

  Args:
    shared: what the roles share.
    loss_fn: of `losses.policy_gradient`, `kl` or `components`, or one's own, its hyperparameters
      bound; what it gets beside the basic arguments, its signature says (`training.loss_inputs`).
    optimizer: of `training.optimizer`.
    row_length: tokens of a packed row; no trajectory may be longer.
    micro_rows: rows of a micro-batch.
    row_counts: numbers of rows that a step may be padded to; by default powers of two times
      `micro_rows`.
    head_chunk_size: tokens per chunk of the vocabulary head.
    router_bias_rate: step of the routers' correction bias against an uneven load of the experts
      (`training.router_bias`; DeepSeek-V3 took 0.001); 0 leaves the bias frozen.
    decoupled: whether a loss that takes `old_logprobs` gets those of the weights before the step.
      With one update a batch the ratio against them is 1, a clip of it never binds, and only losses
      with a second weight go on correcting staleness (`training.step.make_gradient_fn`).
    reference_path: Hugging Face directory of a frozen model that scores every batch, for a loss
      that reads `ref_logprobs`: the initial weights, or a teacher of any family and size with the
      policy's vocabulary. Its routers choose for themselves. It lies on the devices beside the
      policy.
    reference_dtype: dtype of the reference's parameters and computation; None: the policy's.
    mesh: sizes of the mesh axes (`data`, `fsdp`, `expert`, `context`, `tensor`), whose product is
      the number of devices; all of them on `fsdp` by default. Rows, heads, widths and experts must
      divide over it.
    rules: logical axis -> mesh axis, a table of `sharding.rules`.
    model_options: run options of the ModelConfig (dtype, remat_policy, kernels).
    weights_dtype: dtype of published weights; None keeps that of the parameters.
    keep_weights: published versions kept; at least `max_off_policy_steps` + 2 are, since the
      trainer may be that far ahead of a server that is still loading.
    weights_shard_bytes: most bytes of one file of published weights.
    weights_threads: files of published weights that are written at a time.
    canary_tokens: length of the prompt on which servers are compared with the trainer: tasks of the
      environments as they are rendered, then random ids.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    keep_checkpoints: checkpoints kept.
    processes: over which the trainer is one program. `rl_run --role all` starts so many (None: 1);
      where a cluster starts them, None or the number that it starts (docs/clusters.md).
    stall_seconds: a step, its publication or its checkpoint that takes longer ends the process with
      its stacks in the log (`distributed.watchdog`); waiting for a batch may last.

  Raises:
    NotStarted, ValueError: a parameter, or the model directory, is not fit.
  """
  for field, value in (
    ("row_length", row_length),
    ("micro_rows", micro_rows),
    ("head_chunk_size", head_chunk_size),
    ("checkpoint_every", checkpoint_every),
    ("keep_weights", keep_weights),
    ("weights_shard_bytes", weights_shard_bytes),
    ("weights_threads", weights_threads),
    ("keep_checkpoints", keep_checkpoints),
  ):
    if value < 1:
      raise NotStarted(f"trainer.{field}: expected at least 1, got {value}")
  if processes is not None:
    checks.integer("trainer.processes", processes, 1)
  checks.number("trainer.stall_seconds", stall_seconds, 0, above=True)
  if canary_tokens < 2:
    raise NotStarted(f"trainer.canary_tokens: expected at least 2, got {canary_tokens}")
  if weights_dtype not in (None, "float32", "bfloat16", "float16"):
    raise NotStarted(f"trainer.weights_dtype: expected float32 or bfloat16, got {weights_dtype!r}")
  if not callable(loss_fn) or not isinstance(optimizer, optimizers.Optimizer):
    raise NotStarted(
      "trainer.loss_fn, optimizer: expected a loss function (@name) and an optimizer (@name()), "
      f"got {loss_fn!r}, {optimizer!r}"
    )
  checks.rules("trainer.rules", rules)
  packing.choose_row_count(1, micro_rows=micro_rows, row_counts=row_counts)  # for its checks
  float32 = {"dtype": "float32", "param_dtype": "float32"}
  checked = hf.check(shared.model_path, **{**float32, **(model_options or {})})
  checks.number("trainer.router_bias_rate", router_bias_rate, 0)
  router_bias.check(checked, router_bias_rate)
  if not isinstance(decoupled, bool):
    raise NotStarted(f"trainer.decoupled: expected a bool, got {decoupled!r}")
  checked_reference = None
  if reference_path is not None:
    checked_reference = reference.check(
      reference_path,
      checked,
      shared.model_path,
      dtype=reference_dtype,
      options=model_options or {},
    )
  elif reference_dtype is not None:
    raise NotStarted(
      f"trainer.reference_dtype: expected None without reference_path, got {reference_dtype!r}"
    )
  given = {"ref_logprobs": reference_path is not None, "old_logprobs": decoupled}
  loss_inputs.check(loss_fn, [name for name, there in given.items() if there])
  if shared.renderer.vocab_size > checked.vocab_size:
    raise NotStarted(
      f"renderer: expected at most the model's {checked.vocab_size} ids, "
      f"got {shared.renderer.vocab_size}"
    )
  grid = _checked_mesh(mesh, processes or jax.process_count())
  if grid is not None:
    models = [checked, *([] if checked_reference is None else [checked_reference])]
    _check_fit(grid, models, rules, micro_rows=micro_rows, row_length=row_length)

  def main() -> None:
    processes = starting.here()
    processes.barrier("checked")  # before the first file of the run is there
    with contextlib.ExitStack() as stack:
      watching = stack.enter_context(watchdog.watched(f"trainer, {processes.name}", stall_seconds))
      run(stack, processes, watching)
      watching.enter("the end", shared.steps)

  def run(
    stack: contextlib.ExitStack, processes: starting.Processes, watching: watchdog.Watchdog
  ) -> None:
    axes: dict[str, Any] = dict(mesh) if mesh is not None else {"fsdp": jax.device_count()}
    device_mesh = mesh_lib.make_mesh(**axes)
    placement.check_rows(device_mesh, micro_rows=micro_rows, row_length=row_length)
    share = placement.own_share(device_mesh)
    logger.info(
      "%d device(s) %s of %d process(es), mesh %s, blocks of rows %s of %d",
      *(jax.device_count(), jax.devices()[0].device_kind, processes.count, axes),
      *(list(share.blocks), share.num_blocks),
    )
    # Measured on one device where the kind is unknown: outside the mesh, by who writes the metrics.
    peak_flops = flops.peak_flops() if processes.is_first else 1.0
    stack.enter_context(jax.set_mesh(device_mesh))
    config = kernel_choice.resolve(checked)
    shardings = layout.state_shardings(config, optimizer, device_mesh, rules)
    # Not kept in a variable: the state alone holds the parameters.
    state = layout.make_state(
      config,
      optimizer,
      shardings,
      params=hf.load_sharded(shared.model_path, config, shardings.params, dtype=config.param_dtype),
    )
    stop = threading.Event()
    batches = stack.enter_context(
      contextlib.closing(
        rollout_source.batches(
          shared.log_dir,
          first_step=1,
          last_step=shared.steps,
          row_length=row_length,
          micro_rows=micro_rows,
          row_counts=row_counts,
          router=shared.router,
          stop=stop,
          wait=feed.wait_for_manifest(shared, processes),
          share=share,
          process_index=processes.index,
          process_count=processes.count,
        )
      )
    )
    stack.callback(stop.set)
    checkpoints = stack.enter_context(
      checkpoint.Checkpointer(shared.checkpoint_dir, keep=keep_checkpoints)
    )
    if shared.resume and checkpoints.latest_step() is not None:
      state = checkpoints.restore(_target(state), batches).state
    logger.info("training from step %d to %d", int(state.step) + 1, shared.steps)
    publisher = stack.enter_context(
      contextlib.closing(
        Publisher(
          shared,
          config,
          mesh=device_mesh,
          rules=rules,
          canary_ids=canary.canary_ids(shared, canary_tokens),
          head_chunk_size=head_chunk_size,
          keep=max(keep_weights, shared.max_off_policy_steps + 2),
          dtype=weights_dtype,
          shard_bytes=weights_shard_bytes,
          threads=weights_threads,
          processes=processes,
        )
      )
    )
    publisher.publish(state)
    train_step = layout.compile_step(
      step.make_train_step(
        config,
        loss_fn,
        optimizer,
        micro_rows=micro_rows,
        head_chunk_size=head_chunk_size,
        router_bias_rate=router_bias_rate,
        decoupled=decoupled,
      ),
      shardings,
      device_mesh,
      rules,
    )
    score = None
    if reference_path is not None and checked_reference is not None:
      score = reference.make_scorer(
        reference_path,
        checked_reference,
        device_mesh,
        rules,
        micro_rows=micro_rows,
        head_chunk_size=head_chunk_size,
      )
    train_loop.run(
      config,
      state,
      batches,
      train_loop.Parts(
        place=lambda batch: placement.place(batch, device_mesh),
        score=score,
        train_step=train_step,
        publish=publisher.publish,
        save=lambda state: checkpoints.save(state, batches),
        write=_writer(shared, int(state.step), processes, stack),
      ),
      last_step=shared.steps,
      checkpoint_every=checkpoint_every,
      share=share,
      processes=processes,
      watching=watching,
      peak_flops=peak_flops,
    )

  return Trainer(main, processes)


def _checked_mesh(mesh: Mapping[str, int] | None, processes: int) -> AbstractMesh | None:
  """The mesh without its devices; None where those of the processes to come are not known here."""
  known = processes == jax.process_count()  # else `all` will start them
  if mesh is None:
    mesh = {"fsdp": jax.device_count()}
    if not known:
      return None
  if not isinstance(mesh, Mapping) or set(mesh) - set(mesh_lib.AXES):
    given = sorted(map(str, mesh)) if isinstance(mesh, Mapping) else mesh
    raise NotStarted(f"trainer.mesh: expected sizes of the axes {mesh_lib.AXES}, got {given!r}")
  for axis, size in mesh.items():
    checks.integer(f"trainer.mesh[{axis!r}]", size, 1)
  count = math.prod(mesh.values())
  if known and count != jax.device_count():
    raise NotStarted(
      f"trainer.mesh: expected sizes whose product is the number of devices, {jax.device_count()}, "
      f"got {dict(mesh)}"
    )
  if count % processes:
    raise NotStarted(
      f"trainer.mesh: expected as many devices for each of {processes} processes, got {dict(mesh)}"
    )
  return AbstractMesh(tuple(mesh.get(axis, 1) for axis in mesh_lib.AXES), mesh_lib.AXES)


def _check_fit(
  grid: Any,
  models: Sequence[ModelConfig],
  rules: Rules,
  *,
  micro_rows: int,
  row_length: int,
) -> None:
  """Refuses rows and models that do not divide over the mesh, of which only the shape is asked."""
  try:
    placement.check_rows(grid, micro_rows=micro_rows, row_length=row_length)
  except ValueError as error:
    raise NotStarted(f"trainer.{error}") from error
  for config in models:
    try:
      layout.param_shardings(config, grid, rules)
      parallel.divide(transformer.abstract(config)[1], grid.shape, rules)
    except ValueError as error:
      told = [line.strip() for line in str(error).splitlines()]
      more = f" (and {len(told) - 2} more tensors)" if len(told) > 2 else ""
      raise NotStarted(f"trainer.mesh, rules: {' '.join(told[:2])}{more}") from error


def _target(state: states.TrainState) -> states.TrainState:
  return jax.tree.map(
    lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
  )


def _writer(
  shared: Shared, step: int, processes: starting.Processes, stack: contextlib.ExitStack
) -> Callable[[int, Mapping[str, Any]], None]:
  """Writes the metrics of steps after `step`; of several processes the first does."""
  if not processes.is_first:
    return lambda number, row: None
  writer = stack.enter_context(telemetry.MetricsWriter(shared.run_dir, "trainer"))
  if shared.resume:
    writer.truncate_after(step)
  return writer.write
