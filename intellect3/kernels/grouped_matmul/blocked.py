"""The routed experts in blocks of rows: only what was routed, with static shapes.

Place in the ring: an implementation of `interface`. The pairs are sorted by expert
(`kernels.dispatch`); a loop goes over the experts that got any, and within each over blocks of R of
its rows. The loops end with the pairs, so work follows the routing. An expert's last block reaches
into the rows of the next expert, which come later and overwrite what it left there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.kernels import dispatch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(
  block_size: int,
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
) -> jax.Array:
  """See `interface.expert_mlp`.

  A pass over the pairs holds `[pairs, D]`; for the backward pass `[pairs, F]` are kept twice,
  the products with gate and up.

  Args:
    block_size: R, rows of a block.
    x_TD: the tokens.
    gate_EDF: the first stack.
    up_EDF: the second.
    down_EFD: the third.
    experts_TA: the choices.
    weights_TA: their weights.
  """
  arrays = (x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA)
  return _forward(block_size, *arrays, keep=False)[0]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _own(plan: dispatch.Plan, expert: jax.Array, block: jax.Array, size: int) -> jax.Array:
  """Which rows of an expert's block are its own: bool [size, 1]."""
  return jnp.arange(size)[:, None] < plan.counts_E[expert] - block * size


_rows = jax.lax.dynamic_slice_in_dim


def _put_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), start, axis=0)


def _forward(
  block_size: int,
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
  *,
  keep: bool,
) -> tuple[jax.Array, dispatch.Plan, list[jax.Array | None]]:
  """Returns the result, the layout and, if to be kept, the pairs' products with gate and up."""
  experts, embed, mlp = gate_EDF.shape
  plan = dispatch.plan(experts_TA, num_experts=experts, block_size=block_size)
  rows = plan.tokens_P.shape[0]

  def run_expert(index: jax.Array, carry: Any) -> Any:
    expert = plan.used_E[index]
    gate_DF, up_DF, down_FD = gate_EDF[expert], up_EDF[expert], down_EFD[expert]

    def run_block(block: jax.Array, carry: Any) -> Any:
      y_PD, gate_PF, up_PF = carry
      start = plan.starts_E[expert] + block * block_size
      x_RD = dispatch.take(x_TD, _rows(plan.tokens_P, start, block_size))
      x_RD = jnp.where(_own(plan, expert, block, block_size), x_RD, 0)
      gate_RF, up_RF = _dot(x_RD, gate_DF), _dot(x_RD, up_DF)
      gated_RF = jax.nn.silu(gate_RF) * up_RF
      y_PD = _put_rows(y_PD, _dot(gated_RF.astype(x_TD.dtype), down_FD), start)
      if not keep:
        return y_PD, None, None
      return y_PD, _put_rows(gate_PF, gate_RF, start), _put_rows(up_PF, up_RF, start)

    return jax.lax.fori_loop(0, plan.blocks_E[expert], run_block, carry)

  start = (
    jnp.zeros((rows, embed), x_TD.dtype),
    *((jnp.zeros((rows, mlp), x_TD.dtype) if keep else None) for _ in range(2)),
  )
  y_PD, *hidden_PX = jax.lax.fori_loop(0, plan.num_used, run_expert, start)
  return dispatch.combine(y_PD, plan, weights_TA).astype(x_TD.dtype), plan, hidden_PX


def _expert_mlp_fwd(block_size: int, *arrays: jax.Array) -> tuple[jax.Array, Any]:
  out_TD, plan, hidden_PX = _forward(block_size, *arrays, keep=True)
  return out_TD, (arrays, plan, hidden_PX)


def _expert_mlp_bwd(block_size: int, saved: Any, dout_TD: jax.Array) -> tuple[Any, ...]:
  """One pass over the blocks; an expert's weight gradients are summed before they are stored.

  Left to autodiff, every block would add a full [E, D, F] array of mostly zeros.
  """
  (x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA), plan, hidden_PX = saved
  weights_P = dispatch.sort(weights_TA.astype(jnp.float32), plan)
  dtype = x_TD.dtype

  def run_expert(index: jax.Array, carry: Any) -> Any:
    dx_PD, dweights_P, dgate_EDF, dup_EDF, ddown_EFD = carry
    expert = plan.used_E[index]
    gate_DF, up_DF, down_FD = gate_EDF[expert], up_EDF[expert], down_EFD[expert]

    def run_block(block: jax.Array, carry: Any) -> Any:
      dx_PD, dweights_P, dgate_DF, dup_DF, ddown_FD = carry
      start = plan.starts_E[expert] + block * block_size
      tokens_R = _rows(plan.tokens_P, start, block_size)
      # The next rows must add nothing to this expert's gradients, nor NaN, if they have no expert.
      own_R1 = _own(plan, expert, block, block_size)
      dy_RD = jnp.where(own_R1, dispatch.take(dout_TD, tokens_R), 0)
      gate_RF, up_RF = (_rows(h, start, block_size).astype(jnp.float32) for h in hidden_PX)
      sigmoid_RF = jax.nn.sigmoid(gate_RF)
      silu_RF = gate_RF * sigmoid_RF
      slope_RF = sigmoid_RF * (1 + gate_RF - silu_RF)
      dunweighted_RF = _dot(dy_RD, down_FD.T)
      dweights_R = jnp.sum(silu_RF * up_RF * dunweighted_RF, axis=1)
      weights_R1 = _rows(weights_P, start, block_size)[:, None]
      dgated_RF = weights_R1 * dunweighted_RF
      dgate_RF = (dgated_RF * up_RF * slope_RF).astype(dtype)
      dup_RF = (dgated_RF * silu_RF).astype(dtype)
      x_RD = jnp.where(own_R1, dispatch.take(x_TD, tokens_R), 0)
      gated_RF = (weights_R1 * silu_RF * up_RF).astype(dtype)
      return (
        _put_rows(dx_PD, _dot(dgate_RF, gate_DF.T) + _dot(dup_RF, up_DF.T), start),
        _put_rows(dweights_P, dweights_R, start),
        dgate_DF + _dot(x_RD.T, dgate_RF),
        dup_DF + _dot(x_RD.T, dup_RF),
        ddown_FD + _dot(gated_RF.T, dy_RD),
      )

    zeros = (jnp.zeros(w.shape, jnp.float32) for w in (gate_DF, up_DF, down_FD))
    blocks = plan.blocks_E[expert]
    carry = (dx_PD, dweights_P, *zeros)
    dx_PD, dweights_P, dgate_DF, dup_DF, ddown_FD = jax.lax.fori_loop(0, blocks, run_block, carry)
    return (
      dx_PD,
      dweights_P,
      dgate_EDF.at[expert].set(dgate_DF.astype(dgate_EDF.dtype)),
      dup_EDF.at[expert].set(dup_DF.astype(dup_EDF.dtype)),
      ddown_EFD.at[expert].set(ddown_FD.astype(ddown_EFD.dtype)),
    )

  rows = plan.tokens_P.shape[0]
  start = (
    jnp.zeros((rows, x_TD.shape[1]), dtype),
    jnp.zeros((rows,), jnp.float32),
    *(jnp.zeros_like(stack) for stack in (gate_EDF, up_EDF, down_EFD)),
  )
  end = jax.lax.fori_loop(0, plan.num_used, run_expert, start)
  dx_PD, dweights_P, dgate_EDF, dup_EDF, ddown_EFD = end
  return (
    dispatch.combine(dx_PD, plan).astype(dtype),
    dgate_EDF,
    dup_EDF,
    ddown_EFD,
    np.zeros(experts_TA.shape, jax.dtypes.float0),
    dispatch.take(dweights_P, plan.rows_TA).astype(weights_TA.dtype),
  )


expert_mlp.defvjp(_expert_mlp_fwd, _expert_mlp_bwd)
