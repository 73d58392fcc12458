"""The aux-loss-free update of the routers' correction bias: experts that had less get more.

Place in the ring: inside the train step, after the optimizer, which leaves the bias alone. The bias
decides which experts are chosen and never what they weigh, so the loss has no say in it; the load
of the step just made has.
"""

from typing import Any

import jax
import jax.numpy as jnp

from intellect3.models.config import ModelConfig
from intellect3.training import optimizer as optimizers


def check(config: ModelConfig, rate: float) -> None:
  """Raises ValueError where a rate is not fit, or the model has no bias to update.

  Args:
    config: the model.
    rate: of `update`; 0 leaves the bias frozen, in any model.
  """
  if not 0.0 <= rate < float("inf"):
    raise ValueError(f"router_bias_rate: expected a number of at least 0, got {rate}")
  if rate and not (config.router_bias and config.num_moe_layers):
    have = "no router bias" if config.num_moe_layers else "no experts"
    raise ValueError(
      f"router_bias_rate: expected 0 for a model with {have} ({config.family}), got {rate}"
    )


def update(params: Any, load_LE: jax.Array, rate: float) -> Any:
  """One update of every router's correction bias.

    b_i <- b_i + rate * sign(mean_j load_j - load_i)

  DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; Wang et al., arXiv 2408.15664). The load is that of
  the whole step: all micro-batches, all devices. It counts the experts that computed a token, so
  under router replay those of the servers, up to `max_off_policy_steps` older.

  Args:
    params: the model's parameters; leaves named `correction_bias` are [M, E].
    load_LE: float32 [M, E], tokens that each expert computed in this step.
    rate: the step of the bias, in units of router scores.

  Returns:
    The parameters with other biases, float32; all else is the same.
  """
  violation_LE = jnp.mean(load_LE, axis=1, keepdims=True) - load_LE

  def leaf(path: Any, value: jax.Array) -> jax.Array:
    if optimizers.role(path) != "frozen":
      return value
    return value + jnp.asarray(rate, value.dtype) * jnp.sign(violation_LE).astype(value.dtype)

  return jax.tree_util.tree_map_with_path(leaf, params)
