"""What expert parallelism promises: the routed experts' MLPs over several devices.

Place in the ring: inside the model's MoE layers where training runs over a mesh, in the place of
`grouped_matmul.expert_mlp`, which it calls for what has arrived.
"""

import chex
import jax
import jax.numpy as jnp

from intellect3.kernels import grouped_matmul
from intellect3.kernels.expert_parallel import experts, rounds
from intellect3.kernels.platform import PLATFORMS, traced_platform

EXCHANGES = ("padded", "ragged", "auto")


def expert_parallel_mlp(
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
  valid_T: jax.Array,
  *,
  axis_name: str,
  exchange: str,
  receive_rows: int,
  implementation: str,
  block_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of each token's chosen experts, which lie over the R devices of a mesh axis.

  To be called inside `jax.shard_map(..., check_vma=False)`. Device r holds the experts
  [r E, (r + 1) E). The result is that of `grouped_matmul.expert_mlp` on all experts. Nothing is
  dropped, whatever the routing: rows go in rounds, each of at most `receive_rows` a device, as many
  as the fullest device needs. All R devices run the same number; other groups of the mesh may
  run another. Neither pass holds an array of T x A rows of width D unless `receive_rows` is so
  large, and nothing but the arguments is kept for the backward pass, which sends again. With R
  of 1 nothing travels; where all rows fit in one round, it is `expert_mlp` itself.

  Args:
    x_TD: floating [T, D], this device's tokens.
    gate_EDF: floating [E, D, F], this device's experts.
    up_EDF: floating [E, D, F].
    down_EFD: floating [E, F, D].
    experts_TA: integer [T, A], ids over all devices, each in [0, R E).
    weights_TA: floating [T, A]; travel in float32.
    valid_T: bool [T]; pairs of other tokens are neither sent nor computed.
    axis_name: the mesh axis of the experts.
    exchange: `padded` sends as many rows to each device of the group, filled up; `ragged` only
      those there are (NVIDIA GPUs); `auto` is what `resolve` says of the platform traced for.
    receive_rows: the most rows a device sends, and receives, in a round; rounded down to a multiple
      of R.
    implementation: of `grouped_matmul.expert_mlp`.
    block_size: of `grouped_matmul.expert_mlp`.

  Returns:
    [T, D] in the dtype of x, zeros for tokens that are not valid; and int32 [], the rounds beyond
    `nominal_rounds`. Reverse-mode differentiable in x, the three stacks and the weights, by the
    convention that the devices' losses sum to the loss. Gradients of the stacks are summed over
    rounds in float32.

  Raises:
    ValueError: for an unknown exchange, one that cannot run on the platform traced for,
      receive_rows below R, and what `grouped_matmul.expert_mlp` raises.
  """
  platform = traced_platform()
  name = resolve(exchange, platform)
  grouped_matmul.resolve(implementation, platform)
  devices = jax.lax.axis_size(axis_name)
  if receive_rows < devices:
    raise ValueError(
      f"receive_rows: expected at least one per device of {axis_name!r} ({devices}), "
      f"got {receive_rows}"
    )
  chex.assert_rank([x_TD, gate_EDF, experts_TA, valid_T], [2, 3, 2, 1])
  chex.assert_equal_shape([gate_EDF, up_EDF])
  chex.assert_equal_shape([experts_TA, weights_TA])
  local, embed, mlp = gate_EDF.shape
  tokens = experts_TA.shape[0]
  chex.assert_shape(x_TD, (tokens, embed))
  chex.assert_shape(down_EFD, (local, mlp, embed))
  chex.assert_shape(valid_T, (tokens,))
  experts_TA = jnp.where(valid_T[:, None], experts_TA.astype(jnp.int32), devices * local)
  arrays = (x_TD, gate_EDF, up_EDF, down_EFD, experts_TA, weights_TA)
  if devices == 1 and experts_TA.size <= receive_rows:
    out_TD = grouped_matmul.expert_mlp(
      *arrays, implementation=implementation, block_size=block_size
    )
    return out_TD, jnp.int32(0)
  setting = experts.Setting(
    axis_name=axis_name,
    devices=devices,
    ragged=name == "ragged",
    rows=receive_rows // devices * devices,
    nominal=nominal_rounds(experts_TA.size, receive_rows, devices),
    implementation=implementation,
    block_size=block_size,
  )
  return experts.mlp(setting, *arrays)


def nominal_rounds(pairs: int, receive_rows: int, devices: int) -> int:
  """The rounds that a device with as many rows as it routes pairs would need.

  Args:
    pairs: T A, routed by each device.
    receive_rows: the most rows of a round.
    devices: R.
  """
  return rounds.nominal(pairs, receive_rows // devices * devices)


def resolve(name: str, platform: str) -> str:
  """The exchange that a name of the config means on a platform.

  Args:
    name: one of `EXCHANGES`.
    platform: cpu, gpu or tpu.

  Returns:
    `padded` or `ragged`. `auto` is `ragged` on a GPU, else `padded`.

  Raises:
    ValueError: for an unknown name or platform, or an exchange that cannot run there.
  """
  if name not in EXCHANGES:
    raise ValueError(f"exchange: expected one of {EXCHANGES}, got {name!r}")
  if platform not in PLATFORMS:
    raise ValueError(f"platform: expected one of {PLATFORMS}, got {platform!r}")
  if name == "auto":
    return "ragged" if platform == "gpu" else "padded"
  if name == "ragged" and platform != "gpu":
    raise ValueError(f"exchange: expected padded or auto on {platform}, got 'ragged'")
  return name
