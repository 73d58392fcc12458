"""The small parts of a transformer layer: projections, norms, rotary embedding, dense MLP.

Place in the ring: `attention`, `moe` and `transformer` are built from these. Parameters carry
logical axis names; the sharding tables map them to mesh axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from intellect3.models.config import ModelConfig


def kernel_init(scale: float = 1.0, batch_axis: Sequence[int] = ()) -> nn.initializers.Initializer:
  """Normal with standard deviation `scale / sqrt(fan in)`."""
  return nn.initializers.variance_scaling(
    scale**2, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=batch_axis
  )


def residual_scale(config: ModelConfig) -> float:
  """Scale of what writes to the residual stream, `1 / sqrt(2 L)` (GPT-2), against its growth."""
  return (2 * config.num_layers) ** -0.5


def parameter(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  dtype: str,
) -> jax.Array:
  """Declares a parameter of a module, with one logical axis name (or None) per dimension."""
  boxed: Any = nn.with_logical_partitioning(init, axes)
  return module.param(name, boxed, shape, jnp.dtype(dtype))


class Projection(nn.Module):
  """A linear map of the last `inputs` axes to `features`.

  (Not `nn.DenseGeneral`: it initialises a flattened kernel, to which the names of its axes do not
  apply once a mesh is set.)

  Attributes:
    config: for the dtypes.
    features: sizes of the output axes.
    axes: logical names of the kernel's axes, inputs first.
    inputs: how many axes are contracted.
    scale: of the initial kernel, as in `kernel_init`.
    use_bias: whether a bias is added.
  """

  config: ModelConfig
  features: tuple[int, ...]
  axes: tuple[str, ...]
  inputs: int = 1
  scale: float = 1.0
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config, inputs = self.config, self.inputs
    sizes = x.shape[-inputs:]
    init = nn.initializers.normal(self.scale / math.prod(sizes) ** 0.5)
    shape = (*sizes, *self.features)
    kernel = parameter(self, "kernel", init, shape, self.axes, config.param_dtype)
    contracted = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    y = jax.lax.dot_general(x, kernel.astype(config.dtype), (contracted, ((), ())))
    if self.use_bias:
      zeros = nn.initializers.zeros_init()
      bias = parameter(self, "bias", zeros, self.features, self.axes[inputs:], config.param_dtype)
      y = y + bias.astype(config.dtype)
    return y


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (arXiv 1910.07467)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones = nn.initializers.ones_init()
    scale = parameter(self, "scale", ones, x.shape[-1:], (None,), self.config.param_dtype)
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.rms_norm_eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_angles(config: ModelConfig, positions_BT: jax.Array) -> jax.Array:
  """Angles [B, T, rotary_dim / 2], float32: `position * theta ** (-2 i / rotary_dim)`."""
  exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / max(config.rotary_dim, 1)
  return positions_BT[:, :, None].astype(jnp.float32) / config.rope_theta**exponents


def rotate(x_BTNH: jax.Array, angles_BTR: jax.Array) -> jax.Array:
  """Rotates the leading dims of each head, half against half; the others pass (arXiv 2104.09864).

  Dim i of the first R turns with dim i + R, the layout of Hugging Face checkpoints.
  """
  half = angles_BTR.shape[-1]
  cos, sin = jnp.cos(angles_BTR)[:, :, None], jnp.sin(angles_BTR)[:, :, None]
  first, second, passed = jnp.split(x_BTNH, [half, 2 * half], axis=-1)
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate([*(part.astype(x_BTNH.dtype) for part in rotated), passed], axis=-1)


class MLP(nn.Module):
  """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202), `width` wide."""

  config: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    config, axes = self.config, ("embed", "mlp")
    gate_BTF = Projection(config, (self.width,), axes, name="gate")(x_BTD)
    up_BTF = Projection(config, (self.width,), axes, name="up")(x_BTD)
    scale = residual_scale(config)
    down = Projection(config, (config.embed_dim,), axes[::-1], scale=scale, name="down")
    return down(jax.nn.silu(gate_BTF) * up_BTF)
