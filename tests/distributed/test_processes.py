"""Two real processes: they agree, write one model together, and end when one of them does."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
import together

from intellect3.distributed import cluster, meeting, processes, watchdog
from intellect3.models import hf
from intellect3.rl import checks
from intellect3.sharding.mesh import make_mesh
from intellect3.training import checkpoint
from intellect3.weights import manifest, publish


def start(what, directory, count=2, **environment):
  (port,) = checks.free_ports("127.0.0.1", 1)
  here = pathlib.Path(__file__)
  command = [sys.executable, str(here.with_name("together.py")), what, str(directory)]
  started = []
  for index in range(count):
    own = cluster.variables(f"127.0.0.1:{port}", 2, index)
    path = {"PYTHONPATH": str(here.parents[2])}
    with (directory / f"{index}.log").open("w") as log:
      started.append(
        subprocess.Popen(
          command,
          stdout=log,
          stderr=subprocess.STDOUT,
          env={**os.environ, **own, **path, **environment},
        )
      )
  return started


def logs(directory):
  return [path.read_text() for path in sorted(directory.glob("[0-9].log"))]


def last_line(directory, index):
  return logs(directory)[index].splitlines()[-1]


@pytest.fixture
def ending():
  """Processes that a test leaves behind are killed."""
  started = []
  yield started.extend
  for process in started:
    process.kill()
    process.wait()


def test_two_write_what_one_would_and_read_what_one_wrote(tmp_path, ending):
  together.alone(tmp_path)
  started = start("all", tmp_path)
  ending(started)
  codes = [process.wait(100) for process in started]
  assert codes == [0, 0], "\n".join(text[-2000:] for text in logs(tmp_path))

  mesh = make_mesh(devices=jax.devices()[:1])
  expected = together.make_state(mesh, 0)
  params = expected.params
  # Published: the files that one process publishes, and a manifest that tells them all.
  publish.publish(
    tmp_path / "one",
    1,
    together.CONFIG,
    params,
    canary_ids=[1, 2],
    canary_logprobs=[0.0, -1.0],
    keep=1,
    shard_bytes=together.SHARD_BYTES,
  )
  assert manifest.verify(tmp_path / "weights" / "v_000001") == []
  assert manifest.read(tmp_path / "weights", 1) == manifest.read(tmp_path / "one", 1)
  hf.save(tmp_path / "saved", together.CONFIG, params, shard_bytes=together.SHARD_BYTES)
  for ours, theirs in (("weights/v_000001", "one/v_000001"), ("model", "saved")):
    files = sorted(path.name for path in (tmp_path / theirs).iterdir())
    assert sorted(path.name for path in (tmp_path / ours).iterdir()) == files and len(files) > 8
    for name in files:
      assert (tmp_path / ours / name).read_bytes() == (tmp_path / theirs / name).read_bytes(), name

  # The checkpoint of two processes, on one.
  state = together.make_state(mesh, 9)
  position = together.Position()
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as checkpoints, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # another machine: that is the point
    restored = checkpoints.restore(state, position)
  assert position.state == {"next_step": 8} and restored.meta == {"note": "two"}
  jax.tree.map(np.testing.assert_array_equal, restored.state, expected)


def kill(started, directory, index):
  """Waits until both are where they will stay, and kills one; gives the other."""
  deadline = time.monotonic() + 60
  while not all((directory / f"ready_{n}").exists() for n in range(2)):
    assert time.monotonic() < deadline, logs(directory)
    assert all(process.poll() is None for process in started), logs(directory)
    time.sleep(0.05)
  started[index].send_signal(signal.SIGKILL)
  return started[1 - index]


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_collective_ends_the_other(tmp_path, ending):
  started = start("hang", tmp_path, STALL="100")
  ending(started)
  assert kill(started, tmp_path, 1).wait(20) == meeting.EXIT_LOST
  assert last_line(tmp_path, 0) == (
    "error: process 0 of 2 ends since process 1 of 2 ended without a word: killed, or cut off"
  )


@pytest.mark.parametrize(
  ("index", "who"),
  [
    (1, "process 1 of 2"),
    pytest.param(0, r"process 0 of 2, the coordinator \(127.0.0.1:\d+\),", marks=pytest.mark.slow),
  ],
)
def test_one_that_is_killed_while_all_wait_is_the_others_last_word(tmp_path, ending, index, who):
  """Long before the heartbeat: nothing of it is waited for."""
  started = start("idle", tmp_path, INTELLECT3_HEARTBEAT_SECONDS="600")
  ending(started)
  assert kill(started, tmp_path, index).wait(20) == meeting.EXIT_LOST
  expected = f"error: process {1 - index} of 2 ends since {who} ended without a word: killed, or"
  assert re.match(expected, last_line(tmp_path, 1 - index)), logs(tmp_path)[1 - index]


@pytest.mark.slow
def test_one_that_fails_says_why_to_the_others(tmp_path, ending):
  started = start("fail", tmp_path)
  ending(started)
  assert [process.wait(60) for process in started] == [meeting.EXIT_LOST, 1]
  assert last_line(tmp_path, 1) == "error: process 1 of 2 failed: ValueError: what is wrong"
  assert last_line(tmp_path, 0) == (
    "error: process 0 of 2 ends since process 1 of 2 failed: ValueError: what is wrong"
  )


def test_one_that_never_comes_ends_the_other_with_one_line(tmp_path, ending):
  (first,) = start("idle", tmp_path, count=1, INTELLECT3_START_SECONDS="1")
  ending([first])
  assert first.wait(60) == 2
  assert re.fullmatch(
    r"error: coordinator 127.0.0.1:\d+: expected 2 processes within 1 s, got 1: 0; missing: 1 "
    r"\(process 0 of 2\)\n",
    logs(tmp_path)[0],
  )


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (3, 3), ("what is wrong", 1)])
def test_exit_codes_are_the_interpreters(given, code):
  assert processes.exit_code(given) == code


def test_a_collective_that_one_never_enters_ends_with_stacks(tmp_path, ending):
  started = start("hang", tmp_path, STALL="3")
  ending(started)
  assert started[0].wait(60) == watchdog.EXIT_STALLED
  said = logs(tmp_path)[0]
  last = said.strip().splitlines()[-1]
  assert "error: trainer, process 0 of 2: step 2: no progress in the train step for" in last
  assert "in hang" in said and "Current thread" in said
