"""What a layout takes at the least, told without compiling it: bytes, and seconds to order by.

Place in the ring: beside it, under `search`, which compiles only what can fit, the most promising
first.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from intellect3.planning import memory
from intellect3.planning.hardware import Hardware
from intellect3.planning.job import Job
from intellect3.sharding import specs
from intellect3.training import flops as analytic

_RECOMPUTED = 4 / 3
_ON_HOST = ("offload", "offload_attention")


class Bound(NamedTuple):
  """Bytes that a device holds at the least, and seconds of a step by a coarse model."""

  bytes: float
  seconds: float


def maker(job: Job, hardware: Hardware) -> Callable[[Job, Mesh], Bound]:
  """Returns what bounds one candidate of a job; the model is looked at once.

  The function takes the candidate and its mesh, and raises ValueError where a tensor, the heads,
  the experts or the rows do not divide over it.
  """
  shapes, logical = transformer.abstract(_shaped(job.model))
  state = _bytes(jax.eval_shape(job.optimizer.init, shapes)) / _bytes(shapes)

  def bound(candidate: Job, mesh: Mesh) -> Bound:
    sizes = dict(mesh.shape)
    check(candidate, sizes)
    shardings = specs.tree_shardings(logical, shapes, mesh, candidate.rules)
    held = memory.tree_bytes(
      jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
      )
    )
    # Parameters, the optimizer's state, a gradient; the layers' inputs; a layer and its gradient.
    least = held * (2 + state) + _activations(candidate, sizes) + 2 * _layer(candidate, sizes)
    return Bound(least, seconds(candidate, hardware))

  return bound


def check(job: Job, sizes: Mapping[str, int]) -> None:
  """Raises ValueError naming the first size of the model or batch that an axis does not divide."""
  config = job.model
  wanted = [
    ("num_heads", config.num_heads, sizes["tensor"]),
    ("num_kv_heads", config.num_kv_heads, sizes["tensor"]),
    ("row_length", job.row_length, 2 * sizes["context"] if sizes["context"] > 1 else 1),
    ("rows", job.rows, job.micro_rows),
    ("micro_rows", job.micro_rows, sizes["data"] * sizes["fsdp"] * sizes["expert"]),
  ]
  if sizes["expert"] > 1:
    experts = config.num_experts if config.num_moe_layers else 1
    wanted.insert(0, ("num_experts", experts, sizes["expert"]))
  for name, size, divisor in wanted:
    if size % divisor:
      raise ValueError(f"{name}: expected a multiple of {divisor}, got {size}")


def seconds(job: Job, hardware: Hardware) -> float:
  """A step's time by a coarse model: arithmetic, and what of the traffic exceeds it."""
  config, sizes = job.model, {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
  sizes |= job.mesh or {}
  devices = math.prod(sizes.values())
  tokens = job.tokens / devices
  width = jnp.dtype(config.dtype).itemsize
  work = analytic.train_flops(config, tokens=job.tokens, attended_pairs=job.attended_pairs)
  dtype = {"bfloat16": "bf16", "float16": "f16"}.get(config.dtype, "f32")
  compute = hardware.matrix_seconds(work * _RECOMPUTED / devices, dtype)
  inside = sizes["context"] * sizes["tensor"]
  experts = 3 * config.num_moe_layers * config.num_experts * config.embed_dim
  experts *= config.expert_mlp_dim
  others = _entries(config) - experts
  passes = 3 * job.rows / job.micro_rows  # forward, again, and the gradient
  weights = (
    passes
    * width
    * (
      _ring(others / sizes["tensor"], inside, devices, hardware)
      + _ring(
        experts / sizes["expert"] / sizes["tensor"], inside * sizes["expert"], devices, hardware
      )
    )
  )
  choices = config.num_moe_layers * config.num_experts_per_token
  sent = 6 * tokens * choices * config.embed_dim * width * (1 - 1 / sizes["expert"])
  near = inside * sizes["expert"] <= hardware.node
  exchange = sent / (hardware.inner if near else hardware.outer)
  keys = 2 * config.num_kv_heads * config.head_dim * config.num_layers / sizes["tensor"]
  gathered = 3 * tokens * (sizes["context"] - 1) * keys * width / hardware.inner
  partial = 8 * config.num_layers * tokens * config.embed_dim * width
  partial *= (sizes["tensor"] - 1) / hardware.inner
  link = hardware.link_share
  return compute + (exchange + gathered + partial) / link + max(0.0, weights / link - compute)


def _ring(entries: float, neighbours: int, devices: int, hardware: Hardware) -> float:
  """Seconds a byte each: gathered over the devices that are left beside so many neighbours."""
  if devices <= neighbours:
    return 0.0
  if devices <= hardware.node:
    return entries / hardware.inner
  return entries / (hardware.outer * max(1, hardware.node // neighbours))


def _activations(job: Job, sizes: Mapping[str, int]) -> float:
  """Bytes of the layers' inputs that the backward pass needs."""
  if job.model.remat_policy in _ON_HOST:
    return 0.0
  rows = job.micro_rows / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
  tokens = rows * job.row_length / sizes["context"]
  width = jnp.dtype(job.model.dtype).itemsize
  return tokens * job.model.embed_dim * job.model.num_layers * width


def _layer(job: Job, sizes: Mapping[str, int]) -> float:
  """Bytes of the experts of one layer that a device gathers."""
  config = job.model
  entries = 3 * config.num_experts * config.embed_dim * config.expert_mlp_dim
  shared = sizes["expert"] * sizes["tensor"]
  return entries / shared * jnp.dtype(config.dtype).itemsize if config.num_moe_layers else 0.0


def _entries(config: ModelConfig) -> float:
  return sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract(_shaped(config))[0]))


def _shaped(config: ModelConfig) -> ModelConfig:
  """With kernels that can be traced anywhere: shapes do not depend on them."""
  return dataclasses.replace(config, attention="plain", grouped_matmul="dense")


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
