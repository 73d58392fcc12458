"""Functions of (parameters, batch) run on every device's shards: the explicit layout of a step.

Place in the ring: between the mesh with its table of rules and the train step, which is written
for one device's parameters and rows, and says itself what travels. Which mesh and which table, it
is told as flax is: by `jax.set_mesh` and `nn.logical_axis_rules` (`layout.compile_step` sets both).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from intellect3.models import parallel, transformer
from intellect3.models.config import ModelConfig
from intellect3.sharding.rules import axes_of, to_spec


def division(config: ModelConfig) -> parallel.Parallel:
  """How the model is divided on the mesh that is set; one device where none is.

  Raises:
    ValueError: several devices without a table of rules, or a table that no model can follow.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
    return parallel.ONE_DEVICE
  rules = tuple(nn.get_logical_axis_rules())
  if not rules:
    raise ValueError(f"rules: expected a table for a mesh of {mesh.size} devices, got none")
  return parallel.divide(transformer.abstract(config)[1], dict(mesh.shape), rules)


def param_specs(config: ModelConfig) -> Any:
  """The partition of every parameter under the table that is set, a tree of PartitionSpec."""
  rules = tuple(nn.get_logical_axis_rules())
  shapes, axes = transformer.abstract(config)
  return jax.tree.map(lambda _, names: to_spec(names, rules), shapes, axes)


def run(
  function: Callable[..., Any],
  config: ModelConfig,
  division: parallel.Parallel,
  params: Any,
  rows: Any,
  scalars: Any,
  *,
  out_specs: Callable[[Any, PartitionSpec], Any],
) -> Any:
  """Calls `function(params, rows, scalars)` on every device.

  Args:
    function: gets its device's shards of the parameters and rows; see `collectives` for whose
      gradients are whose.
    config: the model of the parameters.
    division: of `division`.
    params: the parameters.
    rows: tree of arrays [rows, ..], divided over the mesh axes of rows.
    scalars: tree of arrays that every device gets whole.
    out_specs: from the parameters' specs and that of rows to those of what the function returns.
  """
  if not division.sizes:
    return function(params, rows, scalars)
  specs, row = param_specs(config), PartitionSpec(division.rows)
  rest = jax.tree.map(lambda _: PartitionSpec(), scalars)
  in_specs = (specs, jax.tree.map(lambda _: row, rows), rest)
  mapped = jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs(specs, row), check_vma=False
  )
  return mapped(params, rows, scalars)


def sum_gradients(grads: Any, config: ModelConfig, division: parallel.Parallel) -> Any:
  """Sums each parameter's gradient over the devices that hold the same shard of it.

  Over those that gathered its shards, the gather's own gradient has summed it already.
  """
  if not division.sizes:
    return grads

  def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    named = [axis for entry in spec for axis in axes_of(entry)]
    same = tuple(axis for axis in division.axes if axis not in named)
    return jax.lax.psum(leaf, same) if same else leaf

  return jax.tree.map(one, grads, param_specs(config))
