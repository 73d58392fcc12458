"""How the server's policy differs from the trainer's at the same version.

Place in the ring: in the lab. A trainer and a server compute the same weights with other kernels,
other dtypes and, in a Mixture-of-Experts model, sometimes other experts; so the recorded
`inference_logprobs` are not the trainer's even without staleness. Each function maps the trainer's
logits to the server's: `mismatch(logits_MTPV, key) -> logits_MTPV`, drawn anew for every version.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Mismatch = Callable[[jax.Array, jax.Array], jax.Array]


def none(logits_MTPV: jax.Array, key: jax.Array) -> jax.Array:
  """The server computes what the trainer computes."""
  del key
  return logits_MTPV


def bfloat16(logits_MTPV: jax.Array, key: jax.Array) -> jax.Array:
  """Logits rounded to bfloat16: relative errors up to 2 ** -9, so tiny where logits are small."""
  del key
  return logits_MTPV.astype(jnp.bfloat16).astype(logits_MTPV.dtype)


def gaussian(scale: float) -> Mismatch:
  """Normal noise of this standard deviation, in nats, on every logit."""
  if scale < 0:
    raise ValueError(f"scale: expected at least 0, got {scale}")

  def mismatch(logits_MTPV: jax.Array, key: jax.Array) -> jax.Array:
    return logits_MTPV + scale * jax.random.normal(key, logits_MTPV.shape, logits_MTPV.dtype)

  return mismatch


def outliers(share: float, size: float) -> Mismatch:
  """A share of the logits is off by +-`size` nats, the others are exact.

  As where a router sends a token to other experts: rare, large, either way.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share: expected a number in [0, 1], got {share}")

  def mismatch(logits_MTPV: jax.Array, key: jax.Array) -> jax.Array:
    which, sign = jax.random.split(key)
    hit = jax.random.bernoulli(which, share, logits_MTPV.shape)
    shift = size * jax.random.rademacher(sign, logits_MTPV.shape, logits_MTPV.dtype)
    return jnp.where(hit, logits_MTPV + shift, logits_MTPV)

  return mismatch
