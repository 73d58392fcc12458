"""The two compiled functions of the engine, prefill and decode, over the trainer's own model.

Pure: weights, cache and the counts of sampled ids go in, cache and counts come out (donated by the
caller, hence updated in place). Sampling happens inside; only ids, logprobs and what was asked for
besides come back to the host.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intellect3.inference.engine import sampling as sampler
from intellect3.inference.engine.steps import Decode, Decoded, Prefill, Prefilled, Top
from intellect3.losses.logprobs import chunked_logprobs
from intellect3.models import cache as kv_cache
from intellect3.models import transformer
from intellect3.models.config import ModelConfig

SCORE_CHUNK_SIZE = 512

Params = Any


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is compiled in: a change of any of these compiles anew.

  Attributes:
    steps: N, most tokens per slot of a decode call.
    max_top: M, most alternatives per token; 0 leaves them out.
    experts: whether the experts of each token come back.
  """

  steps: int
  max_top: int
  experts: bool


class State(NamedTuple):
  """What stays on the device between calls.

  Attributes:
    cache: the pages.
    counts_SV: int32, how often each slot's sequence has sampled each id; kept only where penalties
      are asked for.
  """

  cache: kv_cache.KVCache
  counts_SV: jax.Array


def decode(
  config: ModelConfig, shape: Shape, params: Params, state: State, call: Decode
) -> tuple[State, Decoded]:
  """Up to `call.steps` tokens for every slot, one after the other, until too few go on.

  The loop's body is one program whatever the number of steps: a token's bits do not depend on
  where in a call it is sampled.
  """
  slots = call.tokens_S.shape[0]
  head_DV = transformer.head(params, config)
  rows_S = jnp.arange(slots)
  going = lambda remaining_S: jnp.sum(remaining_S > 0)  # noqa: E731
  most = (shape.steps, slots)
  out = Decoded(
    tokens_NS=jnp.zeros(most, jnp.int32),
    logprobs_NS=jnp.zeros(most, jnp.float32),
    lengths_S=jnp.zeros(slots, jnp.int32),
    top=Top(jnp.zeros((*most, shape.max_top)), jnp.zeros((*most, shape.max_top), jnp.int32))
    if shape.max_top
    else None,
    experts_NLSA=jnp.zeros(
      (
        shape.steps,
        config.num_moe_layers,
        slots,
        config.num_experts_per_token,
      ),
      jnp.int32,
    )
    if shape.experts
    else None,
  )

  def more(carry):
    step, _, _, remaining_S, _ = carry
    return (step < call.steps) & (going(remaining_S) >= jnp.maximum(call.quorum, 1))

  def body(carry):
    step, state, tokens_S, remaining_S, out = carry
    valid_S = remaining_S > 0
    result: Any = transformer.Transformer(config).apply(
      {"params": params},
      tokens_S[:, None],
      (call.positions_S + out.lengths_S)[:, None],
      valid_S[:, None].astype(jnp.int32),
      cache=state.cache,
      tables_BW=call.tables_SW,
    )
    now = call.sampling._replace(positions_R=call.sampling.positions_R + out.lengths_S)
    logits_SV = _logits(result.hidden_BTD[:, 0], head_DV)
    ids_S, logprobs_S, all_SV = sampler.sample(logits_SV, state.counts_SV, now)
    counts_SV = _count(state.counts_SV, rows_S, ids_S, valid_S, now.penalizes)
    out = out._replace(
      tokens_NS=out.tokens_NS.at[step].set(ids_S),
      logprobs_NS=out.logprobs_NS.at[step].set(logprobs_S),
      lengths_S=out.lengths_S + valid_S,
    )
    if out.top is not None:
      top = sampler.top(all_SV, shape.max_top, now.top)
      out = out._replace(top=jax.tree.map(lambda all, x: all.at[step].set(x), out.top, top))
    if out.experts_NLSA is not None:
      experts_LSA = result.router.experts_LBTA[:, :, 0]
      out = out._replace(experts_NLSA=out.experts_NLSA.at[step].set(experts_LSA))
    ended_S = call.ends_S & jnp.any(now.stops_RJ == ids_S[:, None], axis=1)
    remaining_S = jnp.where(valid_S & ~ended_S, remaining_S - 1, 0)
    return step + 1, State(result.cache, counts_SV), ids_S, remaining_S, out

  start = (jnp.int32(0), state, call.tokens_S, call.remaining_S, out)
  _, state, _, _, out = jax.lax.while_loop(more, body, start)
  return state, out


def prefill(
  config: ModelConfig, shape: Shape, params: Params, state: State, call: Prefill
) -> tuple[State, Prefilled]:
  """A chunk of prompt for every row, and a sample after each chunk's last token."""
  result: Any = transformer.Transformer(config).apply(
    {"params": params},
    call.tokens_RT,
    call.positions_RT,
    call.valid_RT.astype(jnp.int32),
    cache=state.cache,
    tables_BW=call.tables_RW,
  )
  head_DV = transformer.head(params, config)
  hidden_RTD = result.hidden_BTD
  last_RD = jnp.take_along_axis(hidden_RTD, call.last_R[:, None, None], axis=1)[:, 0]
  counts_RV = jax.lax.cond(
    call.sampling.penalizes,
    lambda counts_SV: counts_SV[call.slots_R],
    lambda counts_SV: jnp.zeros((call.slots_R.size, counts_SV.shape[1]), jnp.int32),
    state.counts_SV,
  )
  ids_R, logprobs_R, all_RV = sampler.sample(_logits(last_RD, head_DV), counts_RV, call.sampling)
  counts_SV = _count(state.counts_SV, call.slots_R, ids_R, call.samples_R, call.sampling.penalizes)
  top = sampler.top(all_RV, shape.max_top, call.sampling.top) if shape.max_top else None
  input_logprobs_RT = jax.lax.cond(
    call.score,
    _scores,
    lambda hidden_RTD, head_DV, targets_RT: jnp.zeros(targets_RT.shape, jnp.float32),
    hidden_RTD,
    head_DV,
    call.targets_RT,
  )
  input_top = None
  if shape.max_top:
    wanted = call.score & call.sampling.top
    input_top = _input_top(hidden_RTD, head_DV, shape.max_top, wanted)
  return State(result.cache, counts_SV), Prefilled(
    tokens_R=ids_R,
    logprobs_R=logprobs_R,
    top=top,
    input_logprobs_RT=input_logprobs_RT,
    input_top=input_top,
    experts_LRTA=result.router.experts_LBTA if shape.experts else None,
  )


def reset_counts(state: State, slot: jax.Array, counts_V: jax.Array) -> State:
  """A new sequence in a slot, with what it has sampled before."""
  return state._replace(counts_SV=state.counts_SV.at[slot].set(counts_V))


def _logits(hidden_RD: jax.Array, head_DV: jax.Array) -> jax.Array:
  return jnp.dot(hidden_RD, head_DV.astype(hidden_RD.dtype), preferred_element_type=jnp.float32)


def _count(
  counts_SV: jax.Array, slots_R: jax.Array, ids_R: jax.Array, valid_R: jax.Array, wanted: jax.Array
) -> jax.Array:
  """Counts the sampled ids of valid rows, where anybody wants it."""
  ids_R = jnp.where(valid_R, ids_R, counts_SV.shape[1])
  add = lambda counts_SV: counts_SV.at[slots_R, ids_R].add(1, mode="drop")  # noqa: E731
  return jax.lax.cond(wanted, add, lambda counts_SV: counts_SV, counts_SV)


def _scores(hidden_RTD: jax.Array, head_DV: jax.Array, targets_RT: jax.Array) -> jax.Array:
  """The targets' logprobs at temperature 1."""
  scores = chunked_logprobs(
    hidden_RTD.reshape(-1, hidden_RTD.shape[-1]),
    head_DV,
    targets_RT.reshape(-1),
    temperature_N=jnp.ones(targets_RT.size, jnp.float32),
    chunk_size=SCORE_CHUNK_SIZE,
  )
  return scores.logprobs_N.reshape(targets_RT.shape)


def _input_top(hidden_RTD: jax.Array, head_DV: jax.Array, count: int, wanted: jax.Array) -> Top:
  """The alternatives at every position, a row at a time: logits of all tokens never exist."""

  def row(hidden_TD):
    return sampler.top(jax.nn.log_softmax(_logits(hidden_TD, head_DV)), count, wanted)

  return jax.lax.map(row, hidden_RTD)
