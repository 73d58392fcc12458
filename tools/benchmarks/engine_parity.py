"""How far the engine's logprobs are from the trainer's forward pass on the same weights.

    python -m tools.benchmarks.engine_parity [--model DIR] [--dtype bfloat16] [--json FILE]

Samples from the engine (deterministic mode, no HTTP) and scores what it sampled as the trainer
does: whole sequences in one call, no cache. Prints the largest and the mean difference, the share
of tokens whose logprobs agree bit for bit and the mismatch KL `mean(expm1(d) - d)`; for scale, the
same between the trainer's forward in float32 and in the dtype asked for.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.inference.engine import flags, server
from intellect3.losses.logprobs import chunked_logprobs
from intellect3.models import transformer
from intellect3.models.config import ModelConfig
from tools.benchmarks.engine_sides import sample, save_preset


def main() -> None:
  parser = argparse.ArgumentParser(
    description="The engine's logprobs against the trainer's.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", help="model directory; None: the preset, random")
  add("--preset", default="tiny", help="of intellect3.models.presets, where no model is given")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both sides")
  add("--requests", type=int, default=64)
  add("--prompt-tokens", type=int, default=32)
  add("--new-tokens", type=int, default=64)
  add("--json", help="JSON file; None: only print")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    model = arguments.model or save_preset(arguments.preset, pathlib.Path(directory) / "model")
    result = {**vars(arguments), "jax": jax.__version__, **measure(model, arguments)}
  print(json.dumps(result, indent=2))
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Samples and scores; returns the figures."""
  length = arguments.prompt_tokens + arguments.new_tokens
  options = [f"--context-length={length}", f"--dtype={arguments.dtype}"]
  options += ["--enable-deterministic-inference", f"--slots={arguments.requests}"]
  parts = server.build(flags.parse(["--model", model, "--port", "0", *options]))
  config, params = parts.device.config, parts.device.host_params()
  rng = np.random.default_rng(0)
  prompts = rng.integers(1, config.vocab_size, (arguments.requests, arguments.prompt_tokens))
  sampled = sample(parts, prompts.tolist(), arguments.new_tokens)
  tokens = np.asarray([sequence.tokens for sequence in sampled], np.int32)
  theirs = np.asarray([sequence.output_logprobs for sequence in sampled], np.float32)
  ours = _score(config, params, tokens)[:, -arguments.new_tokens :]
  wide = dataclasses.replace(config, dtype="float32")
  return {
    "engine_against_trainer": compare(theirs, ours),
    "float32_against_trainer": compare(
      _score(wide, params, tokens)[:, -arguments.new_tokens :], ours
    ),
  }


def compare(inference_logprobs: np.ndarray, logprobs: np.ndarray) -> dict[str, float]:
  """Differences, in nats; the KL's estimator is computed in float64."""
  d = logprobs.astype(np.float64) - inference_logprobs.astype(np.float64)
  return {
    "max_difference": float(np.max(np.abs(d))),
    "mean_difference": float(np.mean(np.abs(d))),
    "bitwise_share": float(np.mean(inference_logprobs == logprobs)),
    "mismatch_kl": float(np.mean(np.expm1(d) - d)),
  }


def _score(config: ModelConfig, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
  """The trainer's logprobs of tokens 1, 2, ..., float32 [B, T - 1]."""

  @jax.jit
  def score(params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    output: Any = transformer.Transformer(config).apply(
      {"params": params}, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
    )
    hidden_ND = output.hidden_BTD[:, :-1].reshape(-1, config.embed_dim)
    targets_N = tokens_BT[:, 1:].reshape(-1)
    scores = chunked_logprobs(
      hidden_ND,
      transformer.head(params, config),
      targets_N,
      temperature_N=jnp.ones(targets_N.size, jnp.float32),
      chunk_size=512,
    )
    return scores.logprobs_N.reshape(tokens_BT.shape[0], -1)

  return np.asarray(score(params, tokens_BT))


if __name__ == "__main__":
  main()
