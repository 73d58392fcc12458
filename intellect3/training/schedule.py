"""Learning-rate schedules: a linear warm-up, then constant, linear or cosine."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
"""Updates made so far (0 before the first) -> learning rate of the next."""


def constant(learning_rate: float, *, warmup_steps: int = 0, warmup_from: float = 0.0) -> Schedule:
  """`learning_rate` after the warm-up; see `_warmed_up` for the warm-up."""
  return _warmed_up(
    learning_rate, lambda count: jnp.full((), learning_rate), warmup_steps, warmup_from
  )


def linear(
  learning_rate: float,
  *,
  steps: int,
  final: float = 0.0,
  warmup_steps: int = 0,
  warmup_from: float = 0.0,
) -> Schedule:
  """Falls linearly from `learning_rate` after the warm-up to `final` after `steps` updates."""
  decay = _decay_steps(steps, warmup_steps, final)
  return _warmed_up(
    learning_rate,
    optax.linear_schedule(learning_rate, final, decay),
    warmup_steps,
    warmup_from,
  )


def cosine(
  learning_rate: float,
  *,
  steps: int,
  final: float = 0.0,
  warmup_steps: int = 0,
  warmup_from: float = 0.0,
) -> Schedule:
  """Falls along half a cosine from `learning_rate` to `final` after `steps` updates."""
  decay = _decay_steps(steps, warmup_steps, final)
  peak = _positive("learning_rate", learning_rate)

  def falling(count: jax.typing.ArrayLike) -> jax.Array:
    done = jnp.clip(jnp.asarray(count) / decay, 0.0, 1.0)
    return final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

  return _warmed_up(peak, falling, warmup_steps, warmup_from)


def _warmed_up(peak: float, then: Schedule, warmup_steps: int, warmup_from: float) -> Schedule:
  """Update k of the warm-up (1-based) has the rate from + (peak - from) * k / warmup_steps.

  So the first update is never lost to a rate of exactly 0, and update `warmup_steps` has the peak.
  """
  _positive("learning_rate", peak)
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps: expected at least 0, got {warmup_steps}")
  if not 0.0 <= warmup_from <= peak:
    raise ValueError(f"warmup_from: expected 0 to learning_rate = {peak}, got {warmup_from}")
  if warmup_steps == 0:
    return then

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    count = jnp.asarray(count)
    rising = warmup_from + (peak - warmup_from) * (count + 1) / warmup_steps
    return jnp.where(count < warmup_steps, rising, then(count - warmup_steps))

  return schedule


def _decay_steps(steps: int, warmup_steps: int, final: float) -> int:
  if steps <= warmup_steps:
    raise ValueError(f"steps: expected more than warmup_steps = {warmup_steps}, got {steps}")
  if final < 0.0:
    raise ValueError(f"final: expected at least 0, got {final}")
  return steps - warmup_steps


def _positive(field: str, value: float) -> float:
  if not value > 0.0:
    raise ValueError(f"{field}: expected more than 0, got {value}")
  return value
