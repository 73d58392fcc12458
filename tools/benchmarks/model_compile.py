"""Seconds to trace and to compile the train step of a deep and narrow model.

Part of `tools.benchmarks.model` (`--compile`): GLM-4.5-Air's depth, one dense and 45 MoE layers, at
the width of the preset `tiny`. The persistent compilation cache is off; imports are not counted.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np

from intellect3.losses import supervised
from intellect3.models import presets, transformer
from intellect3.pipeline import packing
from intellect3.training import optimizer as optimizers
from intellect3.training import state as states
from intellect3.training import step as steps

ROWS, LENGTH = 4, 256


def measure(repetitions: int = 3) -> dict[str, Any]:
  """Compiles the step a few times over; returns medians, in seconds."""
  jax.config.update("jax_enable_compilation_cache", False)
  depth = presets.glm_4_5_air()
  seconds: list[dict[str, float]] = []
  for repetition in range(repetitions):
    # A config of its own each time, so that nothing traced before is found again.
    config = presets.tiny(
      num_layers=depth.num_layers,
      num_dense_layers=depth.num_dense_layers,
      remat_policy="full",
      rms_norm_eps=1e-5 * (1 + repetition / 1000),
    )
    seconds.append(_compile_once(config))
  keys = seconds[0]
  return {
    "layers": config.num_layers,
    "rows": ROWS,
    "length": LENGTH,
    **{key: statistics.median(once[key] for once in seconds) for key in keys},
    "first": seconds[0],
  }


def _compile_once(config: Any) -> dict[str, float]:
  optimizer = optimizers.adamw(learning_rate=1e-4, clip_norm=1.0)
  train_step = jax.jit(
    steps.make_train_step(
      config,
      steps.supervised(supervised.negative_log_likelihood),
      optimizer,
      micro_rows=ROWS,
      head_chunk_size=512,
    ),
    donate_argnums=0,
  )
  params, _ = transformer.abstract(config)
  state = jax.eval_shape(lambda params: states.create(params, optimizer), params)
  batch = packing.empty_batch(ROWS, LENGTH, step=1, loss_tokens=1)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), batch)
  clock = [(time.perf_counter(), time.process_time())]
  traced = train_step.trace(state, shapes)
  clock.append((time.perf_counter(), time.process_time()))
  lowered = traced.lower()
  clock.append((time.perf_counter(), time.process_time()))
  lowered.compile()
  clock.append((time.perf_counter(), time.process_time()))
  names = ("trace", "lower", "compile")
  pairs = zip(names, clock, clock[1:], strict=False)
  split = {name: (end[0] - start[0], end[1] - start[1]) for name, start, end in pairs}
  total = [clock[-1][i] - clock[0][i] for i in range(2)]
  return {
    "wall": total[0],
    "cpu": total[1],
    **{f"{name}_wall": wall for name, (wall, _) in split.items()},
    **{f"{name}_cpu": cpu for name, (_, cpu) in split.items()},
    "lowered_lines": lowered.as_text().count("\n"),
  }
