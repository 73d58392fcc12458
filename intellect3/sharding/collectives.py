"""Collectives of an explicit layout: what a `shard_map` over the whole mesh is written with.

Place in the ring: the model gathers its parameters and sums its partial results with these; the
train step sums its gradients. Everything here is the identity over axes of size 1.

Gradients are those of the joint function: each device holds a share of the loss, and the shares
add up to it. Under `shard_map(.., check_vma=False)` jax's transposes are exactly these: a gather
becomes a sum that is scattered, a sum becomes a sum.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

Dims = tuple[tuple[str, ...], ...]
"""The mesh axes of each dimension of an array, outermost first."""


def size(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
  """Devices along these mesh axes together."""
  return math.prod(sizes.get(axis, 1) for axis in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(shard: jax.Array, dims: Dims, travel_dtype: str) -> jax.Array:
  """A parameter from its shards, moved in a narrower dtype than it is kept in.

  Args:
    shard: this device's block.
    dims: for each dimension the mesh axes to gather it over; nothing moves where all are empty.
    travel_dtype: dtype of the gather.

  Returns:
    The array in the shard's dtype, rounded to `travel_dtype` if it moved. Its gradient is summed
    and scattered in float32.
  """
  if not any(dims):
    return shard
  whole = shard.astype(travel_dtype)
  for dim, axes in enumerate(dims):
    if axes:
      whole = jax.lax.all_gather(whole, axes, axis=dim, tiled=True)
  return whole.astype(shard.dtype)


def _gather_fwd(shard: jax.Array, dims: Dims, travel_dtype: str):
  return gather(shard, dims, travel_dtype), None


def _gather_bwd(dims: Dims, travel_dtype: str, _: None, whole: jax.Array):
  if not any(dims):
    return (whole,)
  shard = whole.astype(jnp.float32)
  for dim, axes in reversed(list(enumerate(dims))):
    if axes:
      shard = jax.lax.psum_scatter(shard, axes, scatter_dimension=dim, tiled=True)
  return (shard.astype(whole.dtype),)


gather.defvjp(_gather_fwd, _gather_bwd)


def total(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """The sum over the devices of these mesh axes."""
  return jax.lax.psum(x, tuple(axes)) if axes else x


def share(x_ND: jax.Array, axes: Sequence[str], count: int) -> jax.Array:
  """This device's block of the leading axis, of an array that is the same on all devices.

  Args:
    x_ND: [N, ..]; filled with zeros to a multiple of `count`.
    axes: the mesh axes to divide over.
    count: devices along them.
  """
  if count == 1:
    return x_ND
  rows = -(-x_ND.shape[0] // count)
  padded = jnp.pad(x_ND, [(0, rows * count - x_ND.shape[0])] + [(0, 0)] * (x_ND.ndim - 1))
  return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(tuple(axes)) * rows, rows)


def join(block: jax.Array, axes: Sequence[str], length: int) -> jax.Array:
  """The inverse of `share`: the blocks of all devices side by side, cut to `length`."""
  if not axes:
    return block
  return jax.lax.all_gather(block, tuple(axes), axis=0, tiled=True)[:length]
