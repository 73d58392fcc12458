"""Our side of the step benchmark: the jitted train step with AdamW.

One process of `tools.benchmarks.step`; it imports no torch. Step and optimizer are used as a run
uses them: state donated, batch placed on the device, constant learning rate.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from intellect3.losses import supervised
from intellect3.models import hf
from intellect3.pipeline import packing
from intellect3.training import optimizer as optimizers
from intellect3.training import state as states
from intellect3.training import step as steps


def prepare(
  directory: pathlib.Path,
  batch: dict[str, Any],
  *,
  learning_rate: float,
  clip_norm: float,
  micro_rows: int,
  head_chunk_size: int,
  run_options: dict[str, Any],
) -> tuple[Callable[[], tuple[float, float]], str]:
  """Loads the weights of `directory` and returns one train step and its description.

  Args:
    directory: a Hugging Face model directory.
    batch: the fields of a packed `Batch`, NumPy.
    learning_rate: of AdamW, constant.
    clip_norm: largest global norm of the gradient.
    micro_rows: rows per micro-batch.
    head_chunk_size: tokens per chunk of the vocabulary head.
    run_options: fields of ModelConfig that say how to run it.

  Returns:
    A function that trains one step and gives (loss before it, gradient norm), and the versions.
  """
  config, params = hf.load(directory)
  config = dataclasses.replace(config, **run_options)
  optimizer = optimizers.adamw(learning_rate=learning_rate, clip_norm=clip_norm)
  train_step = jax.jit(
    steps.make_train_step(
      config,
      steps.supervised(supervised.negative_log_likelihood),
      optimizer,
      micro_rows=micro_rows,
      head_chunk_size=head_chunk_size,
    ),
    donate_argnums=0,
  )
  state = jax.jit(lambda params: states.create(params, optimizer), donate_argnums=0)(
    jax.device_put(params)
  )
  del params
  placed = jax.device_put(packing.Batch(**batch))

  def step() -> tuple[float, float]:
    nonlocal state
    state, metrics = train_step(state, placed)
    jax.block_until_ready(state)
    return float(metrics["loss"]), float(metrics["grad_norm"])

  return step, f"jax {jax.__version__}"
