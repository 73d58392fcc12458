"""What attention promises, and which implementation keeps the promise where.

Place in the ring: inside the model, in training and scoring. What a query may see is said by
positions and segment ids alone.
"""

import importlib.util

import chex
import jax

from intellect3.kernels.attention import blockwise, plain, tokamax
from intellect3.kernels.platform import PLATFORMS, traced_platform

IMPLEMENTATIONS = ("plain", "blockwise", "tokamax", "auto")


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  q_positions_BT: jax.Array,
  kv_positions_BS: jax.Array,
  q_segment_ids_BT: jax.Array,
  kv_segment_ids_BS: jax.Array,
  scale: float,
  implementation: str = "plain",
  q_starts: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention; a query sees the keys of its own segment at positions up to its own.

  Query head n reads key/value head n // (N / K) (GQA, arXiv 2305.13245).

  Args:
    q_BTNH: floating [B, T, N, H].
    k_BSKH: floating [B, S, K, H]; K divides N.
    v_BSKH: floating [B, S, K, H].
    q_positions_BT: integer [B, T], position of each query within its segment.
    kv_positions_BS: integer [B, S].
    q_segment_ids_BT: integer [B, T]; 0 is padding: such a query sees nothing and gets zeros.
    kv_segment_ids_BS: integer [B, S]; a key of segment 0 is seen by nobody.
    scale: factor of the scores, usually H ** -0.5.
    implementation: `plain` holds all scores [B, N, T, S] in float32; `blockwise` a block of them,
      and skips what a packed row's blocks cannot see; `tokamax` runs kernels for NVIDIA GPUs, on
      packed rows of 16-bit floats only; `auto` is what `resolve` says of the platform traced for.
    q_starts: integer [P], where the queries are only pieces of the rows that the keys are: P equal,
      contiguous ones, beginning at these tokens. It changes no result, only how work is cut.

  Returns:
    [B, T, N, H] in the dtype of the values. Reverse-mode differentiable in q, k and v.

  Raises:
    ValueError: for an unknown implementation, one that cannot run on the platform traced for or
      with these arrays, or heads that do not divide.
  """
  platform = traced_platform()
  name = resolve(implementation, platform, str(q_BTNH.dtype))
  chex.assert_rank([q_BTNH, k_BSKH, v_BSKH], 4)
  chex.assert_equal_shape([k_BSKH, v_BSKH])
  batch, queries, heads, _ = q_BTNH.shape
  keys, kv_heads = k_BSKH.shape[1:3]
  if heads % kv_heads:
    raise ValueError(f"num_heads: expected a multiple of {kv_heads} (kv heads), got {heads}")
  chex.assert_shape([q_positions_BT, q_segment_ids_BT], (batch, queries))
  chex.assert_shape([kv_positions_BS, kv_segment_ids_BS], (batch, keys))
  ids = {
    "q_positions_BT": q_positions_BT,
    "kv_positions_BS": kv_positions_BS,
    "q_segment_ids_BT": q_segment_ids_BT,
    "kv_segment_ids_BS": kv_segment_ids_BS,
  }
  pieces = 1 if q_starts is None else q_starts.shape[0]
  if queries % pieces:
    raise ValueError(f"q_starts: expected pieces that divide {queries} queries, got {pieces}")
  if name == "blockwise":
    mesh = jax.sharding.get_abstract_mesh()
    sharded = not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual
    plan = blockwise.plan(platform, heads // kv_heads, sharded=sharded)
    return blockwise.attend(q_BTNH, k_BSKH, v_BSKH, **ids, scale=scale, plan=plan, pieces=pieces)
  if name == "tokamax":
    return tokamax.attend(q_BTNH, k_BSKH, v_BSKH, **ids, scale=scale, q_starts=q_starts)
  return plain.attend(q_BTNH, k_BSKH, v_BSKH, **ids, scale=scale)


def resolve(name: str, platform: str, dtype: str = "bfloat16") -> str:
  """The implementation that a name of the config means on a platform.

  Args:
    name: one of `IMPLEMENTATIONS`.
    platform: cpu, gpu or tpu.
    dtype: of the computation.

  Returns:
    `plain`, `blockwise` or `tokamax`. `auto` is `tokamax` for 16-bit floats on a GPU where that
    package is installed, else `blockwise`.

  Raises:
    ValueError: for an unknown name or platform, or an implementation that cannot run there.
  """
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"attention: expected one of {IMPLEMENTATIONS}, got {name!r}")
  if platform not in PLATFORMS:
    raise ValueError(f"platform: expected one of {PLATFORMS}, got {platform!r}")
  installed = importlib.util.find_spec("tokamax") is not None
  if name == "auto":
    fits = platform == "gpu" and installed and dtype in ("bfloat16", "float16")
    return "tokamax" if fits else "blockwise"
  if name == "tokamax" and platform != "gpu":
    raise ValueError(f"attention: expected plain, blockwise or auto on {platform}, got 'tokamax'")
  if name == "tokamax" and not installed:
    raise ValueError(
      "attention: expected plain, blockwise or auto, got 'tokamax', which is not installed "
      "(pip install 'intellect3[gpu-kernels]')"
    )
  return name
