"""The Mixture-of-Experts block: router, routed experts, shared experts.

Place in the ring: the second half of every layer after the dense ones. Which experts were chosen is
returned, not stored: load statistics and router replay read it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from intellect3.kernels import grouped_matmul
from intellect3.models import layers
from intellect3.models.config import ModelConfig


class Router(nn.Module):
  """Sigmoid router without auxiliary loss (DeepSeek-V3, arXiv 2412.19437; GLM-4.5).

    s = sigmoid(x W);  chosen = top A of s + b;  w = s_chosen / sum(s_chosen) * factor

  All in float32. The correction bias `b` decides who is chosen and never what they weigh; it gets
  no gradient.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns experts_TA int32 and weights_TA float32."""
    config = self.config
    shape = (config.embed_dim, config.num_experts)
    kernel_DE = layers.parameter(
      self, "kernel", layers.kernel_init(), shape, ("embed", None), config.param_dtype
    )
    zeros = nn.initializers.zeros_init()
    bias_E = layers.parameter(self, "correction_bias", zeros, shape[1:], (None,), "float32")
    logits_TE = jnp.dot(
      x_TD.astype(jnp.float32),
      kernel_DE.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    scores_TE = jax.nn.sigmoid(logits_TE)
    choice_TE = jax.lax.stop_gradient(scores_TE + bias_E.astype(jnp.float32))
    _, experts_TA = jax.lax.top_k(choice_TE, config.num_experts_per_token)
    weights_TA = jnp.take_along_axis(scores_TE, experts_TA, axis=1)
    if config.norm_topk_prob:
      weights_TA = weights_TA / (jnp.sum(weights_TA, axis=1, keepdims=True) + 1e-20)
    return experts_TA, weights_TA * config.routed_scaling_factor


class Experts(nn.Module):
  """The routed experts' MLPs, stacked over the experts."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_TD: jax.Array, experts_TA: jax.Array, weights_TA: jax.Array) -> jax.Array:
    config = self.config
    dims = {
      "experts": config.num_experts,
      "embed": config.embed_dim,
      "mlp": config.expert_mlp_dim,
    }

    def stack(name: str, axes: tuple[str, ...], scale: float = 1.0) -> jax.Array:
      init = layers.kernel_init(scale, batch_axis=(0,))
      shape = tuple(dims[axis] for axis in axes)
      return layers.parameter(self, name, init, shape, axes, config.param_dtype).astype(
        config.dtype
      )

    wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    return grouped_matmul.expert_mlp(
      x_TD,
      stack("gate", wide),
      stack("up", wide),
      stack("down", narrow, layers.residual_scale(config)),
      experts_TA,
      weights_TA,
      implementation=config.grouped_matmul,
      block_size=config.expert_block_size,
    )


class MoE(nn.Module):
  """Routed experts plus shared ones."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the block's output [B, T, D] and experts_BTA int32."""
    config = self.config
    x_TD = x_BTD.reshape(-1, config.embed_dim)
    experts_TA, weights_TA = Router(config, name="router")(x_TD)
    out_BTD = Experts(config, name="experts")(x_TD, experts_TA, weights_TA).reshape(x_BTD.shape)
    if config.num_shared_experts:
      width = config.num_shared_experts * config.expert_mlp_dim
      out_BTD = out_BTD + layers.MLP(config, width, name="shared")(x_BTD)
    return out_BTD, experts_TA.reshape(*x_BTD.shape[:2], -1)
