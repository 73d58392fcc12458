"""The rounds run: rows out, experts on what arrived, rows back; and the same again backward.

Place in the ring: under `interface`. Each pass is one loop whose body is one round; its trip count
is what the fullest device of the group needs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.kernels import dispatch, grouped_matmul
from intellect3.kernels.expert_parallel import exchange, rounds


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is known while tracing.

  Attributes:
    axis_name: the mesh axis of the group.
    devices: R, its size.
    ragged: whether rows lie side by side in the buffers, else in R equal slots.
    rows: M, of a buffer; a multiple of R.
    nominal: the rounds that are run in any case.
    implementation: of `grouped_matmul.expert_mlp`.
    block_size: likewise.
  """

  axis_name: str
  devices: int
  ragged: bool
  rows: int
  nominal: int
  implementation: str
  block_size: int


class Routing(NamedTuple):
  """Where this device's pairs go, and what the group has for each other.

  Attributes:
    plan: the pairs in the order of all experts, and so of devices.
    counts_SRE: int32 [R, R, E], the rows of source s for destination r and its expert e.
    counts_SR: int32 [R, R], their sums.
    total: int32 [], the rounds.
  """

  plan: dispatch.Plan
  counts_SRE: jax.Array
  counts_SR: jax.Array
  total: jax.Array


def _route(setting: Setting, experts_TA: jax.Array, local: int) -> Routing:
  plan = dispatch.plan(experts_TA, num_experts=setting.devices * local, block_size=1)
  counts_RE = plan.counts_E.reshape(setting.devices, local)
  counts_SRE = counts_RE[None]
  if setting.devices > 1:
    counts_SRE = jax.lax.all_gather(counts_RE, setting.axis_name)
  counts_SR = jnp.sum(counts_SRE, axis=2)
  needed = rounds.needed(counts_SR, rows=setting.rows, ragged=setting.ragged)
  return Routing(plan, counts_SRE, counts_SR, jnp.maximum(needed, setting.nominal))


class _Turn(NamedTuple):
  """A round as this device sees it.

  Attributes:
    turn: the round.
    tokens_M: int32, the token of each row of the sending buffer; 0 where there is none.
    rows_TA: int32, the row of each pair in the sending buffer.
    sent_TA: bool, whether the pair is sent in this round.
    experts_M: int32, the expert of each row of the receiving buffer; E where there is none.
  """

  turn: rounds.Round
  tokens_M: jax.Array
  rows_TA: jax.Array
  sent_TA: jax.Array
  experts_M: jax.Array


def _turn(setting: Setting, routing: Routing, k: jax.Array) -> _Turn:
  turn = rounds.make_round(
    k, routing.total, routing.counts_SR, rows=setting.rows, ragged=setting.ragged
  )
  me = jax.lax.axis_index(setting.axis_name)
  plan, local = routing.plan, routing.counts_SRE.shape[2]
  begins_R = plan.starts_E[::local]
  out = rounds.slots(turn.sent_SR[me], turn.sizes_SR[me], turn.firsts_SR[me], rows=setting.rows)
  places_M = jnp.where(out.used_M, begins_R[out.peer_M] + out.rank_M, 0)
  # A pair is sent if its place among its destination's falls into the round's part. Those of nobody
  # come after all parts of the last destination.
  peer_TA = jnp.sum(plan.rows_TA[..., None] >= begins_R, axis=2, dtype=jnp.int32) - 1
  place_TA = plan.rows_TA - (begins_R + turn.firsts_SR[me])[peer_TA]
  sent_TA = (place_TA >= 0) & (place_TA < turn.sizes_SR[me][peer_TA])
  arrived = rounds.slots(
    turn.received_SR[:, me], turn.sizes_SR[:, me], turn.firsts_SR[:, me], rows=setting.rows
  )
  return _Turn(
    turn=turn,
    tokens_M=dispatch.take(plan.tokens_P, places_M),
    rows_TA=jnp.where(sent_TA, turn.sent_SR[me][peer_TA] + place_TA, 0),
    sent_TA=sent_TA,
    experts_M=rounds.local_experts(arrived, routing.counts_SRE[:, me]),
  )


def _add_rows(sum_TD: jax.Array, rows_MD: jax.Array, turn: _Turn) -> jax.Array:
  """Adds to each token the rows that it sent in this round, in the order of its choices.

  The rows are put in the order of tokens, each token's are summed by shifting, and the sums added
  at distinct places: the same bits every time on a GPU, where a scatter that adds twice at one
  place is in no order, and work that grows with the rows instead of with all pairs every round.
  """
  tokens, choices = turn.sent_TA.shape
  rows = rows_MD.shape[0]
  flat = turn.sent_TA.reshape(-1)
  # Pairs that are not sent are put beyond the end, each at a place of its own.
  beyond = rows + choices + jnp.arange(flat.size, dtype=jnp.int32)
  order = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, beyond)
  token_ids = jnp.arange(flat.size, dtype=jnp.int32) // choices
  put = functools.partial(_put, order=order, size=rows + choices)
  tokens_Z, rows_Z = put(token_ids, fill=tokens), put(turn.rows_TA.reshape(-1), fill=0)
  own_M = tokens_Z[:rows]
  sums_MD = jnp.zeros(rows_MD.shape, sum_TD.dtype)
  for shift in range(choices):
    same_M = (tokens_Z[shift : shift + rows] == own_M) & (own_M < tokens)
    shifted_MD = dispatch.take(rows_MD, jnp.where(same_M, rows_Z[shift : shift + rows], 0))
    sums_MD += jnp.where(same_M[:, None], shifted_MD.astype(sum_TD.dtype), 0)
  row_M = jnp.arange(rows, dtype=jnp.int32)
  first_M = (own_M < tokens) & ((row_M == 0) | (jnp.roll(own_M, 1) != own_M))
  target_M = jnp.where(first_M, own_M, tokens + row_M)
  return sum_TD.at[target_M].add(sums_MD, mode="drop", unique_indices=True)


def _put(values: jax.Array, *, order: jax.Array, size: int, fill: int) -> jax.Array:
  filled = jnp.full(size, fill, values.dtype)
  return filled.at[order].set(values, mode="drop", unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mlp(
  setting: Setting,
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """See `interface.expert_parallel_mlp`; pairs of id R E are nobody's."""
  return _mlp_fwd(setting, x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA)[0]


def _trips(setting: Setting, turn: rounds.Round) -> tuple[Any, Any]:
  options: dict[str, Any] = {"axis_name": setting.axis_name, "ragged": setting.ragged}
  there = functools.partial(exchange.there, turn=turn, **options)
  return there, functools.partial(exchange.back, turn=turn, **options)


def _run(
  setting: Setting,
  experts_M: jax.Array,
  x_MD: jax.Array,
  weights_M: jax.Array,
  stacks: tuple[jax.Array, ...],
) -> jax.Array:
  gate_EDF, up_EDF, down_EFD = stacks
  return grouped_matmul.expert_mlp(
    x_MD,
    gate_EDF,
    up_EDF,
    down_EFD,
    experts_M[:, None],
    weights_M[:, None],
    implementation=setting.implementation,
    block_size=setting.block_size,
  )


def _loop(setting: Setting, routing: Routing, run_round: Any, start: Any) -> Any:
  # XLA does not know how often this loop turns; its name says how often at least.
  with jax.named_scope(f"nominal_rounds_{setting.nominal}"):
    return jax.lax.fori_loop(0, routing.total, run_round, start)


def _mlp_fwd(setting: Setting, *arrays: jax.Array) -> tuple[Any, Any]:
  x_TD, *stacks, experts_TA, weights_TA = arrays
  routing = _route(setting, experts_TA, stacks[0].shape[0])

  def run_round(k: jax.Array, out_TD: jax.Array) -> jax.Array:
    turn = _turn(setting, routing, k)
    there, back = _trips(setting, turn.turn)
    x_MD = there(dispatch.take(x_TD, turn.tokens_M))
    weights_M = there(_send_scalars(weights_TA, turn))
    y_MD = _run(setting, turn.experts_M, x_MD, weights_M, tuple(stacks))
    return _add_rows(out_TD, back(y_MD), turn)

  zeros_TD = jnp.zeros(x_TD.shape, jnp.float32)
  out_TD = _loop(setting, routing, run_round, zeros_TD).astype(x_TD.dtype)
  return (out_TD, routing.total - setting.nominal), (arrays, routing)


def _send_scalars(values_TA: jax.Array, turn: _Turn) -> jax.Array:
  """Each sent pair's value in its row of the sending buffer; float32 [M], zeros elsewhere."""
  rows = turn.tokens_M.shape[0]
  place_TA = jnp.arange(values_TA.size, dtype=jnp.int32).reshape(values_TA.shape)
  place_TA = jnp.where(turn.sent_TA, turn.rows_TA, rows + place_TA)
  zeros_M = jnp.zeros(rows, jnp.float32)
  values_TA = values_TA.astype(jnp.float32)
  return zeros_M.at[place_TA].set(values_TA, mode="drop", unique_indices=True)


def _mlp_bwd(setting: Setting, saved: Any, cotangents: Any) -> tuple[Any, ...]:
  (x_TD, *stacks, experts_TA, weights_TA), routing = saved
  dout_TD = cotangents[0].astype(x_TD.dtype)

  def run_round(k: jax.Array, sums: Any) -> Any:
    dx_TD, dweights_TA, dstacks = sums
    turn = _turn(setting, routing, k)
    there, back = _trips(setting, turn.turn)
    x_MD = there(dispatch.take(x_TD, turn.tokens_M))
    dout_MD = there(dispatch.take(dout_TD, turn.tokens_M))
    weights_M = there(_send_scalars(weights_TA, turn))
    run = functools.partial(_run, setting, turn.experts_M)
    _, pull = jax.vjp(run, x_MD, weights_M, tuple(stacks))
    dx_MD, dweights_M, more = pull(dout_MD)
    arrived_TA = dispatch.take(back(dweights_M), turn.rows_TA)
    return (
      _add_rows(dx_TD, back(dx_MD), turn),
      jnp.where(turn.sent_TA, arrived_TA, dweights_TA),
      jax.tree.map(lambda a, b: a + b.astype(a.dtype), dstacks, more),
    )

  zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
  start = (zeros(x_TD.shape), zeros(weights_TA.shape), tuple(zeros(s.shape) for s in stacks))
  dx_TD, dweights_TA, dstacks = _loop(setting, routing, run_round, start)
  return (
    dx_TD.astype(x_TD.dtype),
    *(d.astype(stack.dtype) for d, stack in zip(dstacks, stacks, strict=True)),
    np.zeros(experts_TA.shape, jax.dtypes.float0),
    dweights_TA.astype(weights_TA.dtype),
  )


mlp.defvjp(_mlp_fwd, _mlp_bwd)
