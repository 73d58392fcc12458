"""Conversions and saves hold a few tensors, however large the model is."""

import pytest

from tools.benchmarks import checkpoints


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_model(tmp_path):
  """A model several times the bound; what is bounded is what comes on top of the imports."""
  found = checkpoints.run(1.2, str(tmp_path))
  assert found["model_gb"] > 1.0
  over = {action: figure["peak_over_base_gb"] for action, figure in found["actions"].items()}
  for action in ("hf-to-orbax", "orbax-to-hf", "verify"):
    assert over[action] < 0.35, over
  # The arrays themselves, once, and not a second time on their way to the device or the disk.
  for action in ("load-whole", "load-sharded", "save"):
    assert over[action] < found["model_gb"] + 0.25, over
