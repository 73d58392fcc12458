"""The model's figures on a GPU, ours and transformers' with torch.compile.

Part of `tools.benchmarks.model` (`--gpu`; with `--dry-run` the same code at small sizes, anywhere).
Each measurement compiles once, warms up and takes the median of some calls. MFU counts useful work
(`training.flops`) against the data sheet's dense bfloat16. torch runs first, in a process of its
own that ends before ours allocates, since both want the whole card.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.kernels import grouped_matmul
from intellect3.kernels.attention import attention
from intellect3.losses import supervised
from intellect3.models import presets, transformer
from intellect3.pipeline import packing
from intellect3.training import flops
from intellect3.training import optimizer as optimizers
from intellect3.training import state as states
from intellect3.training import step as steps
from tools.benchmarks import model_gpu_theirs as theirs

CALLS = 10
MEASUREMENTS = ("stack", "qwen", "attention", "experts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is measured.

  Attributes:
    stack: changes to GLM-4.5-Air that leave its layers' width alone, if any.
    stack_tokens: tokens of a forward and backward pass of the stack, one document.
    stack_layers: how many layers are tried, most first.
    qwen: changes to Qwen3-0.6B.
    qwen_tokens: tokens of its train step, one document.
    attention_tokens: tokens of the attention alone, in one document and in packed ones.
    heads: query heads, kv heads and head dim of it.
    experts: experts, embed and mlp of the grouped matmul alone.
    experts_tokens: its rows.
  """

  stack: dict[str, Any]
  stack_tokens: tuple[int, ...]
  stack_layers: tuple[int, ...]
  qwen: dict[str, Any]
  qwen_tokens: int
  attention_tokens: tuple[int, ...]
  heads: tuple[int, int, int]
  experts: tuple[int, int, int]
  experts_tokens: tuple[int, ...]


FULL = Sizes(
  stack=dict(vocab_size=1024),
  stack_tokens=(16_384, 65_536),
  stack_layers=(8, 6, 5, 4, 3, 2, 1),
  qwen=dict(),
  qwen_tokens=16_384,
  attention_tokens=(16_384, 65_536),
  heads=(96, 8, 128),
  experts=(128, 4096, 1408),
  experts_tokens=(65_536, 524_288),
)
_NARROW = dict(embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96, vocab_size=128)
SMALL = Sizes(
  stack=dict(**_NARROW, expert_mlp_dim=32, num_experts=8, num_experts_per_token=2),
  stack_tokens=(64,),
  stack_layers=(2, 1),
  qwen=dict(**_NARROW, num_layers=2, num_dense_layers=2),
  qwen_tokens=64,
  attention_tokens=(128,),
  heads=(4, 2, 16),
  experts=(4, 32, 16),
  experts_tokens=(64,),
)


def measure(*, dry_run: bool, only: list[str] | None) -> dict[str, Any]:
  """Runs the measurements asked for, or all; returns their figures.

  Raises:
    ValueError: an unknown measurement, or no GPU and no dry run.
  """
  unknown = set(only or ()) - set(MEASUREMENTS)
  if unknown:
    raise ValueError(f"only: expected some of {MEASUREMENTS}, got {sorted(unknown)}")
  sizes = SMALL if dry_run else FULL
  chosen = only or list(MEASUREMENTS)
  # Before jax takes the card.
  others = {name: _theirs(name, sizes, dry_run) for name in chosen if name in ("stack", "qwen")}
  device = jax.devices()[0]
  if device.platform != "gpu" and not dry_run:
    raise ValueError(f"--gpu: expected a GPU, or --dry-run, got {device.platform}")
  report: dict[str, Any] = {"device": device.device_kind, "transformers": others}
  functions = {"stack": _stack, "qwen": _qwen, "attention": _attention, "experts": _experts}
  for name in chosen:
    report[name] = functions[name](sizes)
  return report


def _theirs(name: str, sizes: Sizes, dry_run: bool) -> Any:
  question = {"what": name, "dry_run": dry_run, "calls": CALLS}
  if name == "stack":
    config = presets.glm_4_5_air(**sizes.stack, num_dense_layers=0)
    question |= {"tokens": sizes.stack_tokens, "layers": sizes.stack_layers}
  else:
    config = presets.qwen3_0_6b(**sizes.qwen)
    question |= {"tokens": [sizes.qwen_tokens], "layers": [config.num_layers]}
  done = subprocess.run(
    [sys.executable, "-m", theirs.__name__],
    input=json.dumps({**question, "config": config.to_hf()}),
    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"{theirs.__name__}: exit code {done.returncode}: {done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
  """Median seconds of a call, after two that compile and warm up."""
  seconds = []
  for repetition in range(CALLS + 2):
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    if repetition >= 2:
      seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def _rates(work: float, tokens: int, seconds: float) -> dict[str, float | None]:
  kind = jax.devices()[0].device_kind
  peak = [flops.PEAK_FLOPS[k] for k in sorted(flops.PEAK_FLOPS, key=len) if kind.startswith(k)]
  return {
    "seconds": seconds,
    "tokens_per_second": tokens / seconds,
    "tflops": work / seconds / 1e12,
    "mfu": work / seconds / peak[-1] if peak else None,
  }


def _memory(compiled: Any) -> dict[str, float | None]:
  analysis = compiled.memory_analysis()
  planned = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
  planned += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  fits = limit is None or planned <= 0.95 * limit
  return {"planned_gib": planned / 2**30, "limit_gib": limit and limit / 2**30, "fits": fits}


def _stack(sizes: Sizes) -> list[dict[str, Any]]:
  """A stack of MoE layers, forward and backward, as many layers as fit."""
  figures = []
  for tokens in sizes.stack_tokens:
    for layers in sizes.stack_layers:
      config = presets.glm_4_5_air(
        **sizes.stack, num_layers=layers, num_dense_layers=0, param_dtype="bfloat16"
      )
      positions = jnp.arange(tokens)[None]

      def loss(params: Any, config: Any = config, positions: Any = positions) -> jax.Array:
        ids = positions % config.vocab_size
        model = transformer.Transformer(config)
        output: Any = model.apply({"params": params}, ids, positions, jnp.ones_like(ids))
        return jnp.mean(output.hidden_BTD.astype(jnp.float32) ** 2)

      shapes, _ = transformer.abstract(config)
      compiled = jax.jit(jax.value_and_grad(loss)).lower(shapes).compile()
      memory = _memory(compiled)
      if memory["fits"]:
        break
    else:
      figures.append({"tokens": tokens, "layers": layers, **memory})
      continue
    params = transformer.init(config, jax.random.key(0))
    pairs = tokens * (tokens + 1) // 2
    work = flops.train_flops(
      dataclasses.replace(config, vocab_size=1), tokens=tokens, attended_pairs=pairs
    )
    seconds = _seconds(compiled, params)
    figures.append({"tokens": tokens, "layers": layers, **memory, **_rates(work, tokens, seconds)})
    del params
  return figures


def _qwen(sizes: Sizes) -> dict[str, Any]:
  """Qwen3-0.6B's full train step: gradients, clipping, AdamW."""
  config, tokens = presets.qwen3_0_6b(**sizes.qwen), sizes.qwen_tokens
  optimizer = optimizers.adamw(learning_rate=1e-5, clip_norm=1.0)
  train_step = jax.jit(
    steps.make_train_step(
      config,
      steps.supervised(supervised.negative_log_likelihood),
      optimizer,
      micro_rows=1,
      head_chunk_size=1024,
    ),
    donate_argnums=0,
  )
  batch = packing.empty_batch(1, tokens, step=1, loss_tokens=tokens - 1)
  batch.tokens[:] = np.arange(tokens) % config.vocab_size
  batch.positions[:] = np.arange(tokens)
  batch.segment_ids[:] = 1
  batch.loss_mask[:, 1:] = True
  placed = jax.device_put(batch)
  create = jax.jit(lambda key: states.create(transformer.init(config, key), optimizer))
  state = create(jax.random.key(0))
  compiled = train_step.lower(state, placed).compile()

  def call() -> Any:
    nonlocal state
    state, metrics = compiled(state, placed)
    return metrics

  seconds = _seconds(call)
  pairs = tokens * (tokens + 1) // 2
  work = flops.train_flops(config, tokens=tokens, attended_pairs=pairs)
  return {"tokens": tokens, **_memory(compiled), **_rates(work, tokens, seconds)}


def _attention(sizes: Sizes) -> list[dict[str, Any]]:
  """Grouped-query attention alone, bfloat16, forward and backward, one document and packed."""
  heads, kv_heads, width = sizes.heads
  figures = []
  for tokens in sizes.attention_tokens:
    for documents in (1, 8):
      length = tokens // documents
      positions = (jnp.arange(tokens) % length)[None]
      segments = (jnp.arange(tokens) // length + 1)[None]
      keys = jax.random.split(jax.random.key(0), 4)
      shapes = [(1, tokens, n, width) for n in (heads, kv_heads, kv_heads, heads)]
      q, k, v, dout = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
      )

      def attend(q: Any, k: Any, v: Any, positions: Any = positions, segments: Any = segments):
        return attention(
          q,
          k,
          v,
          q_positions_BT=positions,
          kv_positions_BS=positions,
          q_segment_ids_BT=segments,
          kv_segment_ids_BS=segments,
          scale=width**-0.5,
          implementation="auto",
        )

      forward = jax.jit(attend)
      both = jax.jit(lambda q, k, v, dout, attend=attend: jax.vjp(attend, q, k, v)[1](dout))
      once = _seconds(forward, q, k, v)
      twice = _seconds(both, q, k, v, dout)
      work = 4.0 * heads * width * documents * length * (length + 1) / 2
      figures.append(
        {
          "tokens": tokens,
          "documents": documents,
          "forward": _rates(work, tokens, once),
          # The second call runs the forward pass, too.
          "backward": _rates(2 * work, tokens, max(twice - once, 1e-9)),
        }
      )
  return figures


def _experts(sizes: Sizes) -> list[dict[str, Any]]:
  """The routed experts alone, bfloat16, top 1 so that tokens are rows: forward, and both."""
  experts, embed, mlp = sizes.experts
  figures = []
  for tokens in sizes.experts_tokens:
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (tokens, embed), jnp.bfloat16)
    wide, narrow = (experts, embed, mlp), (experts, mlp, embed)
    stacks = [
      jax.random.normal(key, shape, jnp.bfloat16) / 64
      for key, shape in zip(keys[1:4], (wide, wide, narrow), strict=True)
    ]
    routed = jax.random.randint(keys[4], (tokens, 1), 0, experts)
    weights = jnp.ones((tokens, 1), jnp.float32)

    def run(x: Any, gate: Any, up: Any, down: Any, routed: Any = routed, weights: Any = weights):
      return grouped_matmul.expert_mlp(
        *(x, gate, up, down, routed, weights), implementation="auto", block_size=128
      )

    forward = jax.jit(run)
    both = jax.jit(lambda x, *stacks, run=run: jax.vjp(run, x, *stacks)[1](x))
    once = _seconds(forward, x, *stacks)
    twice = _seconds(both, x, *stacks)
    work = 6.0 * tokens * embed * mlp
    figures.append(
      {
        "rows": tokens,
        "forward": _rates(work, tokens, once),
        "forward_and_backward": _rates(3 * work, tokens, twice),
      }
    )
  return figures
