"""Seconds to trace and to compile a deep and narrow model: its gradient alone, and its train step.

Part of `tools.benchmarks.model` (`--compile`): GLM-4.5-Air's depth, one dense and 45 MoE layers, at
the width of the preset `tiny`; AdamW in the train step. The persistent compilation cache is off;
imports are not counted.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np

from intellect3.losses import supervised
from intellect3.models import presets, transformer
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing
from intellect3.training import optimizer as optimizers
from intellect3.training import state as states
from intellect3.training import step as steps

ROWS, LENGTH = 4, 256


def measure(repetitions: int = 3) -> dict[str, Any]:
  """Compiles the step a few times over; returns medians, in seconds."""
  jax.config.update("jax_enable_compilation_cache", False)
  depth = presets.glm_4_5_air()
  seconds: dict[str, list[dict[str, float]]] = {"gradient": [], "step": []}
  for repetition in range(repetitions):
    # A config of its own each time, so that nothing traced before is found again.
    config = presets.tiny(
      num_layers=depth.num_layers,
      num_dense_layers=depth.num_dense_layers,
      remat_policy="full",
      rms_norm_eps=1e-5 * (1 + repetition / 1000),
    )
    for name, (program, state) in _programs(config).items():
      seconds[name].append(_compile_once(program, state))
  report: dict[str, Any] = {"layers": depth.num_layers, "rows": ROWS, "length": LENGTH}
  for name, every in seconds.items():
    medians = {key: statistics.median(once[key] for once in every) for key in every[0]}
    report[name] = {**medians, "first": every[0]}
  return report


def _programs(config: ModelConfig) -> dict[str, tuple[Any, Any]]:
  """The jitted functions, each with the shapes of its first argument."""
  optimizer = optimizers.adamw(learning_rate=1e-4, clip_norm=1.0)
  loss = steps.supervised(supervised.negative_log_likelihood)
  sizes: dict[str, Any] = {"micro_rows": ROWS, "head_chunk_size": 512}
  params, _ = transformer.abstract(config)
  state = jax.eval_shape(lambda params: states.create(params, optimizer), params)
  step = jax.jit(steps.make_train_step(config, loss, optimizer, **sizes), donate_argnums=0)
  return {
    "gradient": (jax.jit(steps.make_gradient_fn(config, loss, **sizes)), params),
    "step": (step, state),
  }


def _compile_once(program: Any, state: Any) -> dict[str, float]:
  batch = packing.empty_batch(ROWS, LENGTH, step=1, loss_tokens=1)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), batch)
  clock = [(time.perf_counter(), time.process_time())]
  traced = program.trace(state, shapes)
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
