"""The sides of the engine's benchmark that answer without HTTP, each in its own process.

`generate` is the baseline: transformers' `generate` over a whole batch. `loop` is the engine's
batcher and device without a server. A side reads one JSON line per round from stdin and answers
with one: the seconds that the round took and the tokens that it sampled.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

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
  from intellect3.inference.engine.request import Request
  from intellect3.inference.engine.sequence import Sequence

  arguments = ["--model", model, "--port", "0", *options["engine_flags"]]
  parts = server.build(flags.parse(arguments))
  batcher, device = parts.batcher, parts.device

  def run(prompts: list[list[int]], new_tokens: int) -> int:
    for index, prompt in enumerate(prompts):
      request = Request(
        rid=str(index),
        input_ids=prompt,
        max_new_tokens=new_tokens,
        temperature=1.0,
        ignore_eos=True,
        return_logprob=True,
      )
      batcher.add(Sequence(request, seed=index, received=float(index)))
    tokens = 0
    while not batcher.idle:
      plan = batcher.plan()
      assert plan is not None
      done = batcher.apply(plan, *device.run(plan), version="0", now=time.time())
      tokens += sum(len(sequence.output_ids) for sequence in done)
    return tokens

  return run


class Side:
  """The process of one side, from its start until `close`."""

  def __init__(self, name: str, model: str, options: dict[str, Any]):
    """Starts the process and waits until it is ready."""
    command = [sys.executable, "-m", "tools.benchmarks.engine_sides", name, model]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"])}
    self._process = subprocess.Popen(
      [*command, json.dumps(options)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    self.versions = self._answer()

  def round(self, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """One round; `seconds`, `tokens` and the process's `peak_mib`."""
    assert self._process.stdin is not None
    self._process.stdin.write(json.dumps([prompts, new_tokens]) + "\n")
    self._process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    """Ends the process; call it in every case."""
    self._process.communicate()

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"benchmark side ended early, exit code {self._process.wait()}")
    return json.loads(line)


def random_prompts(
  rng: np.random.Generator, count: int, length: int, vocab_size: int
) -> list[list[int]]:
  """Prompts that have nothing in common."""
  return rng.integers(1, vocab_size, (count, length)).tolist()


def peak_mib(pid: int | str = "self") -> float:
  """High-water mark of a process's resident set, in MiB."""
  for line in pathlib.Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) / 1024
  raise RuntimeError(f"/proc/{pid}/status: expected a line VmHWM, got none")


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
