"""What the routed experts' MLPs promise, and which implementation keeps the promise where.

Place in the ring: inside the model's MoE layers, in training, prefill and decode alike.
"""

import importlib.util

import chex
import jax
import jax.numpy as jnp

from intellect3.kernels.grouped_matmul import blocked, dense, tokamax
from intellect3.kernels.platform import PLATFORMS, traced_platform

IMPLEMENTATIONS = ("dense", "blocked", "tokamax", "auto")


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

  Nothing is dropped, whatever the routing. For one shape of the arguments a token's result does not
  depend on the other tokens, bit for bit.

  A pair whose expert is E has none: it adds nothing, costs next to nothing, and its weight gets no
  gradient. A token whose pairs are all such gets zeros, and what stands in its rows of x, weights
  and cotangent reaches nothing, be it NaN.

  Args:
    x_TD: floating [T, D].
    gate_EDF: floating [E, D, F].
    up_EDF: floating [E, D, F].
    down_EFD: floating [E, F, D].
    experts_TA: integer [T, A], the experts of each token, each in [0, E]; E means none.
    weights_TA: floating [T, A].
    implementation: `dense` computes every expert on every token (the oracle; the fastest for a
      handful of small experts); `blocked` only what was routed, in blocks of rows; `tokamax` is a
      Triton kernel for NVIDIA GPUs; `auto` is what `resolve` says of the platform traced for.
    block_size: `blocked`: the most rows of a block. Smaller blocks are taken where an expert
      gets fewer tokens on average, as in a decode step.

  Returns:
    [T, D] in the dtype of x. Products are summed in float32; reverse-mode differentiable in x, the
    three stacks and the weights.

  Raises:
    ValueError: for an unknown implementation, one that cannot run on the platform traced for, or
      block_size < 1.
  """
  name = resolve(implementation, traced_platform())
  if block_size < 1:
    raise ValueError(f"block_size: expected at least 1, got {block_size}")
  chex.assert_rank([x_TD, gate_EDF, experts_TA], [2, 3, 2])
  chex.assert_equal_shape([gate_EDF, up_EDF])
  chex.assert_equal_shape([experts_TA, weights_TA])
  experts, embed, mlp = gate_EDF.shape
  chex.assert_shape(x_TD, (experts_TA.shape[0], embed))
  chex.assert_shape(down_EFD, (experts, mlp, embed))
  weights_TA = jnp.where(experts_TA < experts, weights_TA, 0)
  arrays = (x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA)
  if name == "dense":
    return dense.expert_mlp(*arrays)
  if name == "tokamax":
    return tokamax.expert_mlp(*arrays)
  average = -(-experts_TA.size // experts)
  rows = min(block_size, max(8, 1 << (average - 1).bit_length()))
  return blocked.expert_mlp(rows, *arrays)


def resolve(name: str, platform: str) -> str:
  """The implementation that a name of the config means on a platform.

  Args:
    name: one of `IMPLEMENTATIONS`.
    platform: cpu, gpu or tpu.

  Returns:
    `dense`, `blocked` or `tokamax`. `auto` is `tokamax` on a GPU where that package is installed,
    else `blocked`.

  Raises:
    ValueError: for an unknown name or platform, or an implementation that cannot run there.
  """
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"grouped_matmul: expected one of {IMPLEMENTATIONS}, got {name!r}")
  if platform not in PLATFORMS:
    raise ValueError(f"platform: expected one of {PLATFORMS}, got {platform!r}")
  installed = importlib.util.find_spec("tokamax") is not None
  if name == "auto":
    return "tokamax" if platform == "gpu" and installed else "blocked"
  if name == "tokamax" and platform != "gpu":
    raise ValueError(
      f"grouped_matmul: expected dense, blocked or auto on {platform}, got 'tokamax'"
    )
  if name == "tokamax" and not installed:
    raise ValueError(
      "grouped_matmul: expected dense, blocked or auto, got 'tokamax', which is not installed "
      "(pip install 'intellect3[gpu-kernels]')"
    )
  return name
