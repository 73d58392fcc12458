"""The engine as a process: what it says when it cannot start, and how it ends."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from engine_http import Client

from intellect3.inference.engine import flags

ROOT = pathlib.Path(__file__).resolve().parents[3]


def start(*arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "intellect3.inference.engine", *map(str, arguments)],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )


def refused(*arguments):
  """Runs to the end; returns the one line on stderr."""
  process = start(*arguments)
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == 2, stderr
  lines = stderr.strip().splitlines()
  assert len(lines) == 1, stderr
  return lines[0]


def test_a_busy_port_is_told_in_one_line(models):
  with socket.create_server(("127.0.0.1", 0)) as busy:
    port = busy.getsockname()[1]
    line = refused("--model", models[0], "--port", port)
  assert str(port) in line and "in use" in line


def test_a_broken_model_directory_is_told_in_one_line(models, tmp_path):
  (tmp_path / "config.json").write_text((models[0] / "config.json").read_text())
  (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
  assert str(tmp_path) in refused("--model", tmp_path, "--port", 0)


def test_a_context_beyond_the_models_positions_is_told_in_one_line(models):
  line = refused("--model", models[0], "--port", 0, "--context-length", 5000)
  assert "context_length" in line and "5000" in line


def test_a_cache_that_is_smaller_than_the_context_is_told_as_given(models):
  line = refused(
    "--model", models[0], "--port", 0, "--context-length", 100, "--max-total-tokens", 127
  )
  assert "max_total_tokens: expected at least 128" in line and line.endswith("got 127")


@pytest.mark.parametrize(
  ("flag", "given", "expected"),
  [
    ("--port", "99999", "0 to 65535"),
    ("--port", "-1", "0 to 65535"),
    ("--port", "x", "0 to 65535"),
    ("--max-top-logprobs", "-1", "at least 0"),
    ("--queue-limit", "-1", "at least 0"),
    ("--random-seed", "-1", "at least 0"),
    ("--context-length", "1", "at least 2"),
    ("--slots", "0", "at least 1"),
    ("--slots", "2.5", "at least 1"),
    ("--prefill-rows", "0", "at least 1"),
    ("--prefill-chunk", "0", "at least 1"),
    ("--prefill-chunk", "24", "a divisor of --page-size (64)"),
    ("--decode-steps", "0", "at least 1"),
    ("--page-size", "-64", "at least 1"),
    ("--max-total-tokens", "0", "at least 1"),
    ("--tp-size", "0", "at least 1"),
  ],
)
def test_flags_out_of_bounds_are_told_in_one_line(capsys, flag, given, expected):
  with pytest.raises(SystemExit) as ended:
    flags.parse(["--model", "m", "--port", "0", f"{flag}={given}"])
  assert ended.value.code == 2
  [line] = capsys.readouterr().err.splitlines()
  assert flag in line and f"{expected}, got {given}" in line


def test_the_bounds_themselves_are_taken():
  settings = flags.parse(
    ["--model", "m", "--port", "65535", "--queue-limit", "0", "--max-top-logprobs", "0"]
  )
  assert (settings.port, settings.queue_limit, settings.max_top_logprobs) == (65535, 0, 0)


def test_a_signal_ends_it_at_once_and_waiting_requests_are_answered(models):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  process = start(
    *("--model", models[0], "--port", port, "--context-length", 512, "--slots", 4),
    *("--prefill-rows", 2, "--prefill-chunk", 8),
  )
  try:
    client, deadline = Client(port), time.monotonic() + 120
    while True:
      assert process.poll() is None and time.monotonic() < deadline
      with contextlib.suppress(OSError):
        if client.call("GET", "/health")[0] == 200:
          break
      time.sleep(0.05)
    assert client.call("GET", "/health_generate")[0] == 200
    client.post("/pause_generation", mode="in_place")  # else it might be too fast
    future = client.later([1, 2, 3], sampling={"max_new_tokens": 500, "ignore_eos": True})
    client.wait_until(lambda state: state["waiting_requests"] == 1)
    process.send_signal(signal.SIGTERM)
    assert future.result(10)["meta_info"]["finish_reason"]["type"] == "abort"
    assert process.wait(10) == 0
    stderr = process.stderr.read()
    assert "SIGTERM" in stderr and "Traceback" not in stderr, stderr
  finally:
    process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_die_with_parent_leaves_no_orphan():
  child = (
    "from intellect3.inference.engine.__main__ import _die_with_parent as tie; tie(); "
    "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
  )
  parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
  process = subprocess.Popen(
    [sys.executable, "-c", parent, child], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  pid = int(process.stdout.readline())
  process.kill()
  process.wait()
  deadline = time.monotonic() + 10
  while os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in status(pid):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def status(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return "\nState:\tZ"


def test_the_death_of_the_engine_ends_the_process_with_a_line_in_the_log():
  code = (
    "import logging, threading, time; logging.basicConfig(); "
    "from intellect3.inference.engine import server; "
    "threading.Thread(target=server._die, args=(RuntimeError('broken cache'),)).start(); "
    "time.sleep(60)"
  )
  process = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
  )
  assert process.returncode == 1
  assert "engine died" in process.stderr and "broken cache" in process.stderr
