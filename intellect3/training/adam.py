"""Adam's moments in fewer bits.

Place in the ring: under `training.optimizer`; optax does the arithmetic.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

DTYPES = ("float32", "bfloat16")


def scale_by_adam(
  *,
  b1: float,
  b2: float,
  eps: float,
  first_moment_dtype: str | None = None,
  second_moment_dtype: str | None = None,
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` whose two moments are kept in dtypes of their own.

  Both are computed in float32. The first is rounded to the nearest, the second at
  random, up as often as exactness asks (Gupta et al., arXiv 1502.02551): with b2 = 0.999 a moment
  shrinks by a thousandth a step at most, a quarter of what separates two bfloat16 numbers, so
  that to the nearest it could grow but never fall. The random bits follow from the step and
  the parameter's place in the tree, not from the layout: the same state gives the same bits.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    first_moment_dtype: float32, bfloat16 or None: as the parameters.
    second_moment_dtype: the same.

  Returns:
    The transformation; its state is `optax.ScaleByAdamState`.

  Raises:
    ValueError: for another dtype.
  """
  fields = {"first_moment_dtype": first_moment_dtype, "second_moment_dtype": second_moment_dtype}
  for field, dtype in fields.items():
    if dtype not in (None, *DTYPES):
      raise ValueError(f"{field}: expected None or one of {DTYPES}, got {dtype!r}")
  inner = optax.scale_by_adam(b1, b2, eps)
  if first_moment_dtype is None and second_moment_dtype is None:
    return inner

  def init(params: Any) -> optax.ScaleByAdamState:
    state = inner.init(params)
    first, second = first_moment_dtype, second_moment_dtype
    return state._replace(mu=optax.tree.cast(state.mu, first), nu=optax.tree.cast(state.nu, second))

  def update(
    updates: Any, state: optax.ScaleByAdamState, params: Any = None
  ) -> tuple[Any, optax.ScaleByAdamState]:
    # Wide before the decay too: in bfloat16 0.9 is 0.8984.
    moments = optax.tree.cast((state.mu, state.nu), "float32")
    updates, wide = inner.update(updates, state._replace(mu=moments[0], nu=moments[1]), params)
    nu = wide.nu
    if second_moment_dtype == "bfloat16":
      key = jax.random.key(wide.count)
      leaves = jax.tree.leaves(nu)
      rounded = [round_at_random(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
      nu = jax.tree.unflatten(jax.tree.structure(nu), rounded)
    mu = optax.tree.cast_like(wide.mu, state.mu)
    return updates, wide._replace(mu=mu, nu=optax.tree.cast_like(nu, state.nu))

  return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
  """A bfloat16 neighbour of each entry, the nearer one the likelier: exact on average.

  Args:
    x: float32, finite.
    key: a jax.random key.

  Returns:
    bfloat16, the shape of x. What is a bfloat16 number already stays.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = bits + jax.random.bits(key, x.shape, jnp.uint16)
  return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
