"""The trainer's state: all that a step changes and a checkpoint must hold of the model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from intellect3.training import optimizer as optimizers

Params = Any
"""A nested dict of arrays, as `models.transformer.init` makes it."""


class TrainState(NamedTuple):
  """What a train step takes and gives.

  Attributes:
    step: int32[], steps done; the parameters are weights v`step`.
    params: the model's parameters, float32.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  params: Params
  opt_state: Any


def create(params: Params, optimizer: optimizers.Optimizer) -> TrainState:
  """The state before the first step. Pure: `jax.jit` it with `out_shardings` to make it sharded."""
  params = jax.tree.map(jnp.asarray, params)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract(
  make_params: Callable[[], Params], optimizer: optimizers.Optimizer, shardings: Any = None
) -> TrainState:
  """The state's shapes and dtypes (and shardings, a TrainState of them, where given).

  Args:
    make_params: makes the parameters; only traced.
    optimizer: the run's.
    shardings: a TrainState of `jax.sharding.Sharding`, or None.

  Returns:
    A TrainState of `jax.ShapeDtypeStruct`, the target of a checkpoint's restore.
  """
  shapes = jax.eval_shape(lambda: create(make_params(), optimizer))
  if shardings is None:
    return shapes
  return jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
    shapes,
    shardings,
  )
