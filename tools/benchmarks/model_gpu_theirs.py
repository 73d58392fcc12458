"""transformers with torch.compile on a GPU: the other side of `model_gpu`, a process of its own.

Reads one JSON question from stdin, prints one JSON answer; imports no jax. bfloat16 weights, SDPA,
grouped experts, gradient checkpointing of every layer as on our side. Where torch sees no GPU the
answer says so.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
  """Answers the question on stdin."""
  question = json.load(sys.stdin)
  print(json.dumps(answer(question)))


def answer(question: dict[str, Any]) -> Any:
  """Figures per number of tokens, or why there are none.

  Args:
    question: what (`stack`: hidden states forward and backward, `qwen`: a full step with AdamW),
      config (a `config.json`), tokens (list), layers (tried in this order until one fits), calls,
      dry_run (on the CPU, not compiled).
  """
  import torch
  import transformers

  dry_run = question["dry_run"]
  if not torch.cuda.is_available() and not dry_run:
    return {"skipped": f"torch {torch.__version__} sees no GPU"}
  device = "cpu" if dry_run else "cuda"
  transformers.logging.set_verbosity_error()
  figures = []
  for tokens in question["tokens"]:
    for layers in question["layers"]:
      try:
        figures.append(_measure(question, device, tokens, layers))
        break
      except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    else:
      figures.append({"tokens": tokens, "fits": False})
  return {"versions": f"torch {torch.__version__}, transformers {transformers.__version__}"} | {
    "figures": figures
  }


def _measure(question: dict[str, Any], device: str, tokens: int, layers: int) -> dict[str, Any]:
  import torch
  import transformers

  values = {**question["config"], "num_hidden_layers": layers, "dtype": "bfloat16"}
  values.pop("layer_types", None)
  config = transformers.AutoConfig.for_model(**values)
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
      config,
      attn_implementation="sdpa",
      dtype=torch.bfloat16,
      **({} if question["what"] == "qwen" else {"experts_implementation": "grouped_mm"}),
    )
  model.train()
  model.gradient_checkpointing_enable({"use_reentrant": False})
  ids = (torch.arange(tokens, device=device) % config.vocab_size)[None]
  if question["what"] == "stack":
    body = model.model if question["dry_run"] else torch.compile(model.model)

    def call() -> None:
      model.zero_grad(set_to_none=True)
      body(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()
  else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0, fused=True)
    body = model if question["dry_run"] else torch.compile(model)

    def call() -> None:
      optimizer.zero_grad(set_to_none=True)
      body(input_ids=ids, labels=ids, use_cache=False).loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()

  seconds = _seconds(call, question["calls"], device)
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
  return {
    "tokens": tokens,
    "layers": layers,
    "seconds": seconds,
    "tokens_per_second": tokens / seconds,
    "peak_gib": peak / 2**30,
  }


def _seconds(call: Callable[[], None], calls: int, device: str) -> float:
  import torch

  seconds = []
  for repetition in range(calls + 2):
    start = time.perf_counter()
    call()
    if device == "cuda":
      torch.cuda.synchronize()
    if repetition >= 2:
      seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


if __name__ == "__main__":
  main()
