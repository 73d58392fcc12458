"""The Mixture-of-Experts block: router, routed experts, shared experts.

Place in the ring: the second half of every layer after the dense ones. Which experts were chosen is
returned, not stored: load statistics and router replay read it.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from intellect3.kernels import expert_parallel, grouped_matmul
from intellect3.models import layers
from intellect3.models.config import ModelConfig
from intellect3.models.parallel import ONE_DEVICE, Parallel


class Choice(NamedTuple):
  """Attributes: experts, int32 [..., A]; agreed, bool [...]: whether the own choice was the
  replayed one, as sets; None where nothing was replayed."""

  experts: jax.Array
  agreed: jax.Array | None


class Router(nn.Module):
  """Chooses each token's experts, and says what they weigh.

    s = sigmoid(x W)  or  softmax(x W);  chosen = top A of s + b;
    w = s_chosen / sum(s_chosen) * factor

  Sigmoid with the correction bias `b` and no auxiliary loss: DeepSeek-V3 (arXiv 2412.19437),
  GLM-4.5. Softmax without it: Qwen3 (arXiv 2505.09388). With groups, only experts of the best
  groups can be chosen; a group's score is the sum of its two best s + b (DeepSeek-V3). All in
  float32. The bias decides who is chosen and never what they weigh; it gets no gradient.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x_TD: jax.Array, replayed_TA: jax.Array | None = None
  ) -> tuple["Choice", jax.Array]:
    """Scores the experts of every token.

    Args:
      x_TD: floating [T, D].
      replayed_TA: int32 [T, A], a choice to take instead of the own one; a token with a negative
        entry chooses for itself. The weights are those of the own scores in any case.

    Returns:
      The choice, and weights_TA float32.
    """
    config = self.config
    shape = (config.embed_dim, config.num_experts)
    # On every device: it works in float32, and float32 weights do not travel.
    kernel_DE = layers.parameter(
      self, "kernel", layers.kernel_init(), shape, (None, None), config.param_dtype
    )
    logits_TE = jnp.dot(
      x_TD.astype(jnp.float32),
      kernel_DE.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    to_scores = jax.nn.sigmoid if config.router_scores == "sigmoid" else jax.nn.softmax
    scores_TE = to_scores(logits_TE)
    choice_TE = jax.lax.stop_gradient(scores_TE)
    if config.router_bias:
      zeros = nn.initializers.zeros_init()
      choice_TE += layers.parameter(self, "correction_bias", zeros, shape[1:], (None,), "float32")
    experts_TA = _choose(config, choice_TE)
    agreed_T = None
    if replayed_TA is not None:
      agreed_T = jnp.all(jnp.sort(experts_TA, axis=1) == jnp.sort(replayed_TA, axis=1), axis=1)
      own_T1 = jnp.any(replayed_TA < 0, axis=1, keepdims=True)
      experts_TA = jnp.where(own_T1, experts_TA, replayed_TA)
    weights_TA = jnp.take_along_axis(scores_TE, experts_TA, axis=1)
    if config.norm_topk_prob:
      weights_TA = weights_TA / (jnp.sum(weights_TA, axis=1, keepdims=True) + 1e-20)
    return Choice(experts_TA, agreed_T), weights_TA * config.routed_scaling_factor


def _choose(config: ModelConfig, choice_TE: jax.Array) -> jax.Array:
  """The top A experts of every token, out of its best groups."""
  if config.num_groups_per_token < config.num_expert_groups:
    tokens, groups = choice_TE.shape[0], config.num_expert_groups
    choice_TGX = choice_TE.reshape(tokens, groups, -1)
    best_TG2, _ = jax.lax.top_k(choice_TGX, 2)
    _, groups_TC = jax.lax.top_k(jnp.sum(best_TG2, axis=2), config.num_groups_per_token)
    open_TG = jnp.any(groups_TC[:, :, None] == jnp.arange(groups), axis=1)
    choice_TE = jnp.where(open_TG[:, :, None], choice_TGX, -jnp.inf).reshape(tokens, -1)
  return jax.lax.top_k(choice_TE, config.num_experts_per_token)[1]


class Experts(nn.Module):
  """The routed experts' MLPs, stacked over the experts: this device's experts of every token of its
  group, and of those this device's part of their width."""

  config: ModelConfig
  parallel: Parallel = ONE_DEVICE

  @nn.compact
  def __call__(
    self, x_TD: jax.Array, experts_TA: jax.Array, weights_TA: jax.Array, valid_T: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    config, parallel = self.config, self.parallel
    dims = {
      "experts": config.num_experts // parallel.parts(parallel.experts),
      "embed": config.embed_dim,
      "mlp": config.expert_mlp_dim // parallel.parts(parallel.mlp),
    }

    def stack(name: str, axes: tuple[str, ...], scale: float = 1.0) -> jax.Array:
      init = layers.kernel_init(scale, batch_axis=(0,))
      shape = tuple(dims[axis] for axis in axes)
      return layers.parameter(self, name, init, shape, axes, config.param_dtype).astype(
        config.dtype
      )

    wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    stacks = (
      stack("gate", wide),
      stack("up", wide),
      stack("down", narrow, layers.residual_scale(config)),
    )
    kernel: Any = {
      "implementation": config.grouped_matmul,
      "block_size": config.expert_block_size,
    }
    if parallel.experts is None:
      out_TD = grouped_matmul.expert_mlp(x_TD, *stacks, experts_TA, weights_TA, **kernel)
      return out_TD, jnp.zeros((), jnp.int32)
    return expert_parallel.expert_parallel_mlp(
      x_TD,
      *stacks,
      experts_TA,
      weights_TA,
      valid_T,
      axis_name=parallel.experts,
      exchange=config.expert_exchange,
      receive_rows=config.expert_receive_rows,
      **kernel,
    )


class MoE(nn.Module):
  """Routed experts plus shared ones; where widths are divided, this device's share of a sum."""

  config: ModelConfig
  parallel: Parallel = ONE_DEVICE

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, valid_BT: jax.Array, replayed_BTA: jax.Array | None = None
  ) -> tuple[jax.Array, Choice, jax.Array]:
    """Runs the block.

    Args:
      x_BTD: floating.
      valid_BT: bool; what is no token does not travel between devices.
      replayed_BTA: int32, or None.

    Returns:
      The output [B, T, D]; the choice, [B, T, ...], see `Router`; int32 [], rounds of the exchange
      between devices beyond those of an even load.
    """
    config, parallel = self.config, self.parallel
    x_TD = x_BTD.reshape(-1, config.embed_dim)
    if replayed_BTA is not None:
      replayed_BTA = replayed_BTA.reshape(x_TD.shape[0], -1)
    choice, weights_TA = Router(config, name="router")(x_TD, replayed_BTA)
    experts = Experts(config, parallel, name="experts")
    out_TD, extra_rounds = experts(x_TD, choice.experts, weights_TA, valid_BT.reshape(-1))
    out_BTD = out_TD.reshape(x_BTD.shape)
    if config.num_shared_experts:
      width = config.num_shared_experts * config.expert_mlp_dim // parallel.parts(parallel.mlp)
      out_BTD = out_BTD + layers.MLP(config, width, name="shared")(x_BTD)
    rows = x_BTD.shape[:2]
    choice = jax.tree.map(lambda leaf: leaf.reshape(*rows, *leaf.shape[1:]), choice)
    return out_BTD, choice, extra_rounds
