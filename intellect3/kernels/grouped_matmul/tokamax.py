"""The routed experts by Triton kernels of the package tokamax, on NVIDIA GPUs.

Place in the ring: an implementation of `interface`. The pairs' rows are sorted by expert
(`kernels.dispatch`) and multiplied by their expert's matrices in one kernel per stack. Only the
Triton kernels are asked for: another would be XLA's ragged dot, which multiplies every expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from intellect3.kernels import dispatch


def expert_mlp(
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
) -> jax.Array:
  """See `interface.expert_mlp`; hidden activations are in the dtype of x.

  Raises:
    ValueError: on a mesh of several devices outside `shard_map`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual:
    raise ValueError(
      f"grouped_matmul: tokamax expects shard_map on several devices, got mesh {mesh}"
    )
  import tokamax

  if not flags.FLAGS.is_parsed():
    # Else tokamax parses sys.argv, and ends processes that are not absl's over flags of their own.
    flags.FLAGS.mark_as_parsed()
  plan = dispatch.plan(experts_TA, num_experts=gate_EDF.shape[0], block_size=0)
  multiply = functools.partial(
    tokamax.ragged_dot, group_sizes=plan.counts_E, implementation="triton"
  )
  x_PD = _spread(x_TD, plan)
  gate_PF, up_PF = (multiply(x_PD, stack).astype(jnp.float32) for stack in (gate_EDF, up_EDF))
  # Weighted here, the result is not needed for the weights' gradient: one product less to repeat.
  weights_P1 = dispatch.sort(weights_TA.astype(jnp.float32), plan)[:, None]
  gated_PF = (jax.nn.silu(gate_PF) * up_PF * weights_P1).astype(x_TD.dtype)
  return _combine(multiply(gated_PF, down_EFD), plan).astype(x_TD.dtype)


def _no_gradient(plan: dispatch.Plan) -> Any:
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), plan)


@jax.custom_vjp
def _spread(x_TD: jax.Array, plan: dispatch.Plan) -> jax.Array:
  """Each pair's token, [P, D]. The gradient is a sum of gathers; autodiff's would be a scatter."""
  return dispatch.take(x_TD, plan.tokens_P)


def _spread_fwd(x_TD: jax.Array, plan: dispatch.Plan) -> tuple[jax.Array, dispatch.Plan]:
  return _spread(x_TD, plan), plan


def _spread_bwd(plan: dispatch.Plan, dx_PD: jax.Array) -> tuple[jax.Array, Any]:
  return dispatch.combine(dx_PD, plan).astype(dx_PD.dtype), _no_gradient(plan)


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _combine(y_PD: jax.Array, plan: dispatch.Plan) -> jax.Array:
  """Each token's sum, [T, D] float32; gathers in both directions, too."""
  return dispatch.combine(y_PD, plan)


def _combine_fwd(y_PD: jax.Array, plan: dispatch.Plan) -> Any:
  # The cotangent's dtype is float32; an empty array says what y's was.
  return _combine(y_PD, plan), (y_PD[:0], plan)


def _combine_bwd(saved: Any, dout_TD: jax.Array) -> Any:
  y_0D, plan = saved
  return dispatch.take(dout_TD.astype(y_0D.dtype), plan.tokens_P), _no_gradient(plan)


_combine.defvjp(_combine_fwd, _combine_bwd)
