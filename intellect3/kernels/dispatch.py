"""Sort, pad and combine: how routed tokens are laid out in blocks of one expert each.

Place in the ring: under `grouped_matmul`. Dropless: every (token, choice) pair gets a row; an
expert's rows are padded to whole blocks, so every block is one plain matrix product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
  """Where each routed pair sits. M blocks of R rows; M is the worst case, so shapes are static.

  Attributes:
    rows_TA: int32 [T, A], the row (of M * R) of token t's choice a.
    tokens_MR: int32 [M, R], the token of each row; T (one past the last) where it is padding.
    experts_M: int32 [M], the expert of each block.
    used_M: bool [M], whether the block holds any pair.
  """

  rows_TA: jax.Array
  tokens_MR: jax.Array
  experts_M: jax.Array
  used_M: jax.Array


def plan(experts_TA: jax.Array, *, num_experts: int, block_size: int) -> Plan:
  """Lays out routed pairs in blocks of `block_size` rows of one expert each.

  Args:
    experts_TA: integer [T, A], the chosen experts, each in [0, num_experts).
    num_experts: E.
    block_size: R, rows per block.
  """
  tokens, choices = experts_TA.shape
  pairs = tokens * choices
  # Every expert wastes less than one block; an expert without a pair has none.
  blocks = pairs // block_size + min(num_experts, pairs)
  flat_P = experts_TA.reshape(-1)
  order_P = jnp.argsort(flat_P, stable=True)
  sorted_P = flat_P[order_P]
  counts_E = jnp.bincount(flat_P, length=num_experts)
  first_E = jnp.cumsum(counts_E) - counts_E
  blocks_E = -(-counts_E // block_size)
  last_block_E = jnp.cumsum(blocks_E)
  rank_P = jnp.arange(pairs) - first_E[sorted_P]
  row_P = (last_block_E - blocks_E)[sorted_P] * block_size + rank_P
  rows_TA = jnp.zeros(pairs, jnp.int32).at[order_P].set(row_P.astype(jnp.int32))
  tokens_MR = jnp.full(blocks * block_size, tokens, jnp.int32)
  tokens_MR = tokens_MR.at[row_P].set((order_P // choices).astype(jnp.int32))
  block_M = jnp.arange(blocks)
  experts_M = jnp.searchsorted(last_block_E, block_M, side="right")
  return Plan(
    rows_TA=rows_TA.reshape(tokens, choices),
    tokens_MR=tokens_MR.reshape(blocks, block_size),
    experts_M=jnp.minimum(experts_M, num_experts - 1).astype(jnp.int32),
    used_M=block_M < last_block_E[-1],
  )


def take_rows(x_TD: jax.Array, tokens_R: jax.Array) -> jax.Array:
  """The rows of some tokens; zeros for padding (token index T)."""
  return jnp.take(x_TD, tokens_R, axis=0, mode="fill", fill_value=0)


def combine(y_PD: jax.Array, plan: Plan, weights_TA: jax.Array | None = None) -> jax.Array:
  """Sums each token's rows, weighted if weights are given: a gather, in one fixed order.

  Args:
    y_PD: [M * R, D], one row per pair (and padding).
    plan: the layout.
    weights_TA: [T, A] or None.

  Returns:
    [T, D] float32.
  """
  y_TAD = y_PD[plan.rows_TA].astype(jnp.float32)
  if weights_TA is None:
    return jnp.sum(y_TAD, axis=1)
  return jnp.einsum("TAD,TA->TD", y_TAD, weights_TA.astype(jnp.float32))
