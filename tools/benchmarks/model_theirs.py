"""The other side of the model benchmark: transformers' Glm4MoeForCausalLM, no optimizer.

One process of `tools.benchmarks.model`; it imports no jax. SDPA without a mask (every row is one
document, so torch takes its causal path), no gradient checkpointing.
"""

import pathlib
import time

import numpy as np
import torch
import transformers


class Theirs:
  """The model of a directory and one batch."""

  def __init__(
    self, directory: pathlib.Path, batch: dict[str, np.ndarray], *, threads: int, experts: str
  ):
    """Loads the weights.

    Args:
      directory: a Hugging Face model directory.
      batch: the fields of a `Batch` whose rows are one document each, NumPy.
      threads: of torch.
      experts: transformers' experts implementation.
    """
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    self.versions = (
      f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    )
    self._model = transformers.Glm4MoeForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    self._model.train()
    self._tokens = torch.from_numpy(batch["tokens"]).long()

  def loss(self) -> float:
    """One forward and backward pass; returns the mean cross entropy of all but first tokens."""
    self._model.zero_grad(set_to_none=True)
    logits = self._model(input_ids=self._tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits[:, :-1].flatten(0, 1), self._tokens[:, 1:].flatten()
    )
    loss.backward()
    return float(loss.detach())

  def gradient_norm(self) -> float:
    """The global norm of the last pass's gradients."""
    gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))

  def matmul_seconds(self, size: int) -> float:
    """Seconds of a float32 product of two square matrices, the best of 5."""
    first, second = torch.randn(2, size, size)
    seconds = []
    for _ in range(5):
      start = time.perf_counter()
      first @ second
      seconds.append(time.perf_counter() - start)
    return min(seconds)
