"""The trainer's logprobs of packed tokens: the model's forward pass and its vocabulary head."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from intellect3.kernels.attention import context
from intellect3.losses.logprobs import chunked_logprobs
from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.models.parallel import ONE_DEVICE, Parallel
from intellect3.sharding import collectives
from intellect3.training import micro_batches, shards


class Scores(NamedTuple):
  """What the model says of a packed `[B, T]` batch.

  Attributes:
    logprobs: float32[B, T]; `logprobs[t]` scores `tokens[t]`; 0.0 where `scored` is False.
    entropy: float32[B, T], of the distribution that `tokens[t]` was scored under, in nats; 0.0
      where `scored` is False.
    top1: int32[B, T], the token that the model thought most likely in the place of `tokens[t]`; -1
      where `scored` is False.
    scored: bool[B, T], False in padding and on the first token of each segment, which nothing
      predicts.
    expert_load_LE: float32[moe layers, experts], tokens of any segment that each expert computed,
      prompts included and padding not; no layers in a dense model.
    agreed: float32[], the recorded (token, layer) pairs whose own choice of experts is the replayed
      one, as sets; 0 without replay.
    extra_rounds: float32[], rounds of the experts' exchange beyond an even load's, over all layers.
  """

  logprobs: jax.Array
  entropy: jax.Array
  top1: jax.Array
  scored: jax.Array
  expert_load_LE: jax.Array
  agreed: jax.Array
  extra_rounds: jax.Array


def score(
  config: ModelConfig,
  params: Any,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  temperature: jax.Array,
  *,
  head_chunk_size: int,
  routed_experts: jax.Array | None = None,
  experts_recorded: jax.Array | None = None,
  parallel: Parallel = ONE_DEVICE,
) -> Scores:
  """Scores every token of a packed batch under the model.

  The hidden state at t - 1 predicts token t, so targets and temperatures are shifted by one
  against the hidden states, and a row's last hidden state predicts nothing.

  Args:
    config: the model.
    params: its parameters.
    tokens: int32[B, T].
    positions: int32[B, T].
    segment_ids: int32[B, T], 0 in padding.
    temperature: float32[B, T], the temperature that each token was sampled with.
    head_chunk_size: tokens per chunk of the vocabulary head.
    routed_experts: unsigned[B, T, moe layers, A], experts to take instead of the routers' choice
      (their weights are the model's own); None: the routers choose.
    experts_recorded: bool[B, T], the tokens for which they are taken; the others choose themselves.
    parallel: how the work is divided (`training.shards`): over devices with other rows, which do
      not matter here; over the tokens of the rows; and over devices that have the same tokens, each
      of which applies the vocabulary head to a part of them. The rows are whole on all devices.

  Returns:
    The scores of whole rows, differentiable in the parameters. What is counted, `expert_load_LE`,
    `agreed` and `extra_rounds`, is this device's share, to be summed over `parallel.axes`.
  """
  outer = {name: leaf for name, leaf in params.items() if not name.endswith("_layers")}
  params = {**params, **parallel.gather(outer, "", config.dtype)}
  part: Any = lambda x_BT: x_BT  # noqa: E731
  whole = part
  if parallel.length:
    part = functools.partial(context.local_part, axis_name=parallel.length)
    whole = functools.partial(context.whole, axis_name=parallel.length)
  model = transformer.Transformer(config, parallel)
  replayed_LBTA = None
  if routed_experts is not None and experts_recorded is not None:
    experts_recorded = part(experts_recorded)
    experts_LBTA = jnp.moveaxis(part(routed_experts), 2, 0).astype(jnp.int32)
    replayed_LBTA = jnp.where(experts_recorded[None, :, :, None], experts_LBTA, -1)
  output: Any = model.apply(
    {"params": params}, tokens, positions, segment_ids, routed_experts_LBTA=replayed_LBTA
  )
  hidden_BTD = output.hidden_BTD
  copies = tuple(axis for axis in parallel.copies if axis != parallel.length)
  count, tokens_here = parallel.parts(copies), hidden_BTD.shape[0] * hidden_BTD.shape[1]

  def mine(x_BT: jax.Array) -> jax.Array:
    return collectives.share(x_BT.reshape(tokens_here, *x_BT.shape[2:]), copies, count)

  def back(x_N: jax.Array) -> jax.Array:
    return whole(collectives.join(x_N, copies, tokens_here).reshape(hidden_BTD.shape[:2]))

  # The last column has no target; any id does, its result is cut off.
  told = chunked_logprobs(
    mine(hidden_BTD),
    transformer.head(params, config),
    mine(part(jnp.roll(tokens, -1, axis=1))),
    temperature_N=mine(part(jnp.roll(temperature, -1, axis=1))),
    chunk_size=head_chunk_size,
  )
  same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
  scored = jnp.pad(same, ((0, 0), (1, 0)))

  def told_of(values_N: jax.Array, otherwise: float) -> jax.Array:
    return jnp.where(scored, jnp.roll(back(values_N), 1, axis=1), otherwise)

  return Scores(
    logprobs=told_of(told.logprobs_N, 0.0),
    entropy=told_of(told.entropy_N, 0.0),
    top1=told_of(told.top1_N, -1),
    scored=scored,
    expert_load_LE=output.router.load_LE / count,
    agreed=_agreed(output.router, experts_recorded) / count,
    extra_rounds=jnp.sum(output.router.extra_rounds_L) / parallel.parts(parallel.axes),
  )


def _agreed(router: Any, recorded: jax.Array | None) -> jax.Array:
  if recorded is None:
    return jnp.zeros((), jnp.float32)
  return jnp.sum(router.agreed_LBT & recorded, dtype=jnp.float32)


def make_logprob_fn(
  config: ModelConfig, *, head_chunk_size: int
) -> Callable[[Any, jax.Array], jax.Array]:
  """Makes the function that scores one prompt with the trainer's forward pass (the canary).

  Args:
    config: the model.
    head_chunk_size: tokens per chunk of the vocabulary head.

  Returns:
    (params, ids int32[T]) -> logprobs float32[T] at temperature 1, 0.0 for the first id. Pure; to
    be jitted by the caller (`layout.compile_canary`).
  """

  def logprob_fn(params: Any, ids: jax.Array) -> jax.Array:
    division = shards.division(config)

    def logprobs(params: Any, _: Any, tokens: jax.Array) -> jax.Array:
      positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
      return score(
        config,
        params,
        tokens,
        positions,
        (positions < len(ids)).astype(jnp.int32),
        jnp.ones(tokens.shape, jnp.float32),
        head_chunk_size=head_chunk_size,
        parallel=division,
      ).logprobs[0, : len(ids)]

    # Every device scores the same prompt, filled up to what a row can be divided into.
    padding = -len(ids) % (2 * division.parts(division.length)) if division.length else 0
    tokens = jnp.pad(jnp.asarray(ids, jnp.int32), (0, padding))[None]
    specs = lambda params, rows: PartitionSpec()  # noqa: E731
    return shards.run(logprobs, config, division, params, (), tokens, out_specs=specs)

  return logprob_fn


def make_batch_logprob_fn(
  config: ModelConfig, *, micro_rows: int, head_chunk_size: int
) -> Callable[[Any, Any], jax.Array]:
  """Makes the function that scores a packed batch and does nothing else (the reference model).

  As the train step's forward pass, row for row: at the temperature of each token, in micro-batches
  one after the other. No gradients, no optimizer state; routers choose for themselves.

  Args:
    config: the model.
    micro_rows: rows per micro-batch; the batch's rows must be a multiple of it.
    head_chunk_size: tokens per chunk of the vocabulary head.

  Returns:
    (params, batch) -> logprobs float32[rows, length], 0.0 in padding and on first tokens. Of the
    batch it reads `tokens`, `positions`, `segment_ids` and `temperature`. Pure; to be jitted by the
    caller (`layout.compile_scoring`).

  Raises:
    ValueError: `micro_rows` below 1; rows that are no multiple of it, when traced.
  """
  if micro_rows < 1:
    raise ValueError(f"micro_rows: expected at least 1, got {micro_rows}")

  def batch_logprob_fn(params: Any, batch: Any) -> jax.Array:
    division = shards.division(config)
    micro_batches.check(batch.tokens.shape[0], micro_rows, division.parts(division.rows))
    here = micro_rows // division.parts(division.rows)

    def local(params: Any, rows: tuple[jax.Array, ...], _: Any) -> jax.Array:
      def logprobs(micro: tuple[jax.Array, ...]) -> jax.Array:
        return score(
          config, params, *micro, head_chunk_size=head_chunk_size, parallel=division
        ).logprobs

      micro = tuple(micro_batches.split(array, here) for array in rows)
      return micro_batches.merge(jax.lax.map(logprobs, micro))

    arrays = (batch.tokens, batch.positions, batch.segment_ids, batch.temperature)
    specs = lambda params, rows: rows  # noqa: E731
    return shards.run(local, config, division, params, arrays, (), out_specs=specs)

  return batch_logprob_fn
