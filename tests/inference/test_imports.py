"""The client's side loads no jax: workers and the orchestrator import nothing else of ours."""

import subprocess
import sys

MODULES = [
  "intellect3.rendering.tokenizer_files",
  "intellect3.environments.reverse_text",
  "intellect3.environments.arithmetic",
  "intellect3.inference.client",
  "intellect3.inference.weight_sync",
  "intellect3.inference.launch",
  "intellect3.rollouts.conversation",
]


def test_nothing_here_imports_jax():
  code = f"import sys, {', '.join(MODULES)}; print(*sorted(sys.modules))"
  loaded = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout.split()
  assert "intellect3.inference.balance" in loaded
  assert not {"jax", "jaxlib", "flax", "torch", "transformers"} & set(loaded)
