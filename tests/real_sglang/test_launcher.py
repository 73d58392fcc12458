"""The installer's and launcher's own behaviour; what needs no SGLang is in the default suite."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from intellect3.rl import checks
from tests.real_sglang import checkpoints
from tools.sglang import environment, install, serve


@pytest.fixture
def model(tmp_path):
  return checkpoints.write(tmp_path / "model", checkpoints.scripted_params())


def test_pins_are_exact_and_of_what_must_not_drift():
  pins = [line for line in environment.PINS.read_text().splitlines() if not line.startswith("#")]
  names = [line.partition("==")[0] for line in pins]
  assert all(line.count("==") == 1 and "+" not in line for line in pins)
  assert len(set(names)) == len(names) > 100
  assert {"sglang", "torch", "transformers", "xgrammar", "sglang-router"} <= set(names)


def test_an_environment_is_ready_only_with_the_stamp_of_these_pins(tmp_path):
  assert "no SGLang" in environment.why_not_ready(tmp_path)
  python = environment.python_of(tmp_path)
  python.parent.mkdir()
  python.touch()
  assert "not complete" in environment.why_not_ready(tmp_path)
  environment.stamp_of(tmp_path).write_text("other\n")
  assert "other pins" in environment.why_not_ready(tmp_path)
  environment.stamp_of(tmp_path).write_text(environment.digest() + "\n")
  assert environment.why_not_ready(tmp_path) is None
  install.install(tmp_path, python="never asked")


def test_a_python_of_another_version_is_refused(tmp_path):
  python = tmp_path / "python"
  python.write_text("#!/usr/bin/env bash\necho 3 10\n")
  python.chmod(0o755)
  with pytest.raises(install.InstallError, match=r"expected 3\.11 to 3\.13, got 3\.10"):
    install.install(tmp_path / "environment", python=str(python))
  assert not (tmp_path / "environment").exists()


def test_own_flags_win_over_the_launchers(tmp_path):
  argv = serve.command(tmp_path, tmp_path / "m", "h", 7, ["--context-length", "99"])
  assert argv[:3] == [str(tmp_path / "bin" / "python"), "-m", "sglang.launch_server"]
  last = len(argv) - 1 - argv[::-1].index("--context-length")
  assert argv.count("--context-length") == 2 and argv[last + 1] == "99"


def test_what_is_wrong_is_said_before_anything_starts(tmp_path, model):
  (port,) = checks.free_ports("127.0.0.1", 1)
  with pytest.raises(ValueError, match=r"model: expected a directory with a config\.json"):
    serve.Server(tmp_path, port=port, log=tmp_path / "log")
  with pytest.raises(serve.ServerNotStarted, match="make sglang"):
    serve.Server(model, port=port, log=tmp_path / "log", directory=tmp_path)
  with pytest.raises(ValueError, match="port: expected 1 to 65535"):
    serve.Server(model, port=0, log=tmp_path / "log")
  assert not (tmp_path / "log").exists()


def fake_environment(directory, program):
  """An environment whose interpreter is a script."""
  python = environment.python_of(directory)
  python.parent.mkdir(parents=True)
  python.write_text(f"#!/usr/bin/env bash\n{program}\n")
  python.chmod(0o755)
  environment.stamp_of(directory).write_text(environment.digest() + "\n")
  return directory


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path, model):
  directory = fake_environment(tmp_path / "fake", "echo 'ValueError: out of luck'; exit 3")
  (port,) = checks.free_ports("127.0.0.1", 1)
  with (
    serve.Server(model, port=port, log=tmp_path / "log", directory=directory) as server,
    pytest.raises(serve.ServerNotStarted, match="ended with 3: ValueError: out of luck"),
  ):
    server.wait(30.0)


def test_a_server_that_never_answers_is_ended_with_all_it_started(tmp_path, model):
  directory = fake_environment(
    tmp_path / "fake", f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/child; wait; sleep 300"
  )
  (port,) = checks.free_ports("127.0.0.1", 1)
  said = []
  with serve.Server(model, port=port, log=tmp_path / "log", directory=directory) as server:
    with pytest.raises(serve.ServerNotStarted, match="no answer after 1 s"):
      server.wait(1.0, said.append)
    child = int((tmp_path / "child").read_text())
    server.kill()
    assert server.process.poll() is not None
    assert gone([child])


def gone(pids, seconds=20.0):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    alive = [pid for pid in pids if psutil.pid_exists(pid)]
    if all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in alive):
      return True
    time.sleep(0.1)
  return False


@pytest.mark.real_sglang
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_serves_and_leaves_nothing_behind(model, how):
  if reason := environment.why_not_ready(environment.DEFAULT_DIRECTORY):
    pytest.skip(reason)
  (port,) = checks.free_ports("127.0.0.1", 1)
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "tools.sglang.serve", "--model", str(model), "--port", str(port)),
      *("--", "--served-model-name", "mine"),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    lines = iter(process.stderr.readline, "")
    assert any("ready after" in line and f":{port}" in line for line in lines)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
      assert b'"mine"' in answer.read()
    started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(started) >= 3
    os.kill(process.pid, how)
    process.wait(30)
    assert gone(started)
  finally:
    process.kill()
    process.wait()


def test_the_paths_of_the_shim_exist():
  assert (environment.SHIM / "sitecustomize.py").is_file()
  assert (environment.SHIM / "sgl_kernel" / "__init__.py").is_file()
  ignored = pathlib.Path(".gitignore").read_text().splitlines()
  assert "/.sglang/" in ignored
