"""Where the train state lies on the mesh, and the step compiled for it.

The tables of `sharding.rules` say it for the parameters; the optimizer's moments lie as their
parameters do, and everything else is replicated. One device is a mesh like any other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.sharding import specs
from intellect3.sharding.rules import Rules
from intellect3.training import state as states
from intellect3.training.optimizer import Optimizer


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> Any:
  """The sharding of every parameter of a model, a tree of NamedSharding; raises as below."""
  shapes, axes = transformer.abstract(config)
  return specs.tree_shardings(axes, shapes, mesh, rules)


def state_shardings(config: ModelConfig, optimizer: Optimizer, mesh: Mesh, rules: Rules) -> Any:
  """The sharding of every array of the train state.

  Args:
    config: the model.
    optimizer: the run's.
    mesh: the mesh.
    rules: logical axis -> mesh axis.

  Returns:
    A TrainState of NamedSharding.

  Raises:
    ValueError: a parameter does not divide over its mesh axes.
  """
  shapes, _ = transformer.abstract(config)
  params = param_shardings(config, mesh, rules)
  by_path = {
    (_names(path), shape.shape): sharding
    for (path, shape), sharding in zip(
      jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(params), strict=True
    )
  }
  replicated = NamedSharding(mesh, PartitionSpec())

  def moment(path: Any, leaf: Any) -> NamedSharding:
    names = _names(path)
    tails = (by_path.get((names[start:], leaf.shape)) for start in range(len(names)))
    return next((found for found in tails if found is not None), replicated)

  opt_state = jax.tree_util.tree_map_with_path(moment, jax.eval_shape(optimizer.init, shapes))
  return states.TrainState(replicated, params, opt_state)  # type: ignore[arg-type]


def make_state(
  config: ModelConfig,
  optimizer: Optimizer,
  shardings: Any,
  *,
  seed: int | None = None,
  params: Any = None,
) -> states.TrainState:
  """The state before the first step, made where it will lie.

  Args:
    config: the model.
    optimizer: the run's.
    shardings: of `state_shardings`.
    seed: of fresh parameters; or
    params: the parameters to start from, on the host.

  Raises:
    ValueError: both or neither of `seed` and `params`.
  """
  if (seed is None) == (params is None):
    raise ValueError("seed, params: expected exactly one of the two")
  if seed is not None:
    key = jax.random.key(seed)
    make = jax.jit(
      lambda key: states.create(transformer.init(config, key), optimizer), out_shardings=shardings
    )
    return make(key)
  placed = jax.device_put(params, shardings.params)
  create = jax.jit(lambda params: states.create(params, optimizer), out_shardings=shardings)
  return create(placed)


@dataclasses.dataclass(frozen=True)
class OnMesh:
  """A jitted function of two arguments, called on its mesh.

  Attributes:
    jitted: the function; the planner lowers it without data.
    mesh: where it runs.
  """

  jitted: Any
  mesh: Mesh

  def __call__(self, first: Any, batch: Any) -> Any:
    """Its result, on the mesh."""
    with jax.set_mesh(self.mesh):
      return self.jitted(first, batch)


def compile_step(
  train_step: Callable[..., Any], shardings: Any, mesh: Mesh, rules: Rules
) -> OnMesh:
  """Jits a train step for a mesh, with the state donated and kept in its layout.

  Args:
    train_step: of `step.make_train_step`.
    shardings: of `state_shardings`.
    mesh: the mesh.
    rules: the table of the shardings; what the step is divided by (`training.shards`).

  Returns:
    (state, batch on the mesh) -> (state, metrics).
  """
  return _compile(train_step, mesh, rules, donate_argnums=0, out_shardings=(shardings, None))


def compile_scoring(
  logprob_fn: Callable[..., jax.Array],
  row_sharding: NamedSharding,
  mesh: Mesh,
  rules: Rules,
) -> OnMesh:
  """Jits a scoring step for a mesh; nothing is donated.

  Args:
    logprob_fn: of `scoring.make_batch_logprob_fn`.
    row_sharding: where the logprobs go: that of the batch's rows.
    mesh: the mesh.
    rules: as for `compile_step`.

  Returns:
    (params, batch on the mesh) -> logprobs on the mesh, laid out as the batch's rows.
  """
  return _compile(logprob_fn, mesh, rules, out_shardings=row_sharding)


def compile_canary(logprob_fn: Callable[..., jax.Array], mesh: Mesh, rules: Rules) -> OnMesh:
  """Jits the scoring of one prompt for a mesh.

  Args:
    logprob_fn: of `scoring.make_logprob_fn`.
    mesh: the mesh.
    rules: as for `compile_step`.

  Returns:
    (params, ids) -> logprobs, the same on every device.
  """
  return _compile(logprob_fn, mesh, rules, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _compile(function: Callable[..., Any], mesh: Mesh, rules: Rules, **options: Any) -> OnMesh:
  def scoped(first: Any, batch: Any) -> Any:
    with nn.logical_axis_rules(rules):
      return function(first, batch)

  return OnMesh(jax.jit(scoped, compiler_options=compiler_options(mesh), **options), mesh)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
  """What XLA is told beyond its defaults: on several GPUs, to move collectives away from waits."""
  gpus = mesh.size > 1 and mesh.devices.flat[0].platform in ("gpu", "cuda")
  return {"xla_gpu_enable_latency_hiding_scheduler": True} if gpus else {}


def _names(path: Any) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
