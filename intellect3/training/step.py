"""The train step: (state, batch) -> (state, metrics), pure.

A batch's rows are taken in micro-batches of `micro_rows` rows, one after the other; gradients and
metrics are sums over tokens divided by the global denominator `batch.loss_tokens`, so they add up
and depend neither on the micro-batching nor on the packing nor on the mesh (contract 5). On a mesh
every device runs the loop on its shards (`shards`), and replicas' gradients are summed after it.
Reinforcement learning and supervised fine-tuning differ in the loss function alone.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from intellect3.models.config import ModelConfig
from intellect3.models.parallel import Parallel
from intellect3.sharding import collectives
from intellect3.training import loss_inputs, micro_batches, router_bias, scoring, shards
from intellect3.training import optimizer as optimizers
from intellect3.training.state import TrainState

Metrics = dict[str, jax.Array]


class PackedBatch(Protocol):
  """The fields of `pipeline.packing.Batch` that a step reads; `[rows, length, ..]` but the counts
  `loss_tokens`, `loss_sequences` and `component_denominators`; the fields after the counts are None
  where nothing replays experts, weights tokens or refers to another model."""

  tokens: Any
  loss_mask: Any
  inference_logprobs: Any
  advantages: Any
  temperature: Any
  segment_ids: Any
  positions: Any
  loss_tokens: Any
  loss_sequences: Any
  routed_experts: Any
  experts_recorded: Any
  rl_weights: Any
  ce_weights: Any
  ref_kl_weights: Any
  component_denominators: Any
  ref_logprobs: Any


class Loss(Protocol):
  """A loss over `[B, T]` arrays: sums over masked tokens divided by `denominator`.

  One that takes more keywords, of `loss_inputs.NAMES`, gets those too.
  """

  def __call__(
    self,
    logprobs: jax.Array,
    inference_logprobs: jax.Array,
    advantages: jax.Array,
    loss_mask: jax.Array,
    *,
    segment_ids: jax.Array | None,
    denominator: jax.Array | None,
  ) -> tuple[jax.Array, Metrics]:
    """Returns the loss and its metrics."""
    ...


_ROW_FIELDS = (
  "tokens",
  "loss_mask",
  "inference_logprobs",
  "advantages",
  "temperature",
  "segment_ids",
  "positions",
)
_REPLAY_FIELDS = ("routed_experts", "experts_recorded")
_LOSS_FIELDS = ("ref_logprobs", *loss_inputs.WEIGHTS)


def supervised(loss_fn: Callable[..., tuple[jax.Array, Metrics]]) -> Loss:
  """Makes a supervised loss one of this step's losses.

  Args:
    loss_fn: `(logprobs, loss_mask, *, denominator) -> (loss, metrics)`; it gets `segment_ids` and
      `num_sequences` too where it takes them.
  """
  takes = inspect.signature(loss_fn).parameters

  def loss(
    logprobs: jax.Array,
    inference_logprobs: jax.Array,
    advantages: jax.Array,
    loss_mask: jax.Array,
    *,
    segment_ids: jax.Array | None,
    denominator: jax.Array | None,
    num_sequences: jax.Array | None = None,
  ) -> tuple[jax.Array, Metrics]:
    del inference_logprobs, advantages
    more = {"segment_ids": segment_ids, "num_sequences": num_sequences}
    chosen = {name: value for name, value in more.items() if name in takes}
    return loss_fn(logprobs, loss_mask, denominator=denominator, **chosen)

  loss.__name__ = getattr(loss_fn, "__name__", repr(loss_fn))
  return loss


def make_train_step(
  model_config: ModelConfig,
  loss_fn: Loss,
  optimizer: optimizers.Optimizer,
  *,
  micro_rows: int,
  head_chunk_size: int,
  router_bias_rate: float = 0.0,
  decoupled: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """Makes the train step.

  Args:
    model_config: the model.
    loss_fn: see `Loss`; `losses.policy_gradient`'s functions are, `supervised` makes one.
    optimizer: see `training.optimizer`.
    micro_rows: rows per micro-batch; the batch's rows must be a multiple of it.
    head_chunk_size: tokens per chunk of the vocabulary head.
    router_bias_rate: of `router_bias.update`, after the optimizer's; 0 leaves the bias frozen.
    decoupled: see `make_gradient_fn`.

  Returns:
    (state, batch) -> (state, metrics), to be jitted by the caller with the state donated. Metrics
    are float32 scalars: `loss`, the loss function's own, `entropy` (mean over loss-masked tokens,
    nats), `grad_norm` (before clipping), `learning_rate`, and in a mixture of experts
    `max_violation` (over the layers' max(load) / mean(load) - 1) beside the arrays
    `max_violation_L` and `expert_load_LE` (tokens), and `router_agreement` where the batch replays
    routed experts (share of the recorded tokens and layers whose own choice is the same set).

  Raises:
    ValueError: a bias rate that is not fit for the model; rows that are no multiple of
      `micro_rows`, experts to replay in a model without, or per-token weights or reference logprobs
      that the loss does not read, when traced.
  """
  router_bias.check(model_config, router_bias_rate)
  gradients = make_gradient_fn(
    model_config,
    loss_fn,
    micro_rows=micro_rows,
    head_chunk_size=head_chunk_size,
    decoupled=decoupled,
  )

  def train_step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
    grads, metrics = gradients(state.params, batch)
    metrics["grad_norm"] = optax.tree.norm(optimizers.without_frozen(grads))
    metrics["learning_rate"] = jnp.asarray(optimizer.learning_rate(state.step), jnp.float32)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if router_bias_rate:
      params = router_bias.update(params, metrics["expert_load_LE"], router_bias_rate)
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def make_gradient_fn(
  model_config: ModelConfig,
  loss_fn: Loss,
  *,
  micro_rows: int,
  head_chunk_size: int,
  decoupled: bool = False,
) -> Callable[[Any, Any], tuple[Any, Metrics]]:
  """Makes (params, batch) -> (gradients, metrics), the first half of a train step.

  Args:
    model_config: the model.
    loss_fn: see `Loss`.
    micro_rows: rows per micro-batch.
    head_chunk_size: tokens per chunk of the vocabulary head.
    decoupled: whether the loss gets `old_logprobs`, those of the parameters that the step starts
      from. With one update a batch they are the logprobs themselves, as constants: the ratio
      against them is 1 and never leaves its bounds. In `clipped_loss` and
      `truncated_importance_loss` the weight of the way from the policy that sampled remains;
      `cispo_loss` and `sequence_ratio_loss` have no other ratio, so nothing corrects staleness.
      Without, the old policy is the one that sampled.

  Returns:
    The function. Gradients are those of the loss over the whole batch, in the parameters' dtype;
    the optimizer drops those of frozen parameters.
  """
  if micro_rows < 1:
    raise ValueError(f"micro_rows: expected at least 1, got {micro_rows}")
  takes = loss_inputs.declared(loss_fn)

  def micro_loss(
    params: Any, rows: dict[str, jax.Array], counts: dict[str, Any], parallel: Parallel
  ) -> tuple[jax.Array, Metrics]:
    scores = scoring.score(
      model_config,
      params,
      rows["tokens"],
      rows["positions"],
      rows["segment_ids"],
      rows["temperature"],
      head_chunk_size=head_chunk_size,
      routed_experts=rows.get("routed_experts"),
      experts_recorded=rows.get("experts_recorded"),
      parallel=parallel,
    )
    mask = rows["loss_mask"] & scores.scored
    denominator = counts["denominator"]
    available = {name: rows.get(name) for name in _LOSS_FIELDS} | counts
    if decoupled:
      available["old_logprobs"] = jax.lax.stop_gradient(scores.logprobs)
    loss, metrics = loss_fn(
      scores.logprobs,
      rows["inference_logprobs"],
      rows["advantages"],
      mask,
      segment_ids=rows["segment_ids"],
      denominator=denominator,
      **loss_inputs.select(takes, available),
    )
    sums = dict(metrics)
    sums["loss"] = loss
    sums["entropy"] = jnp.sum(jnp.where(mask, scores.entropy, 0.0)) / denominator
    # Devices with the same rows have the same sums: each gives its share.
    copies = parallel.parts(parallel.copies)
    loss, sums = loss / copies, {name: value / copies for name, value in sums.items()}
    if scores.expert_load_LE.size:
      sums["expert_load_LE"] = scores.expert_load_LE
      sums["expert_extra_rounds"] = scores.extra_rounds
    if "routed_experts" in rows:
      sums["router_agreement"] = scores.agreed
    return loss, jax.lax.stop_gradient(sums)

  def gradient_fn(params: Any, batch: PackedBatch) -> tuple[Any, Metrics]:
    replayed = batch.routed_experts is not None
    if replayed and not model_config.num_moe_layers:
      raise ValueError("routed_experts: expected None for a model without experts, got an array")
    given = [name for name in _LOSS_FIELDS if getattr(batch, name) is not None]
    if given:
      loss_inputs.check(loss_fn, given)
    fields = (*_ROW_FIELDS, *(_REPLAY_FIELDS if replayed else ()), *given)
    rows = {name: getattr(batch, name) for name in fields}
    division = shards.division(model_config)
    parts = division.parts(division.rows)
    micro_batches.check(batch.tokens.shape[0], micro_rows, parts)

    def local(params: Any, rows: dict[str, jax.Array], counts: Any) -> tuple[Any, Metrics]:
      gradient = jax.grad(functools.partial(micro_loss, parallel=division), has_aux=True)
      micro = {n: micro_batches.split(array, micro_rows // parts) for n, array in rows.items()}
      first = {name: array[0] for name, array in micro.items()}
      if micro["tokens"].shape[0] == 1:  # nothing to add up: no second tree of gradients
        grads, sums = gradient(params, first, counts)
      else:
        grads, sums = _sum_over(lambda one: gradient(params, one, counts), first, micro)
      sums = {name: collectives.total(value, division.axes) for name, value in sums.items()}
      return shards.sum_gradients(grads, model_config, division), sums

    grads, metrics = shards.run(
      local,
      model_config,
      division,
      params,
      rows,
      loss_inputs.counts(batch),
      out_specs=lambda params, _: (params, PartitionSpec()),
    )
    if "expert_load_LE" in metrics:
      load_LE = metrics["expert_load_LE"]
      mean_L = jnp.maximum(load_LE.mean(axis=1), 1e-9)
      metrics["max_violation_L"] = load_LE.max(axis=1) / mean_L - 1.0
      metrics["max_violation"] = metrics["max_violation_L"].max()
    if replayed:
      pairs = jnp.sum(batch.experts_recorded, dtype=jnp.float32) * model_config.num_moe_layers
      metrics["router_agreement"] = metrics["router_agreement"] / jnp.maximum(pairs, 1.0)
    return grads, metrics

  return gradient_fn


def _sum_over(function: Callable[[Any], Any], first: Any, rows: Any) -> Any:
  """Sums a function's trees over the leading axis of `rows`, one after the other."""
  zeros = jax.tree.map(
    lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, first)
  )
  add = lambda carry, row: (jax.tree.map(jnp.add, carry, function(row)), None)  # noqa: E731
  return jax.lax.scan(add, zeros, rows)[0]
