"""What router replay is worth: the mismatch KL of a server that routes otherwise, without and with.

    python -m tools.benchmarks.router_replay --json build/router_replay.json

A model with random weights plays the trainer (float32). Servers are the same model with something
off: noise on the routers' kernels, weights rounded to bfloat16, computation in bfloat16. Each
samples its own tokens; the trainer scores them by the train step's forward pass, choosing experts
for itself and replaying the server's. Printed: the share of (token, layer) pairs whose own choice
is the server's under replay, the mismatch KL (the run's own estimator), and the largest difference
of a logprob. The row `same` is the check: a server with nothing off.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.losses import importance
from intellect3.models import presets, transformer
from intellect3.models.config import ModelConfig
from intellect3.training import scoring

SIZES: dict[str, dict[str, Any]] = {
  "small": dict(
    embed_dim=128,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    mlp_dim=256,
    expert_mlp_dim=64,
    num_experts=32,
    num_experts_per_token=4,
    vocab_size=512,
  ),
  "deep": dict(
    embed_dim=128,
    num_layers=24,
    num_heads=8,
    num_kv_heads=2,
    mlp_dim=256,
    expert_mlp_dim=32,
    num_experts=64,
    num_experts_per_token=8,
    vocab_size=512,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
  """What is off in a server.

  Attributes:
    noise: of the routers' kernels, as a share of their standard deviation.
    weights: dtype that the weights are rounded to.
    dtype: of its computation.
  """

  noise: float = 0.0
  weights: str = "float32"
  dtype: str = "float32"


SERVERS = {
  "same": Server(),
  "router noise 0.001": Server(noise=0.001),
  "router noise 0.01": Server(noise=0.01),
  "router noise 0.1": Server(noise=0.1),
  "bfloat16 weights": Server(weights="bfloat16"),
  "bfloat16 weights and computation": Server(weights="bfloat16", dtype="bfloat16"),
}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=tuple(SIZES), default="small")
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--length", type=int, default=64)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
  arguments = parser.parse_args(argv)
  config = presets.tiny(**SIZES[arguments.size])
  params = transformer.init(config, jax.random.key(arguments.seed))
  figures = {
    name: measure(config, params, server, arguments.rows, arguments.length, arguments.seed)
    for name, server in SERVERS.items()
  }
  print(table(figures))
  if arguments.json is not None:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    said = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "machine": platform.processor() or platform.machine(),
      "device": jax.devices()[0].device_kind,
      "jax": importlib.metadata.version("jax"),
      "size": {"name": arguments.size, **SIZES[arguments.size]},
      "rows": arguments.rows,
      "length": arguments.length,
      "seed": arguments.seed,
      "figures": figures,
    }
    arguments.json.write_text(json.dumps(said, indent=1) + "\n")
  return 0


def measure(
  config: ModelConfig, params: Any, server: Server, rows: int, length: int, seed: int
) -> dict[str, float]:
  """Figures of one server: agreement, mismatch KL and largest difference without and with."""
  served_config = dataclasses.replace(config, dtype=server.dtype)
  served = off(params, server, seed)
  tokens = sample(served_config, served, jax.random.key(seed), rows, length)
  theirs, experts_BTLA = _scores(served_config, served, tokens, None)
  without, _ = _scores(config, params, tokens, None)
  replayed, _ = _scores(config, params, tokens, experts_BTLA)
  pairs = rows * length * config.num_moe_layers
  figures = {"router_agreement": float(replayed.agreed) / pairs}
  for name, ours in (("without", without), ("with", replayed)):
    log_ratio = importance.log_ratio(ours.logprobs, theirs.logprobs, theirs.scored)
    kl = importance.mismatch_kl(log_ratio)
    figures[f"mismatch_kl_{name}"] = float(jnp.sum(kl) / jnp.sum(theirs.scored))
    figures[f"max_difference_{name}"] = float(jnp.abs(log_ratio).max())
  if figures["mismatch_kl_with"] > 0.0:
    figures["ratio"] = figures["mismatch_kl_without"] / figures["mismatch_kl_with"]
  return figures


def off(params: Any, server: Server, seed: int) -> Any:
  """The server's parameters, float32 arrays of rounded values."""
  rng = np.random.default_rng(seed)

  def leaf(path: Any, value: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("correction_bias"):
      return value
    if name.endswith("router/kernel"):
      noise = rng.normal(size=value.shape).astype(np.float32)
      value = value + server.noise * jnp.std(value) * noise
    return value.astype(server.weights).astype(jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, params)


def sample(config: ModelConfig, params: Any, key: jax.Array, rows: int, length: int) -> jax.Array:
  """Tokens of the model at temperature 1 after a random first one, int32 [rows, length]."""
  first_key, *keys = jax.random.split(key, length)
  tokens = jnp.zeros((rows, length), jnp.int32)
  tokens = tokens.at[:, 0].set(jax.random.randint(first_key, (rows,), 0, config.vocab_size))
  return _sample(config, params, tokens, jnp.stack(keys))


def table(figures: dict[str, dict[str, float]]) -> str:
  """The figures as Markdown."""
  lines = [
    "| server | agreement | mismatch KL without | with replay | ratio | max diff. without | with |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, f in figures.items():
    numbers = [
      f"{f['router_agreement']:.4f}",
      f"{f['mismatch_kl_without']:.2e}",
      f"{f['mismatch_kl_with']:.2e}",
      f"{f['ratio']:.0f}" if "ratio" in f else "",
      f"{f['max_difference_without']:.2e}",
      f"{f['max_difference_with']:.2e}",
    ]
    lines.append(f"| {' | '.join([name, *numbers])} |")
  return "\n".join(lines)


def _apply(config: ModelConfig, params: Any, tokens: jax.Array) -> Any:
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return transformer.Transformer(config).apply(
    {"params": params}, tokens, positions, jnp.ones_like(tokens)
  )


@jax.jit(static_argnums=0)
def _sample(config: ModelConfig, params: Any, tokens: jax.Array, keys: jax.Array) -> jax.Array:
  def step(index: jax.Array, tokens: jax.Array) -> jax.Array:
    hidden_BD = _apply(config, params, tokens).hidden_BTD[:, index]
    logits_BV = hidden_BD.astype(jnp.float32) @ transformer.head(params, config)
    return tokens.at[:, index + 1].set(jax.random.categorical(keys[index], logits_BV))

  return jax.lax.fori_loop(0, tokens.shape[1] - 1, step, tokens)


@jax.jit(static_argnums=0)
def _scores(
  config: ModelConfig, params: Any, tokens: jax.Array, experts_BTLA: jax.Array | None
) -> tuple[scoring.Scores, jax.Array]:
  """The train step's forward pass, and the experts that the model chooses by itself."""
  scores = scoring.score(
    config,
    params,
    tokens,
    jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    jnp.ones_like(tokens),
    jnp.ones(tokens.shape, jnp.float32),
    head_chunk_size=256,
    routed_experts=experts_BTLA,
    experts_recorded=None if experts_BTLA is None else jnp.ones(tokens.shape, jnp.bool_),
  )
  return scores, jnp.moveaxis(_apply(config, params, tokens).router.experts_LBTA, 0, 2)


if __name__ == "__main__":
  sys.exit(main())
