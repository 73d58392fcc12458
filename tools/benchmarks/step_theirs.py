"""The other side of the step benchmark: transformers' Glm4MoeForCausalLM and torch's AdamW.

One process of `tools.benchmarks.step`; it imports no jax. Everything is set as a user who wants
speed on a CPU would set it: SDPA attention, fused AdamW, no gradient checkpointing, and the experts
implementation that the driver asks for.
"""

import pathlib
from collections.abc import Callable

import numpy as np
import torch
import transformers


def packed_mask(segment_ids: np.ndarray) -> torch.Tensor:
  """Block-diagonal causal mask bool[rows, 1, length, length] of packed rows.

  A query sees the keys of its own segment up to itself. Padding is a segment of its own here, since
  a softmax over nothing is NaN; no real token sees it.
  """
  segments = torch.from_numpy(segment_ids)
  same = segments[:, None, :, None] == segments[:, None, None, :]
  length = segment_ids.shape[1]
  return same & torch.ones(length, length, dtype=torch.bool).tril()


def prepare(
  directory: pathlib.Path,
  batch: dict[str, np.ndarray],
  *,
  learning_rate: float,
  clip_norm: float,
  threads: int,
  experts: str,
) -> tuple[Callable[[], tuple[float, float]], str]:
  """Loads the weights of `directory` and returns one train step and its description.

  Args:
    directory: a Hugging Face model directory.
    batch: the fields of a packed `Batch`, NumPy.
    learning_rate: of AdamW, constant.
    clip_norm: largest global norm of the gradient.
    threads: of torch.
    experts: transformers' experts implementation.

  Returns:
    A function that trains one step and gives (loss before it, gradient norm), and the versions.
  """
  torch.set_num_threads(threads)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  model = transformers.Glm4MoeForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
  )
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=True
  )
  tokens = torch.from_numpy(batch["tokens"]).long()
  positions = torch.from_numpy(batch["positions"]).long()
  attention_mask = packed_mask(batch["segment_ids"])
  loss_mask = torch.from_numpy(batch["loss_mask"])[:, 1:].float()
  denominator = float(batch["loss_tokens"])

  def step() -> tuple[float, float]:
    output = model(
      input_ids=tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False
    )
    entropies = torch.nn.functional.cross_entropy(
      output.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    loss = (entropies * loss_mask).sum() / denominator
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return float(loss.detach()), float(norm)

  versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
  return step, versions
