"""Muon's direction for matrices that lie in pieces over many devices.

Place in the ring: under `optimizer`, inside the compiled train step. The momentum lies as its
parameter does. For the orthogonalisation the devices exchange blocks all to all, round by round, so
that each holds whole matrices, and then give the blocks back: no device ever holds a stack. One
device is the case without an exchange. docs/design/0006-layouts.md says how rounds are cut.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, PartitionSpec

from intellect3.kernels import platform
from intellect3.sharding import rules as tables

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8
ROUND_BYTES = 64 * 2**20
"""Most bytes of whole matrices that a device holds in a round, if one matrix is not more."""

DTYPES = ("float32", "bfloat16")


class Matrix(NamedTuple):
  """The logical axes of a parameter that is a matrix, or a stack of them.

  Attributes:
    inputs: axes that together are the rows.
    outputs: axes that together are the columns.
    stack: axes before them, outermost first; a parameter may lack the first ones.
  """

  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  stack: tuple[str, ...] = ("layers",)


_STACK = ("layers", "experts")
MATRICES: dict[tuple[str, str], Matrix] = {
  ("q", "kernel"): Matrix(("embed",), ("heads", "head_dim")),
  ("k", "kernel"): Matrix(("embed",), ("kv_heads", "head_dim")),
  ("v", "kernel"): Matrix(("embed",), ("kv_heads", "head_dim")),
  ("o", "kernel"): Matrix(("heads", "head_dim"), ("embed",)),
  ("gate", "kernel"): Matrix(("embed",), ("mlp",)),
  ("up", "kernel"): Matrix(("embed",), ("mlp",)),
  ("down", "kernel"): Matrix(("mlp",), ("embed",)),
  ("experts", "gate"): Matrix(("embed",), ("mlp",), _STACK),
  ("experts", "up"): Matrix(("embed",), ("mlp",), _STACK),
  ("experts", "down"): Matrix(("mlp",), ("embed",), _STACK),
}
"""The last two names of a parameter's path -> what it is; of all that Muon updates."""


class State(NamedTuple):
  """What `scale_by_muon` keeps.

  Attributes:
    updates: int32 scalar, how many were made.
    momentum: tree of the matrices.
  """

  updates: jax.Array
  momentum: Any


class Division(NamedTuple):
  """How the matrices of a stack are shared out.

  Attributes:
    exchange: mesh axes over which a matrix is split: the devices along them exchange blocks.
    share: mesh axes over which it is not and the work is: results are gathered along them.
    rounds: of an exchange, an orthogonalisation and the exchange back.
    each: whole matrices that a device has in a round.
  """

  exchange: tuple[str, ...]
  share: tuple[str, ...]
  rounds: int
  each: int


def divide(
  matrices: int,
  matrix_bytes: int,
  exchange: Mapping[str, int],
  replicas: Mapping[str, int],
) -> Division:
  """Shares out a stack.

  Replicas of a block take part where that leaves each device fewer matrices, nearest axes first.

  Args:
    matrices: number of matrices whose blocks a device has.
    matrix_bytes: of one whole matrix.
    exchange: sizes of the mesh axes over which a matrix is split.
    replicas: sizes of the axes over which blocks are the same, furthest first.
  """
  devices = math.prod(exchange.values())
  share: list[str] = []
  for axis, size in reversed(list(replicas.items())):
    if -(-matrices // (devices * size)) < -(-matrices // devices):
      share.insert(0, axis)
      devices *= size
  each = -(-matrices // devices)
  fewest = -(-each // max(1, ROUND_BYTES // matrix_bytes))
  # Rounds that all are full need no padding; a few more of them are worth that.
  full = (rounds for rounds in range(fewest, 2 * fewest) if each % rounds == 0)
  rounds = next(full, fewest)
  return Division(tuple(exchange), tuple(share), rounds, -(-each // rounds))


def scale_by_muon(
  *,
  momentum: float,
  steps: int,
  consistent_rms: float,
  dtype: str | None = None,
  momentum_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Muon's direction: Nesterov momentum, orthogonalised and scaled (see `optimizer.muon`).

  The arithmetic is that of `optax.contrib.scale_by_muon` with its default coefficients.

  Args:
    momentum: decay of the momentum.
    steps: Newton-Schulz steps.
    consistent_rms: an update is scaled by this times sqrt(max(fan_in, fan_out)).
    dtype: in which matrices travel and are orthogonalised, of `DTYPES`; None: float32 on CPUs,
      else bfloat16.
    momentum_dtype: in which the momentum is kept, of `DTYPES`; None: as the parameters. It is
      rounded after a step has used it.

  Returns:
    A transformation of trees that hold matrices only. On a mesh of several devices its update
    raises ValueError outside `nn.logical_axis_rules`, since it must know where matrices lie.
  """

  def init(params: Any) -> State:
    return State(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=momentum_dtype))

  def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
    del params
    kept = jax.tree.map(lambda moment, grad: moment.astype(grad.dtype), state.momentum, grads)
    moments = optax.tree.update_moment(grads, kept, momentum, 1)
    count = optax.safe_increment(state.updates)
    of_moment = 1 - momentum ** (count + 1).astype(jnp.float32)
    of_grad = 1 - momentum ** count.astype(jnp.float32)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(grads)
    turned: list[jax.Array] = []
    for (path, grad), moment in zip(leaves, jax.tree.leaves(moments), strict=True):
      if turned:  # one stack after the other: the copies of each are freed before the next
        of_moment, turned[-1] = jax.lax.optimization_barrier((of_moment, turned[-1]))
      ahead = momentum * (moment / of_moment) + (1 - momentum) * (grad / of_grad)
      turned.append(orthogonalise(ahead, matrix_of(path), steps=steps, dtype=dtype))
    scaled = [
      update.astype(grad.dtype)
      * (consistent_rms * math.sqrt(max(_fans(grad.shape, matrix_of(path)))))
      for update, (path, grad) in zip(turned, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, scaled), State(
      count, optax.tree.cast(moments, momentum_dtype)
    )

  return optax.GradientTransformation(init, update)


def orthogonalise(
  stack: jax.Array, matrix: Matrix, *, steps: int = 5, dtype: str | None = None
) -> jax.Array:
  """Newton-Schulz on every matrix of a stack, wherever its blocks lie.

  The mesh is the one that is set; where the stack lies on it follows from the logical axis rules.

  Args:
    stack: [stack.., inputs.., outputs..].
    matrix: which axes are which.
    steps: Newton-Schulz steps.
    dtype: as of `scale_by_muon`.

  Returns:
    The same shape and layout, in `dtype`.

  Raises:
    ValueError: on a mesh of several devices without rules, or inside `shard_map`.
  """
  dtype = dtype or ("float32" if platform.traced_platform() == "cpu" else "bfloat16")
  mesh = jax.sharding.get_abstract_mesh()
  fan_in, fan_out = _fans(stack.shape, matrix)
  size = fan_in * fan_out * jnp.dtype(dtype).itemsize
  rank = len(matrix.inputs) + len(matrix.outputs)
  turn = functools.partial(newton_schulz, steps=steps)
  if mesh.empty or mesh.size == 1:
    division = divide(math.prod(stack.shape[:-rank]), size, {}, {})
    return _rounds(stack.astype(dtype), ((),) * rank, (fan_in, fan_out), division, {}, turn)
  placed = _placement(mesh, logical_axes(matrix, stack.ndim))
  split, blocks = placed[:-rank], placed[-rank:]
  sizes = {axis: mesh.shape[axis] for axis in mesh.axis_names if mesh.shape[axis] > 1}
  exchange = {axis: sizes[axis] for axes in blocks for axis in axes}
  used = {axis for axes in split for axis in axes} | set(exchange)
  local = math.prod(stack.shape[:-rank]) // math.prod(sizes[a] for axes in split for a in axes)
  replicas = {axis: size for axis, size in sizes.items() if axis not in used}
  division = divide(local, size, exchange, replicas)
  spec = PartitionSpec(*placed)
  # Results that were gathered over replicas are the same on all of them, which jax cannot see.
  return jax.shard_map(
    lambda local: _rounds(local, blocks, (fan_in, fan_out), division, sizes, turn),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )(stack.astype(dtype))


def newton_schulz(x: jax.Array, *, steps: int) -> jax.Array:
  """Jordan et al.'s quintic iteration towards the nearest orthogonal matrix (Muon, 2024).

  x <- a x + (b A + c A^2) x with A = x x^T and `COEFFICIENTS`, after a division by the Frobenius
  norm; of a matrix with more rows than columns, the same from the other side.

  Args:
    x: [.., rows, columns]; bfloat16 products are summed in float32, float32 ones are not shortened.
    steps: of the iteration.
  """
  a, b, c = COEFFICIENTS
  multiply = functools.partial(
    jnp.matmul, precision="highest" if x.dtype == jnp.float32 else "default"
  )
  squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
  x = (x / (jnp.sqrt(squares) + EPS)).astype(x.dtype)
  tall = x.shape[-2] > x.shape[-1]

  def step(_: Any, x: jax.Array) -> jax.Array:
    y = jnp.swapaxes(x, -2, -1)
    gram = multiply(y, x) if tall else multiply(x, y)
    polynomial = b * gram + c * multiply(gram, gram)
    return a * x + (multiply(x, polynomial) if tall else multiply(polynomial, x))

  return jax.lax.fori_loop(0, steps, step, x)  # a loop compiles five times as fast


def matrix_of(path: Sequence[Any]) -> Matrix:
  """What a parameter of `MATRICES` is, by its path."""
  *_, owner, name = names(path)
  return MATRICES[owner, name]


def names(path: Sequence[Any]) -> tuple[str, ...]:
  """The names of a parameter's path, as `jax.tree_util` gives it."""
  return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def logical_axes(matrix: Matrix, rank: int) -> tuple[str, ...]:
  """The logical axis of every dimension of a stack of rank `rank`."""
  every = (*matrix.stack, *matrix.inputs, *matrix.outputs)
  inner = len(every) - len(matrix.stack)
  if not inner <= rank <= len(every):
    raise ValueError(f"matrix: expected {inner} to {len(every)} dimensions {every}, got {rank}")
  return every[len(every) - rank :]


def _fans(shape: tuple[int, ...], matrix: Matrix) -> tuple[int, int]:
  inner = shape[len(shape) - len(matrix.inputs) - len(matrix.outputs) :]
  rows = math.prod(inner[: len(matrix.inputs)])
  return rows, math.prod(inner) // rows


def _placement(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
  """The mesh axes of more than one device that split each dimension."""
  rules = tuple(nn.get_logical_axis_rules())
  if not rules or mesh.manual_axes:
    raise ValueError(
      f"muon: expected the logical axis rules of the layout on a mesh of {mesh.size} devices, and "
      f"no shard_map around, got rules {rules}, manual axes {mesh.manual_axes}"
    )
  entries = tables.to_spec(axes, rules)
  every = (tables.axes_of(entry) for entry in entries)
  return tuple(tuple(axis for axis in entry if mesh.shape.get(axis, 1) > 1) for entry in every)


def _rounds(
  local: jax.Array,
  blocks: tuple[tuple[str, ...], ...],
  fans: tuple[int, int],
  division: Division,
  sizes: Mapping[str, int],
  turn: Any,
) -> jax.Array:
  """A device's part: its blocks of a stack -> the blocks of the result.

  Args:
    local: [stack.., block..].
    blocks: mesh axes that split each dimension of a matrix.
    fans: rows and columns of a whole matrix.
    division: the shares.
    sizes: of the mesh axes.
    turn: [each, rows, columns] -> the same shape.
  """
  block = local.shape[local.ndim - len(blocks) :]
  parts = tuple(math.prod(sizes[axis] for axis in axes) for axes in blocks)
  devices, replicas = math.prod(parts), math.prod(sizes[axis] for axis in division.share)
  flat = local.reshape(-1, *block)
  slots = division.rounds * replicas * devices * division.each
  flat_padded = jnp.pad(flat, ((0, slots - len(flat)), *((0, 0),) * len(block)))
  rounds = flat_padded.reshape(division.rounds, replicas, devices * division.each, *block)

  # From [parts.., each, block..] to [each, part 0, block 0, part 1, block 1, ..] and back.
  count = len(block)
  inward = (count, *(axis for n in range(count) for axis in (n, count + 1 + n)))
  outward = tuple(inward.index(axis) for axis in range(2 * count + 1))
  whole = tuple(size for pair in zip(parts, block, strict=True) for size in pair)

  def exchange(x: jax.Array) -> jax.Array:
    if devices == 1:
      return x
    return jax.lax.all_to_all(x, division.exchange, 0, 0, tiled=True)

  def one(x: jax.Array) -> jax.Array:
    x = x[0] if replicas == 1 else x[jax.lax.axis_index(division.share)]
    x = exchange(x).reshape(*parts, division.each, *block).transpose(inward)
    x = turn(x.reshape(division.each, *fans)).reshape(division.each, *whole)
    x = exchange(x.transpose(outward).reshape(-1, *block))
    if replicas > 1:
      x = jax.lax.all_gather(x, division.share, tiled=True)
    return x.reshape(rounds.shape[1:])

  # In place: a round's result takes the place of its matrices.
  turned = jax.lax.fori_loop(0, division.rounds, lambda n, x: x.at[n].set(one(x[n])), rounds)
  return turned.reshape(slots, *block)[: len(flat)].reshape(local.shape)
