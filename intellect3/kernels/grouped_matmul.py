"""The routed experts' MLPs as grouped matrix products.

Place in the ring: inside the model's MoE layers. `dense` is the oracle: every expert on every
token. `blocked` computes only what was routed, drops nothing, and pads to blocks.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from intellect3.kernels import dispatch

IMPLEMENTATIONS = ("dense", "blocked")


def expert_mlp(
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
  *,
  implementation: str,
  block_size: int,
) -> jax.Array:
  """Weighted sum of each token's chosen experts: `sum_a w_a (silu(x G_e) * x U_e) D_e`.

  Args:
    x_TD: floating [T, D].
    gate_EDF: floating [E, D, F].
    up_EDF: floating [E, D, F].
    down_EFD: floating [E, F, D].
    experts_TA: integer [T, A], the experts of each token, distinct, each in [0, E).
    weights_TA: floating [T, A].
    implementation: `dense` computes every expert on every token (the oracle; the fastest for a
      handful of small experts); `blocked` only what was routed.
    block_size: `blocked`: the most rows of a block. Smaller blocks are taken where an expert
      gets fewer tokens on average, as in a decode step.

  Returns:
    [T, D] in the dtype of x. Products are summed in float32; differentiable in x, the three
    stacks and the weights.

  Raises:
    ValueError: for an unknown implementation or block_size < 1.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"grouped_matmul: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
  if block_size < 1:
    raise ValueError(f"block_size: expected at least 1, got {block_size}")
  chex.assert_rank([x_TD, gate_EDF, experts_TA], [2, 3, 2])
  chex.assert_equal_shape([gate_EDF, up_EDF])
  chex.assert_equal_shape([experts_TA, weights_TA])
  experts, embed, mlp = gate_EDF.shape
  chex.assert_shape(x_TD, (experts_TA.shape[0], embed))
  chex.assert_shape(down_EFD, (experts, mlp, embed))
  if implementation == "dense":
    return _dense(x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA)
  average = -(-experts_TA.size // experts)
  rows = min(block_size, max(8, 1 << (average - 1).bit_length()))
  return _blocked(rows, x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA)


def _dense(x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA):
  wide = jnp.float32
  chosen_TAE = experts_TA[:, :, None] == jnp.arange(gate_EDF.shape[0])
  weights_TE = jnp.sum(jnp.where(chosen_TAE, weights_TA.astype(wide)[:, :, None], 0), axis=1)
  gate_TEF = jnp.einsum("TD,EDF->TEF", x_TD, gate_EDF, preferred_element_type=wide)
  up_TEF = jnp.einsum("TD,EDF->TEF", x_TD, up_EDF, preferred_element_type=wide)
  hidden_TEF = jax.nn.silu(gate_TEF) * up_TEF * weights_TE[:, :, None]
  y_TD = jnp.einsum(
    "TEF,EFD->TD", hidden_TEF.astype(x_TD.dtype), down_EFD, preferred_element_type=wide
  )
  return y_TD.astype(x_TD.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _hidden(x_RD, gate_DF, up_DF):
  """Returns silu(gate), its derivative, and up, in float32."""
  gate_RF = _dot(x_RD, gate_DF)
  sigmoid_RF = jax.nn.sigmoid(gate_RF)
  silu_RF = gate_RF * sigmoid_RF
  slope_RF = sigmoid_RF * (1 + gate_RF - silu_RF)
  return silu_RF, slope_RF, _dot(x_RD, up_DF)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block_size, x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA):
  plan = dispatch.plan(experts_TA, num_experts=gate_EDF.shape[0], block_size=block_size)

  def product(block):
    tokens_R, expert = block
    x_RD = dispatch.take_rows(x_TD, tokens_R)
    silu_RF, _, up_RF = _hidden(x_RD, gate_EDF[expert], up_EDF[expert])
    return _dot((silu_RF * up_RF).astype(x_RD.dtype), down_EFD[expert]).astype(x_RD.dtype)

  def step(carry, inputs):
    used, block = inputs
    zeros_RD = jnp.zeros((block_size, x_TD.shape[1]), x_TD.dtype)
    return carry, jax.lax.cond(used, product, lambda _: zeros_RD, block)

  _, y_MRD = jax.lax.scan(step, None, (plan.used_M, (plan.tokens_MR, plan.experts_M)))
  y_PD = y_MRD.reshape(-1, x_TD.shape[1])
  return dispatch.combine(y_PD, plan, weights_TA).astype(x_TD.dtype)


def _blocked_fwd(block_size, *arrays):
  # The plan is cheap to make again; the blocks' activations are recomputed.
  return _blocked(block_size, *arrays), arrays


def _blocked_bwd(block_size, arrays, dout_TD):
  """One pass over the blocks; each adds to its own expert's weight gradients in place.

  Left to autodiff, every block would add a full [E, D, F] array of mostly zeros.
  """
  x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA = arrays
  plan = dispatch.plan(experts_TA, num_experts=gate_EDF.shape[0], block_size=block_size)
  weights_P = jnp.zeros(plan.tokens_MR.size, jnp.float32)
  weights_P = weights_P.at[plan.rows_TA].set(weights_TA.astype(jnp.float32))
  weights_MR = weights_P.reshape(plan.tokens_MR.shape)
  dtype = x_TD.dtype

  def step(carry, inputs):
    used, block = inputs
    nothing = (
      jnp.zeros((block_size, x_TD.shape[1]), dtype),
      jnp.zeros((block_size,), jnp.float32),
    )
    return jax.lax.cond(used, product, lambda carry, _: (carry, nothing), carry, block)

  def product(carry, block):
    dgate_EDF, dup_EDF, ddown_EFD = carry
    tokens_R, expert, weights_R = block
    x_RD, dy_RD = dispatch.take_rows(x_TD, tokens_R), dispatch.take_rows(dout_TD, tokens_R)
    gate_DF, up_DF, down_FD = gate_EDF[expert], up_EDF[expert], down_EFD[expert]
    silu_RF, slope_RF, up_RF = _hidden(x_RD, gate_DF, up_DF)
    dunweighted_RF = _dot(dy_RD, down_FD.T)
    dweights_R = jnp.sum(silu_RF * up_RF * dunweighted_RF, axis=1)
    dhidden_RF = weights_R[:, None] * dunweighted_RF
    dgate_RF = (dhidden_RF * up_RF * slope_RF).astype(dtype)
    dup_RF = (dhidden_RF * silu_RF).astype(dtype)
    hidden_RF = (weights_R[:, None] * silu_RF * up_RF).astype(dtype)
    carry = (
      dgate_EDF.at[expert].add(_dot(x_RD.T, dgate_RF)),
      dup_EDF.at[expert].add(_dot(x_RD.T, dup_RF)),
      ddown_EFD.at[expert].add(_dot(hidden_RF.T, dy_RD)),
    )
    dx_RD = _dot(dgate_RF, gate_DF.T) + _dot(dup_RF, up_DF.T)
    return carry, (dx_RD.astype(dtype), dweights_R)

  zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in (gate_EDF, up_EDF, down_EFD))
  blocks = (plan.used_M, (plan.tokens_MR, plan.experts_M, weights_MR))
  (dgate_EDF, dup_EDF, ddown_EFD), (dx_MRD, dweights_MR) = jax.lax.scan(step, zeros, blocks)
  return (
    dispatch.combine(dx_MRD.reshape(-1, x_TD.shape[1]), plan).astype(dtype),
    dgate_EDF.astype(gate_EDF.dtype),
    dup_EDF.astype(up_EDF.dtype),
    ddown_EFD.astype(down_EFD.dtype),
    np.zeros(experts_TA.shape, jax.dtypes.float0),
    dweights_MR.reshape(-1)[plan.rows_TA].astype(weights_TA.dtype),
  )


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
