"""Sort and combine: how routed tokens are laid out with each expert's rows side by side.

Place in the ring: under `grouped_matmul`. Dropless: every (token, choice) pair gets a row. Which
row follows from counting, so no sort is needed, and an expert's rows are in the order of tokens.
A pair without an expert (its id is E) gets a row after all others, which nobody computes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
  """Where each routed pair sits: P rows, one per pair in the order of experts, then padding.

  Pairs without an expert come last, before the padding.

  Attributes:
    rows_TA: int32 [T, A], the row of token t's choice a.
    own_TA: bool [T, A], whether that pair has an expert.
    tokens_P: int32 [P], the token of each row; 0 in the padding.
    starts_E: int32 [E], each expert's first row.
    counts_E: int32 [E], its rows.
    blocks_E: int32 [E], the blocks that hold them.
    used_E: int32 [E], the experts with any row, ascending, then zeros.
    num_used: int32 [], how many those are.
  """

  rows_TA: jax.Array
  own_TA: jax.Array
  tokens_P: jax.Array
  starts_E: jax.Array
  counts_E: jax.Array
  blocks_E: jax.Array
  used_E: jax.Array
  num_used: jax.Array


def plan(experts_TA: jax.Array, *, num_experts: int, block_size: int) -> Plan:
  """Sorts routed pairs by expert.

  Args:
    experts_TA: integer [T, A], the chosen experts, each in [0, num_experts]; the last means none.
    num_experts: E.
    block_size: rows per block; so many rows of padding follow, so that a block that starts at any
      expert's row stays within.
  """
  tokens, choices = experts_TA.shape
  experts_TA = experts_TA.astype(jnp.int32)
  chosen_TAE = experts_TA[:, :, None] == jnp.arange(num_experts + 1)
  chosen_TE = jnp.sum(chosen_TAE, axis=1, dtype=jnp.int32)
  until_TE = jnp.cumsum(chosen_TE, axis=0)
  starts_E = jnp.cumsum(until_TE[-1]) - until_TE[-1]
  # Pairs of earlier tokens come first, then the token's own earlier choices of the same expert.
  first_TA = jnp.take_along_axis(starts_E + until_TE - chosen_TE, experts_TA, axis=1)
  earlier_AA = jnp.tri(choices, k=-1, dtype=bool)
  again_TAA = (experts_TA[:, :, None] == experts_TA[:, None, :]) & earlier_AA
  rows_TA = first_TA + jnp.sum(again_TAA, axis=2, dtype=jnp.int32)
  tokens_TA = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], rows_TA.shape)
  counts_E = until_TE[-1, :num_experts]
  used_E = counts_E > 0
  place_E = jnp.where(used_E, jnp.cumsum(used_E) - 1, num_experts)
  ascending_E = jnp.arange(num_experts, dtype=jnp.int32)
  return Plan(
    rows_TA=rows_TA,
    own_TA=experts_TA < num_experts,
    tokens_P=_scatter(tokens_TA, rows_TA, tokens * choices + block_size),
    starts_E=starts_E[:num_experts],
    counts_E=counts_E,
    blocks_E=(counts_E + block_size - 1) // block_size,
    used_E=jnp.zeros(num_experts, jnp.int32).at[place_E].set(ascending_E, mode="drop"),
    num_used=jnp.sum(used_E, dtype=jnp.int32),
  )


def _scatter(values_TA: jax.Array, rows_TA: jax.Array, rows: int) -> jax.Array:
  zeros_P = jnp.zeros(rows, values_TA.dtype)
  return zeros_P.at[rows_TA].set(values_TA, unique_indices=True, mode="promise_in_bounds")


def sort(values_TA: jax.Array, plan: Plan) -> jax.Array:
  """One value per pair, in the order of rows: [P], zeros in the padding."""
  return _scatter(values_TA, plan.rows_TA, plan.tokens_P.shape[0])


def take(array: jax.Array, rows: jax.Array) -> jax.Array:
  """Rows of an array by indices known to lie within."""
  return array.at[rows].get(mode="promise_in_bounds")


def combine(y_PD: jax.Array, plan: Plan, weights_TA: jax.Array | None = None) -> jax.Array:
  """Sums each token's rows, weighted if weights are given, in the order of its choices.

  Pairs without an expert add nothing, whatever stands in their rows.

  Args:
    y_PD: [P, D], one row per pair (and padding).
    plan: the layout.
    weights_TA: [T, A] or None.

  Returns:
    [T, D] float32.
  """
  # Choice by choice: the sum fuses with the gathers, and no [T, A, D] array is made.
  sum_TD = jnp.zeros((plan.rows_TA.shape[0], y_PD.shape[1]), jnp.float32)
  for choice in range(plan.rows_TA.shape[1]):
    rows_TD = take(y_PD, plan.rows_TA[:, choice]).astype(jnp.float32)
    rows_TD = jnp.where(plan.own_TA[:, choice, None], rows_TD, 0)
    if weights_TA is not None:
      rows_TD = rows_TD * weights_TA[:, choice, None].astype(jnp.float32)
    sum_TD = sum_TD + rows_TD
  return sum_TD
