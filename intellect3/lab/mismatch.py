"""How the server's policy differs from the trainer's at the same version.

Place in the ring: in the lab. A trainer and a server compute the same weights with other kernels,
other dtypes and, in a Mixture-of-Experts model, sometimes other experts; so the recorded
`inference_logprobs` are not the trainer's even without staleness. Each function maps the trainer's
logits to the server's, `mismatch(logits, key, amount) -> logits`, drawn anew for every version; an
amount of 0 is no mismatch at all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Mismatch = Callable[[jax.Array, jax.Array, jax.typing.ArrayLike], jax.Array]


def bfloat16(logits: jax.Array, key: jax.Array, amount: jax.typing.ArrayLike) -> jax.Array:
  """`amount` times the error of rounding logits to bfloat16 (2 ** -9 of a logit at most)."""
  del key
  return logits + amount * (logits.astype(jnp.bfloat16).astype(logits.dtype) - logits)


def gaussian(logits: jax.Array, key: jax.Array, amount: jax.typing.ArrayLike) -> jax.Array:
  """Normal noise on every logit; `amount` is its standard deviation in nats."""
  return logits + amount * jax.random.normal(key, logits.shape, logits.dtype)


def outliers(size: float) -> Mismatch:
  """A share `amount` of the logits is off by +-`size` nats, the others are exact.

  As where a router sends a token to other experts: rare, large, either way.

  Raises:
    ValueError: where the size is negative.
  """
  if size < 0:
    raise ValueError(f"size: expected at least 0, got {size}")

  def mismatch(logits: jax.Array, key: jax.Array, amount: jax.typing.ArrayLike) -> jax.Array:
    which, sign = jax.random.split(key)
    hit = jax.random.uniform(which, logits.shape) < amount
    return logits + jnp.where(hit, size * jax.random.rademacher(sign, logits.shape), 0)

  return mismatch
