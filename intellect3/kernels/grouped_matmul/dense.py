"""Every expert on every token: the oracle of the others.

Place in the ring: an implementation of `interface`.
"""

import jax
import jax.numpy as jnp


def expert_mlp(
  x_TD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  experts_TA: jax.Array,
  weights_TA: jax.Array,
) -> jax.Array:
  """See `interface.expert_mlp`; all hidden activations `[T, E, F]` are held in float32."""
  wide = jnp.float32
  some_T1 = jnp.any(experts_TA < gate_EDF.shape[0], axis=1, keepdims=True)
  x_TD = jnp.where(some_T1, x_TD, 0)
  chosen_TAE = experts_TA[:, :, None] == jnp.arange(gate_EDF.shape[0])
  weights_TE = jnp.sum(jnp.where(chosen_TAE, weights_TA.astype(wide)[:, :, None], 0), axis=1)
  gate_TEF = jnp.einsum("TD,EDF->TEF", x_TD, gate_EDF, preferred_element_type=wide)
  up_TEF = jnp.einsum("TD,EDF->TEF", x_TD, up_EDF, preferred_element_type=wide)
  hidden_TEF = jax.nn.silu(gate_TEF) * up_TEF * weights_TE[:, :, None]
  y_TD = jnp.einsum(
    "TEF,EFD->TD", hidden_TEF.astype(x_TD.dtype), down_EFD, preferred_element_type=wide
  )
  # Again, so that the cotangents of tokens without experts go nowhere either.
  return jnp.where(some_T1, y_TD, 0).astype(x_TD.dtype)
