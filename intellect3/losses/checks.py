"""What a loss may be given: checks at trace time that name the argument, expected and given.

Place in the ring: first lines of every loss. Shapes, dtypes and hyperparameters are known when a
loss is traced, so a misfit costs nothing and never reaches a device.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def tokens(loss_mask: jax.Array, **floating: jax.Array) -> None:
  """Checks that all are `[B, T]` of one shape, the mask bool and the others floating.

  Raises:
    ValueError: where they are not.
  """
  if jnp.ndim(loss_mask) != 2:
    raise ValueError(f"loss_mask: expected [B, T], got shape {list(jnp.shape(loss_mask))}")
  if loss_mask.dtype != jnp.bool_:
    raise ValueError(f"loss_mask: expected bool, got {loss_mask.dtype}")
  for name, array in floating.items():
    same_shape(name, array, loss_mask)
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name}: expected a floating dtype, got {array.dtype}")


def segment_ids(ids: jax.Array, like: jax.Array) -> None:
  """Checks that segment ids are integers of the shape of `like`.

  Raises:
    ValueError: where they are not.
  """
  same_shape("segment_ids", ids, like)
  integers("segment_ids", ids)


def integers(name: str, array: jax.Array) -> None:
  """Raises ValueError where an array is not of integers."""
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name}: expected an integer dtype, got {array.dtype}")


def same_shape(name: str, array: jax.Array, like: jax.Array) -> None:
  """Raises ValueError where the shapes differ."""
  if jnp.shape(array) != jnp.shape(like):
    raise ValueError(
      f"{name}: expected the shape of loss_mask {list(jnp.shape(like))}, "
      f"got {list(jnp.shape(array))}"
    )


def scalar(name: str, value: Any) -> None:
  """Raises ValueError where a value is not a scalar."""
  if jnp.ndim(value) != 0:
    raise ValueError(f"{name}: expected a scalar, got shape {list(jnp.shape(value))}")


def at_least(name: str, value: Any, least: float, *, above: bool = False) -> None:
  """Checks a hyperparameter; one that is traced (an annealed one, say) passes unchecked.

  Raises:
    ValueError: it is not a number, or NaN, or below `least` (not above it, with `above`).
  """
  if isinstance(value, jax.Array):
    scalar(name, value)
    return
  number = _number(value)
  if not (number > least if above else number >= least):
    raise ValueError(f"{name}: expected {'above' if above else 'at least'} {least}, got {value!r}")


def ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
  """Checks two bounds, `0 <= low <= high`.

  Raises:
    ValueError: they are not so.
  """
  at_least(low_name, low, 0.0)
  at_least(high_name, high, 0.0)
  if isinstance(low, jax.Array) or isinstance(high, jax.Array):
    return
  if low > high:
    raise ValueError(f"{low_name}: expected at most {high_name} ({high}), got {low}")


def at_most(name: str, value: Any, most: float) -> None:
  """Raises ValueError where a hyperparameter that is not traced is above `most`."""
  if not isinstance(value, jax.Array) and value > most:
    raise ValueError(f"{name}: expected at most {most}, got {value!r}")


def finite(name: str, value: Any) -> None:
  """Raises ValueError where a hyperparameter that is not traced is not a finite number."""
  if isinstance(value, jax.Array):
    scalar(name, value)
  elif not math.isfinite(_number(value)):
    raise ValueError(f"{name}: expected a finite number, got {value!r}")


def function(name: str, value: Any, which: str) -> None:
  """Raises ValueError where an argument is not a function."""
  if not callable(value):
    raise ValueError(f"{name}: expected a function, {which}, got {value!r}")


def flag(name: str, value: Any) -> None:
  """Raises ValueError where an option is not True or False."""
  if not isinstance(value, bool | np.bool_):
    raise ValueError(f"{name}: expected True or False, got {value!r}")


def count(name: str, value: Any) -> None:
  """Checks a global count: a scalar, and not negative where it is known at trace time.

  Raises:
    ValueError: it is not so.
  """
  scalar(name, value)
  if not isinstance(value, jax.core.Tracer) and not _number(value) >= 0:
    raise ValueError(f"{name}: expected a scalar of at least 0, got {value!r}")


def _number(value: Any) -> float:
  """A number of Python's or of a library's, also as an array without axes; else NaN."""
  if isinstance(value, bool) or not (isinstance(value, numbers.Real) or hasattr(value, "dtype")):
    return math.nan
  return float(value) if np.ndim(value) == 0 else math.nan
