"""The trainer role: batches of the RolloutLog -> train steps -> published weights, checkpoints.

A pure function of (initial weights, configuration, RolloutLog): it never sees a server or an
environment. It reads step n's batch, makes weights v(n), publishes them and says so.
"""

import contextlib
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from intellect3 import rollout_log, telemetry, types
from intellect3.models import hf, kernel_choice
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing, placement, rollout_source
from intellect3.rl import checks, reference
from intellect3.rl.publisher import Publisher
from intellect3.rl.roles import Main, NotStarted, Shared
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
) -> Main:
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
    mesh: sizes of the mesh axes (`data`, `fsdp`, `expert`, `context`, `tensor`); all devices on
      `fsdp` by default.
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
  if canary_tokens < 2:
    raise NotStarted(f"trainer.canary_tokens: expected at least 2, got {canary_tokens}")
  if weights_dtype not in (None, "float32", "bfloat16", "float16"):
    raise NotStarted(f"trainer.weights_dtype: expected float32 or bfloat16, got {weights_dtype!r}")
  if not callable(loss_fn) or not isinstance(optimizer, optimizers.Optimizer):
    raise NotStarted(
      "trainer.loss_fn, optimizer: expected a loss function (@name) and an optimizer (@name()), "
      f"got {loss_fn!r}, {optimizer!r}"
    )
  unknown = set(mesh or {}) - set(mesh_lib.AXES)
  if unknown:
    raise NotStarted(f"trainer.mesh: expected axes of {mesh_lib.AXES}, got {sorted(unknown)}")
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

  def main() -> None:
    axes: dict[str, Any] = dict(mesh) if mesh is not None else {"fsdp": jax.device_count()}
    device_mesh = mesh_lib.make_mesh(**axes)
    placement.check_rows(device_mesh, micro_rows=micro_rows, row_length=row_length)
    logger.info("%d device(s) %s, mesh %s", jax.device_count(), jax.devices()[0].device_kind, axes)
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.set_mesh(device_mesh))
      config = kernel_choice.resolve(checked)
      shardings = layout.state_shardings(config, optimizer, device_mesh, rules)
      # Not kept in a variable: the state alone holds the parameters.
      state = layout.make_state(
        config,
        optimizer,
        shardings,
        params=hf.load_sharded(
          shared.model_path, config, shardings.params, dtype=config.param_dtype
        ),
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
            wait=_wait_for_manifest(shared),
          )
        )
      )
      stack.callback(stop.set)
      checkpoints = stack.enter_context(
        checkpoint.Checkpointer(shared.checkpoint_dir, keep=keep_checkpoints)
      )
      writer = stack.enter_context(telemetry.MetricsWriter(shared.run_dir, "trainer"))
      if shared.resume and checkpoints.latest_step() is not None:
        state = checkpoints.restore(_target(state), batches).state
      logger.info("training from step %d to %d", int(state.step) + 1, shared.steps)
      if shared.resume:
        writer.truncate_after(int(state.step))
      publisher = stack.enter_context(
        contextlib.closing(
          Publisher(
            shared,
            config,
            canary_ids=canary_ids(shared, canary_tokens),
            head_chunk_size=head_chunk_size,
            keep=max(keep_weights, shared.max_off_policy_steps + 2),
            dtype=weights_dtype,
            shard_bytes=weights_shard_bytes,
            threads=weights_threads,
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
      _loop(
        shared,
        config,
        state,
        batches,
        train_step=train_step,
        score=score,
        publisher=publisher,
        place=lambda batch: placement.place(batch, device_mesh),
        save=checkpoints.save,
        checkpoint_every=checkpoint_every,
        write=writer.write,
      )

  return main


def _loop(
  shared: Shared,
  config: ModelConfig,
  state: states.TrainState,
  batches: Any,
  *,
  train_step: Callable[[states.TrainState, Any], tuple[states.TrainState, step.Metrics]],
  score: reference.Scorer | None,
  publisher: Publisher,
  place: Callable[[Any], Any],
  save: Callable[[states.TrainState, Any], None],
  checkpoint_every: int,
  write: Callable[[int, Mapping[str, Any]], None],
) -> None:
  peak = flops.peak_flops()
  ended = time.perf_counter()
  for batch in batches:
    arrived = time.perf_counter()
    number = int(batch.step)
    placed, reference_seconds = place(batch), 0.0
    if score is not None:
      placed, reference_seconds = score(placed)
    state, device_metrics = train_step(state, placed)
    metrics = jax.device_get(device_metrics)  # waits for the step
    stepped = time.perf_counter()
    publishing = publisher.publish(state)
    published = time.perf_counter()
    if number % checkpoint_every == 0 or number == shared.steps:
      save(state, batches)
    done = time.perf_counter()
    write(
      number,
      {
        **metrics,
        **effective_sample_share(metrics),
        **_batch_metrics(batch),
        "wait_seconds": arrived - ended,
        **({} if score is None else {"reference_seconds": reference_seconds}),
        "step_seconds": stepped - arrived - reference_seconds,
        "publish_seconds": published - stepped,
        **publishing,
        "checkpoint_seconds": done - published,
        "loop_seconds": done - ended,
        "trained_tokens_per_second": float(batch.loss_tokens) / (done - ended),
        "mfu": flops.mfu(
          flops.train_flops(
            config,
            tokens=int((batch.segment_ids > 0).sum()),
            attended_pairs=int((batch.positions + 1)[batch.segment_ids > 0].sum()),
          ),
          done - ended,
          peak,
          jax.device_count(),
        ),
      },
    )
    ended = done


def _batch_metrics(batch: Any) -> dict[str, float]:
  """What the batch itself says: its size, its padding, the staleness of its trained tokens."""
  trained = batch.loss_mask
  staleness = (int(batch.step) - 1 - batch.policy_versions)[trained]
  tokens = int((batch.segment_ids > 0).sum())
  return {
    "rows": float(batch.tokens.shape[0]),
    "tokens": float(tokens),
    "loss_tokens": float(batch.loss_tokens),
    "loss_sequences": float(batch.loss_sequences),
    "padding_share": 1.0 - tokens / batch.tokens.size,
    "token_staleness_mean": float(staleness.mean()) if staleness.size else 0.0,
    "token_staleness_max": float(staleness.max(initial=0)),
  }


def effective_sample_share(metrics: Mapping[str, Any]) -> dict[str, float]:
  """`(sum r)^2 / (N sum r^2)` of the importance ratios, 1 / N to 1, where the loss gives both sums.

  Kish's effective sample size over the loss-masked tokens of the whole batch, as a share.
  """
  mean, square = metrics.get("importance_ratio"), metrics.get("importance_ratio_squared")
  if mean is None or not square:
    return {}
  return {"effective_sample_share": float(mean) ** 2 / float(square)}


def _target(state: states.TrainState) -> states.TrainState:
  return jax.tree.map(
    lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
  )


def canary_ids(shared: Shared, length: int) -> np.ndarray:
  """int32[length]: half of it tasks as the policy sees them, half random ids of the vocabulary.

  Real prompts reach the experts and embeddings that the run depends on; random ids reach others.
  """
  ids: list[int] = []
  index = 0
  while len(ids) < length // 2:
    for environment in shared.environments.values():
      ids += shared.renderer.render(environment.task("train", index).prompt)
    index += 1
  rng = np.random.default_rng(shared.seed)
  random_ids = rng.integers(0, shared.renderer.vocab_size, length)
  return np.concatenate([ids[: length // 2], random_ids])[:length].astype(np.int32)


def _wait_for_manifest(shared: Shared) -> rollout_source.Wait:
  """Waits for a batch: asks the orchestrator, and looks at the directory whatever it says."""

  def wait(number: int, stop: Any) -> types.Manifest | None:
    while not stop.is_set():
      manifest = rollout_log.read_manifest(shared.log_dir, number)
      if manifest is not None:
        return manifest
      try:
        urllib.request.urlopen(f"{shared.orchestrator_url}/batches/{number}", timeout=10).close()
        stop.wait(0.01)  # a shared file system may show the rename later than the message came
      except (urllib.error.URLError, OSError):
        stop.wait(0.1)
    return None

  return wait
