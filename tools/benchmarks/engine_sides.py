"""The sides of the engine's benchmark that answer without HTTP, each in its own process.

`generate` is the baseline: transformers' `generate` over a whole batch. `loop` is the engine's
batcher and device without a server. A side reads one JSON line per round from stdin and answers
with one: the seconds that the round took and the tokens that it sampled.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.benchmarks.side import Side, peak_mib

if TYPE_CHECKING:  # each side loads only what it runs
  from intellect3.inference.engine import server
  from intellect3.inference.engine.sequence import Sequence

Round = Callable[[list[list[int]], int], int]
"""(prompts, new tokens) -> tokens sampled."""

SIDES = ("generate", "loop")


def generate(model: str, options: dict[str, Any]) -> Round:
  """transformers' `generate`: sampled at temperature 1 with a static batch and its own cache."""
  import torch
  import transformers

  torch.set_num_threads(options["threads"])
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  experts = {"experts_implementation": options["experts"]} if options["experts"] else {}
  network = transformers.AutoModelForCausalLM.from_pretrained(
    model, dtype=torch.float32, attn_implementation="sdpa", **experts
  )
  network = network.to(options["device"]).eval()
  network.generation_config.eos_token_id = None

  def run(prompts: list[list[int]], new_tokens: int) -> int:
    ids = torch.tensor(prompts, device=network.device)
    with torch.inference_mode():
      out = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
      )
    return int(out[:, ids.shape[1] :].numel())

  return run


def loop(model: str, options: dict[str, Any]) -> Round:
  """The engine's own loop; every request with logprobs, as over HTTP."""
  from intellect3.inference.engine import flags, server

  arguments = ["--model", model, "--port", "0", *options["engine_flags"]]
  parts = server.build(flags.parse(arguments))

  def run(prompts: list[list[int]], new_tokens: int) -> int:
    return sum(len(one.output_ids) for one in sample(parts, prompts, new_tokens))

  return run


def sample(parts: "server.Parts", prompts: list[list[int]], new_tokens: int) -> "list[Sequence]":
  """Samples from the engine's loop at temperature 1 until all prompts have their tokens."""
  from intellect3.inference.engine.request import Request
  from intellect3.inference.engine.sequence import Sequence

  sequences = []
  for index, prompt in enumerate(prompts):
    request = Request(
      rid=str(index),
      input_ids=prompt,
      max_new_tokens=new_tokens,
      temperature=1.0,
      ignore_eos=True,
      return_logprob=True,
    )
    sequences.append(Sequence(request, seed=index, received=float(index)))
    parts.batcher.add(sequences[-1])
  while not parts.batcher.idle:
    plan = parts.batcher.plan()
    assert plan is not None
    parts.batcher.apply(plan, *parts.device.run(plan), version="0", now=time.time())
  return sequences


def start_side(name: str, model: str, options: dict[str, Any]) -> Side:
  """Starts a side's process and waits until it is ready; ask it `[prompts, new tokens]`."""
  threads = {"OMP_NUM_THREADS": str(options["threads"])}
  return Side(["tools.benchmarks.engine_sides", name, model, json.dumps(options)], threads)


def save_preset(name: str, directory: pathlib.Path) -> str:
  """Writes a preset with random weights; gives the directory."""
  import jax

  from intellect3.models import hf, presets, transformer

  config = getattr(presets, name)()
  hf.save(directory, config, jax.device_get(transformer.init(config, jax.random.key(0))))
  return str(directory)


def random_prompts(
  rng: np.random.Generator, count: int, length: int, vocab_size: int
) -> list[list[int]]:
  """Prompts that have nothing in common."""
  return rng.integers(1, vocab_size, (count, length)).tolist()


def main() -> None:
  """The body of a side's process."""
  parser = argparse.ArgumentParser()
  parser.add_argument("side", choices=SIDES)
  parser.add_argument("model")
  parser.add_argument("options", type=json.loads)
  arguments = parser.parse_args()
  run = {"generate": generate, "loop": loop}[arguments.side](arguments.model, arguments.options)
  print(json.dumps({"ready": arguments.side}), flush=True)
  for line in sys.stdin:
    prompts, new_tokens = json.loads(line)
    began = time.perf_counter()
    tokens = run(prompts, new_tokens)
    seconds = time.perf_counter() - began
    answer = {"seconds": seconds, "tokens": tokens, "peak_mib": peak_mib()}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
