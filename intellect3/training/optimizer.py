"""Optimizers: AdamW, and Muon for the hidden matrices with AdamW for everything else.

Which parameter gets which update follows from its name (see `ROLES`), so that an optimizer can be
configured before a model exists. A name that no rule knows is an error. The router's correction
bias (`e_score_correction_bias`) is frozen: no gradient, no decay, no optimizer state, and it takes
no part in the gradient's norm.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from intellect3.training import adam, schedule
from intellect3.training import muon as directions
from intellect3.training.schedule import Schedule

Path = Sequence[Any]
Role = Literal["matrix", "table", "router", "vector", "frozen"]

ROLES: dict[tuple[str, ...], Role] = {
  ("embedding",): "table",
  ("head",): "table",
  ("scale",): "vector",
  ("bias",): "vector",
  ("correction_bias",): "frozen",
  ("router", "kernel"): "router",
  **dict.fromkeys(directions.MATRICES, "matrix"),
}
"""The last names of a parameter's path (two before one) -> its role."""


class Optimizer(NamedTuple):
  """An optax gradient transformation that also tells its learning rate.

  Attributes:
    init: params -> state.
    update: (gradients, state, params) -> (updates, state).
    learning_rate: updates made so far -> the (first) learning rate of the next.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]
  learning_rate: Schedule


def adamw(
  *,
  learning_rate: float | Schedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float | None = 1.0,
  first_moment_dtype: str | None = None,
  second_moment_dtype: str | None = None,
) -> Optimizer:
  """AdamW (Loshchilov and Hutter, arXiv 1711.05101) after clipping by the global norm.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: times the learning rate, on matrices, tables and routers only: not on norms and
      biases.
    clip_norm: largest global norm of the gradient; None does not clip.
    first_moment_dtype: in which AdamW's first moment is kept, float32 or bfloat16; None keeps it as
      the parameters.
    second_moment_dtype: of the second moment; see `adam.scale_by_adam` for how it is rounded.

  Returns:
    The optimizer.

  Raises:
    ValueError: a value out of its range.
  """
  rate = _schedule("learning_rate", learning_rate)
  _check_adam(b1, b2, eps, weight_decay)
  scaled = adam.scale_by_adam(
    b1=b1,
    b2=b2,
    eps=eps,
    first_moment_dtype=first_moment_dtype,
    second_moment_dtype=second_moment_dtype,
  )
  update = optax.partition(
    {
      **_adam(scaled, rate, weight_decay),
      "frozen": optax.set_to_zero(),
    },
    lambda params: _labels(params, {"vector": "plain", "frozen": "frozen"}, "decayed"),
  )
  return _clipped(update, clip_norm, rate)


def muon(
  *,
  learning_rate: float | Schedule,
  momentum: float = 0.95,
  newton_schulz_steps: int = 5,
  newton_schulz_dtype: str | None = None,
  momentum_dtype: str | None = None,
  consistent_rms: float = 0.2,
  adam_learning_rate: float | Schedule | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float | None = 1.0,
  first_moment_dtype: str | None = None,
  second_moment_dtype: str | None = None,
) -> Optimizer:
  """Muon on the hidden matrices, AdamW on embedding, head, router, norms and biases.

  Muon: Jordan et al., 2024, with Nesterov momentum and five Newton-Schulz steps. Every matrix of a
  stack `[layers, ...]` or `[layers, experts, ...]` is orthogonalised on its own; heads and head_dim
  count as one dimension. Where the parameters are sharded, `training.muon` brings whole matrices to
  devices and shares the work out.
  Updates are scaled by `consistent_rms * sqrt(max(fan_in, fan_out))` so that a learning rate found
  for AdamW fits (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982).

  Args:
    learning_rate: of Muon, a number or a schedule.
    momentum: decay of Muon's momentum.
    newton_schulz_steps: steps of the orthogonalisation.
    newton_schulz_dtype: in which matrices are orthogonalised, and travel for it: float32 or
      bfloat16; None takes float32 on CPUs and bfloat16 elsewhere.
    momentum_dtype: in which Muon's momentum is kept; None keeps it as the parameters.
    consistent_rms: root mean square of an update at learning rate 1.
    adam_learning_rate: of AdamW; None takes `learning_rate`.
    b1: AdamW's decay of the first moment.
    b2: AdamW's decay of the second moment.
    eps: AdamW's.
    weight_decay: times the learning rate, on all but norms and biases.
    clip_norm: largest global norm of the gradient; None does not clip.
    first_moment_dtype: in which AdamW's first moment is kept, float32 or bfloat16; None keeps it as
      the parameters.
    second_moment_dtype: of the second moment; see `adam.scale_by_adam` for how it is rounded.

  Returns:
    The optimizer.

  Raises:
    ValueError: a value out of its range.
  """
  rate = _schedule("learning_rate", learning_rate)
  adam_rate = rate
  if adam_learning_rate is not None:
    adam_rate = _schedule("adam_learning_rate", adam_learning_rate)
  _check_adam(b1, b2, eps, weight_decay)
  _check_range("momentum", momentum, 0.0, 1.0)
  if newton_schulz_steps < 1:
    raise ValueError(f"newton_schulz_steps: expected at least 1, got {newton_schulz_steps}")
  dtypes = {"newton_schulz_dtype": newton_schulz_dtype, "momentum_dtype": momentum_dtype}
  for field, dtype in dtypes.items():
    if dtype not in (None, *directions.DTYPES):
      raise ValueError(f"{field}: expected None or one of {directions.DTYPES}, got {dtype!r}")
  if not consistent_rms > 0.0:
    raise ValueError(f"consistent_rms: expected more than 0, got {consistent_rms}")
  scaled = adam.scale_by_adam(
    b1=b1,
    b2=b2,
    eps=eps,
    first_moment_dtype=first_moment_dtype,
    second_moment_dtype=second_moment_dtype,
  )
  update = optax.partition(
    {
      "muon": optax.chain(
        directions.scale_by_muon(
          momentum=momentum,
          steps=newton_schulz_steps,
          consistent_rms=consistent_rms,
          dtype=newton_schulz_dtype,
          momentum_dtype=momentum_dtype,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
      ),
      **_adam(scaled, adam_rate, weight_decay),
      "frozen": optax.set_to_zero(),
    },
    lambda params: _labels(
      params, {"matrix": "muon", "vector": "plain", "frozen": "frozen"}, "decayed"
    ),
  )
  return _clipped(update, clip_norm, rate)


def role(path: Path) -> Role:
  """What a parameter is, by the names of its path.

  Args:
    path: the keys from the root of the parameters to the leaf, as
      `jax.tree_util.tree_map_with_path` gives them.

  Raises:
    ValueError: a name that `ROLES` does not know.
  """
  names = directions.names(path)
  for length in (2, 1):
    found = ROLES.get(names[-length:])
    if found is not None:
      return found
  raise ValueError(f"params: expected a name that training.optimizer knows, got {'/'.join(names)}")


def without_frozen(tree: Any) -> Any:
  """The tree with zeros in place of the frozen parameters."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.zeros_like(leaf) if role(path) == "frozen" else leaf, tree
  )


def _adam(
  scaled: optax.GradientTransformation, rate: Schedule, weight_decay: float
) -> dict[str, optax.GradientTransformation]:
  """AdamW with and without its decay, by label."""
  by_rate = optax.scale_by_learning_rate(rate)
  decay = optax.add_decayed_weights(weight_decay)
  return {"decayed": optax.chain(scaled, decay, by_rate), "plain": optax.chain(scaled, by_rate)}


def _labels(params: Any, labels: dict[str, str], otherwise: str) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: labels.get(role(path), otherwise), params)


def _clipped(
  update: optax.GradientTransformation, clip_norm: float | None, rate: Schedule
) -> Optimizer:
  if clip_norm is not None and not clip_norm > 0.0:
    raise ValueError(f"clip_norm: expected more than 0 or None, got {clip_norm}")
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  zeroed = optax.stateless(lambda updates, _: without_frozen(updates))
  chain = optax.chain(zeroed, clip, update)
  return Optimizer(chain.init, chain.update, rate)


def _schedule(field: str, rate: float | Schedule) -> Schedule:
  if callable(rate):
    return rate
  if not rate > 0.0:
    raise ValueError(f"{field}: expected more than 0, got {rate}")
  return schedule.constant(rate)


def _check_adam(b1: float, b2: float, eps: float, weight_decay: float) -> None:
  _check_range("b1", b1, 0.0, 1.0)
  _check_range("b2", b2, 0.0, 1.0)
  if not eps > 0.0:
    raise ValueError(f"eps: expected more than 0, got {eps}")
  if not weight_decay >= 0.0:
    raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")


def _check_range(field: str, value: float, low: float, high: float) -> None:
  if not low <= value < high:
    raise ValueError(f"{field}: expected at least {low} and less than {high}, got {value}")
