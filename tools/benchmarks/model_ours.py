"""Our side of the model benchmark: the train step's gradient function, jitted; no optimizer.

One process of `tools.benchmarks.model`; it imports no torch.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from intellect3.losses import supervised
from intellect3.models import hf
from intellect3.pipeline import packing
from intellect3.training import step as steps


class Ours:
  """The model of a directory and one batch, on the device."""

  def __init__(
    self,
    directory: pathlib.Path,
    batch: dict[str, Any],
    *,
    head_chunk_size: int,
    run_options: dict[str, Any],
  ):
    """Loads the weights.

    Args:
      directory: a Hugging Face model directory.
      batch: the fields of a packed `Batch`, NumPy.
      head_chunk_size: tokens per chunk of the vocabulary head.
      run_options: fields of ModelConfig that say how to run it.
    """
    config, params = hf.load(directory)
    config = dataclasses.replace(config, **run_options)
    self.versions = f"jax {jax.__version__}"
    self._params = jax.device_put(params)
    self._batch = jax.device_put(packing.Batch(**batch))
    self._gradient_fn = jax.jit(
      steps.make_gradient_fn(
        config,
        steps.supervised(supervised.negative_log_likelihood),
        micro_rows=batch["tokens"].shape[0],
        head_chunk_size=head_chunk_size,
      )
    )
    self._gradients: Any = None

  def loss(self) -> float:
    """One forward and backward pass, waited for; returns the loss."""
    self._gradients = None
    self._gradients, metrics = self._gradient_fn(self._params, self._batch)
    jax.block_until_ready(self._gradients)
    return float(metrics["loss"])

  def gradient_norm(self) -> float:
    """The global norm of the last pass's gradients."""
    return float(jax.jit(optax.tree.norm)(self._gradients))

  def matmul_seconds(self, size: int) -> float:
    """Seconds of a jitted float32 product of two square matrices, the best of 5."""
    squares, multiply = _squares(size)
    jax.block_until_ready(multiply(*squares))
    seconds = []
    for _ in range(5):
      start = time.perf_counter()
      jax.block_until_ready(multiply(*squares))
      seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def _squares(size: int) -> tuple[Any, Any]:
  keys = jax.random.split(jax.random.key(0))
  return tuple(jax.random.normal(key, (size, size)) for key in keys), jax.jit(jnp.dot)
