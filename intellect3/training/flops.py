"""Arithmetic of a train step, counted analytically, and what the device could do at best."""

import time

import jax
import numpy as np
from jax.sharding import Mesh

from intellect3.models.config import ModelConfig

PEAK_FLOPS = {
  # Dense bfloat16 multiply-adds counted as two, per device, from the vendors' data sheets.
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}
"""By the beginning of `jax.Device.device_kind`; the longest that fits counts."""


def active_matmul_params(config: ModelConfig) -> int:
  """Parameters that one token is multiplied with: its experts, no embedding, norms or biases."""
  attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
  dense = 3 * config.embed_dim * config.mlp_dim
  experts = config.num_experts_per_token + config.num_shared_experts
  moe = 3 * config.embed_dim * config.expert_mlp_dim * experts
  moe += config.embed_dim * config.num_experts  # router
  return (
    config.num_layers * attention
    + config.num_dense_layers * dense
    + config.num_moe_layers * moe
    + config.embed_dim * config.vocab_size
  )


def train_flops(config: ModelConfig, *, tokens: int, attended_pairs: int) -> float:
  """Floating-point operations of a forward and a backward pass (recomputation not counted).

  Six per active parameter and token, and 12 * heads * head_dim per layer and (query, key) pair:
  forward QK^T and PV take 2 each, the backward pass twice as much.

  Args:
    config: the model.
    tokens: tokens that are no padding.
    attended_pairs: (query, key) pairs under the causal mask: the sum of `position + 1` over the
      tokens that are no padding.
  """
  attention = 12 * config.num_layers * config.num_heads * config.head_dim
  return 6.0 * active_matmul_params(config) * tokens + float(attention) * attended_pairs


def peak_flops(device: jax.Device | None = None) -> float:
  """The device's best rate in FLOP/s: from the table, or measured where it is not in it (a CPU)."""
  device = device or jax.local_devices()[0]
  known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
  if known:
    return PEAK_FLOPS[max(known, key=len)]
  return measured_flops(device)


def measured_flops(device: jax.Device, *, size: int = 1024, seconds: float = 0.2) -> float:
  """FLOP/s of a float32 matrix product of `size`, the best of the trials that fit into `seconds`.

  It understates what the device can do when other work runs beside it, so an MFU against it is a
  rough figure.
  """
  product = jax.jit(lambda x: x @ x)
  with jax.set_mesh(Mesh([device], ("one",))):  # whatever mesh is set: the device alone
    matrix = jax.device_put(np.ones((size, size), np.float32), device)
    product(matrix).block_until_ready()
    best, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end or best == float("inf"):
      begin = time.perf_counter()
      product(matrix).block_until_ready()
      best = min(best, time.perf_counter() - begin)
  return 2.0 * size**3 / best


def mfu(flops: float, seconds: float, peak: float, device_count: int = 1) -> float:
  """Model FLOPs utilisation: the share of the peak that useful arithmetic took, 0 to 1."""
  if not (seconds > 0.0 and peak > 0.0 and device_count > 0):
    raise ValueError(
      f"mfu: expected seconds, peak and device_count > 0, got {seconds}, {peak}, {device_count}"
    )
  return flops / (seconds * peak * device_count)
