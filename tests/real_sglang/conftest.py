"""The server that the suite runs against: our engine, and with the marker a real SGLang."""

import pytest

from intellect3.rl import checks
from tests.real_sglang import checkpoints, remote
from tools.sglang import environment

KINDS = ("engine", pytest.param("sglang", marks=pytest.mark.real_sglang))


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
  """The three checkpoints."""
  base = tmp_path_factory.mktemp("checkpoints")
  made = {}
  for name, params in (
    ("first", checkpoints.random_params(0)),
    ("second", checkpoints.random_params(1)),
    ("scripted", checkpoints.scripted_params()),
  ):
    made[name] = remote.Checkpoint(checkpoints.write(base / name, params), params)
  return made


@pytest.fixture(scope="session", params=KINDS)
def served(request, directories, tmp_path_factory):
  """One server of each kind for all tests."""
  if request.param == "sglang" and (
    reason := environment.why_not_ready(environment.DEFAULT_DIRECTORY)
  ):
    pytest.skip(reason)
  (port,) = checks.free_ports("127.0.0.1", 1)
  log = tmp_path_factory.mktemp(request.param) / "log"
  with remote.START[request.param](directories["first"].directory, port, log):
    yield remote.Remote(f"http://127.0.0.1:{port}", request.param, **directories)


@pytest.fixture
def server(served):
  """The server with the first checkpoint as version 0, and nothing in its cache."""
  served.run(lambda opened: opened.restore(served.first, 0))
  return served
