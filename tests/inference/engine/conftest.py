"""One server of the recorded model for the engine's tests."""

import pytest
from engine_http import MODEL_A, MODEL_B, serving


@pytest.fixture(scope="session")
def models():
  """Directories of the two recorded checkpoints."""
  return MODEL_A, MODEL_B


@pytest.fixture(scope="session")
def client(models):
  """A client of a server of the first checkpoint, with the recorded context length and flags.

  Tests leave it as they found it: not paused, nothing running, the first checkpoint served.
  """
  with serving(
    models[0],
    "--enable-return-routed-experts",
    context_length=1024,
    slots=8,
    prefill_rows=4,
    prefill_chunk=16,
    queue_limit=24,
    tool_call_parser="glm45",
    reasoning_parser="glm45",
  ) as client:
    yield client
