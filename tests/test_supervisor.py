"""Processes of a run: who died, why, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from intellect3 import supervisor


def child(tmp_path, name, code, *, ends_run=True, **options):
  return supervisor.Child(
    name=name,
    command=[sys.executable, "-c", code],
    log=tmp_path / f"{name}.log",
    ends_run=ends_run,
    **options,
  )


def alive(pid):
  """Whether a process runs; one that is dead and not yet collected by init does not."""
  try:
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False


def gone_within(pid, seconds):
  deadline = time.monotonic() + seconds
  while alive(pid) and time.monotonic() < deadline:
    time.sleep(0.02)
  return not alive(pid)


# A process that ignores SIGTERM and has a grandchild which does so too.
STUBBORN = (
  "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
  "code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)';"
  "p = subprocess.Popen([sys.executable, '-c', code]); print('pid', p.pid, flush=True);"
  "time.sleep(600)"
)


def test_a_run_ends_when_all_that_should_have_ended(tmp_path):
  supervisor.supervise(
    [
      child(tmp_path, "server", "import time; time.sleep(600)", ends_run=False),
      child(tmp_path, "trainer", "print('done')"),
    ],
    tick=lambda: None,
    interval_seconds=0.02,
  )
  assert (tmp_path / "trainer.log").read_text() == "done\n"


def test_a_failure_names_child_reason_and_log_and_ends_the_others(tmp_path):
  with pytest.raises(supervisor.ChildFailed) as failure:
    supervisor.supervise(
      [
        child(tmp_path, "server", STUBBORN, ends_run=False),
        child(tmp_path, "trainer", "import time; time.sleep(1); raise ValueError('row too long')"),
      ],
      tick=lambda: None,
      interval_seconds=0.02,
      patience_seconds=0.5,
    )
  message = str(failure.value)
  assert "trainer ended with exit code 1" in message
  assert "ValueError: row too long" in message
  assert str(tmp_path / "trainer.log") in message
  grandchild = int((tmp_path / "server.log").read_text().split()[1])
  assert gone_within(grandchild, 5.0)


@pytest.mark.parametrize(
  ("culprit", "said"),
  [
    ("os.kill(os.getpid(), signal.SIGKILL)", "trainer_1 was killed by SIGKILL"),
    ("print('error: no progress', flush=True); os._exit(74)", "trainer_1 ended with exit code 74"),
  ],
)
def test_of_those_that_die_together_the_one_that_did_so_by_itself_is_named(tmp_path, culprit, said):
  marker = tmp_path / "gone"
  wait = f"import os, pathlib, signal, time; m = pathlib.Path({str(marker)!r})"
  loses = f"{wait}\nwhile not m.exists(): time.sleep(0.01)\n"
  with pytest.raises(supervisor.ChildFailed, match=said):
    supervisor.supervise(
      [
        child(tmp_path, "trainer", f"{loses}raise RuntimeError('a peer is gone')"),
        child(tmp_path, "trainer_1", f"{wait}; time.sleep(0.5); m.touch(); {culprit}"),
        child(tmp_path, "trainer_2", f"{loses}os.abort()"),
      ],
      tick=lambda: None,
      interval_seconds=0.5,
    )


def test_a_server_that_ends_early_is_a_failure_even_with_code_0(tmp_path):
  with pytest.raises(supervisor.ChildFailed, match="server ended before the run did"):
    supervisor.supervise(
      [
        child(tmp_path, "server", "pass", ends_run=False),
        child(tmp_path, "trainer", "import time; time.sleep(600)"),
      ],
      tick=lambda: None,
      interval_seconds=0.02,
    )


def test_children_die_with_a_supervisor_that_is_killed(tmp_path):
  code = f"""
import pathlib, sys
from intellect3 import supervisor
supervisor.supervise([supervisor.Child(
  name="c", command=[sys.executable, "-c", "import os,time; print(os.getpid(), flush=True);"
    "time.sleep(600)"],
  log=pathlib.Path({str(tmp_path / "c.log")!r}), ends_run=True)], tick=lambda: None)
"""
  process = subprocess.Popen([sys.executable, "-c", code])
  log = tmp_path / "c.log"
  deadline = time.monotonic() + 30
  while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
    time.sleep(0.02)
  pid = int(log.read_text())
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert gone_within(pid, 5.0)


def test_last_words_prefer_the_line_that_says_what_went_wrong(tmp_path):
  log = tmp_path / "log"
  log.write_text("start\nTraceback\nintellect3.rollouts.RunFailed: no server is left\nbye\n")
  assert supervisor.last_words(log) == "intellect3.rollouts.RunFailed: no server is left"
  assert supervisor.last_words(tmp_path / "none") == "no log"


FOREVER = "import time; time.sleep(600)"
FAILS = "print('error: broken', flush=True); raise SystemExit(3)"


def servers_and(tmp_path, first, second, trainer):
  options = {"ends_run": False, "group": "servers"}
  supervisor.supervise(
    [
      child(tmp_path, "server_0", first, **options),
      child(tmp_path, "server_1", second, **options),
      child(tmp_path, "trainer", trainer),
    ],
    tick=lambda: None,
    interval_seconds=0.02,
  )


def test_one_of_a_group_may_fail_and_is_named(tmp_path, capfd):
  servers_and(tmp_path, FAILS, FOREVER, "import time; time.sleep(1)")
  said = capfd.readouterr().err
  assert said.count("server_0 ended with exit code 3") == 1 and "the run goes on" in said


def test_the_last_of_a_group_may_not(tmp_path):
  with pytest.raises(supervisor.ChildFailed, match=r"server_[01] ended with exit code 3"):
    servers_and(tmp_path, FAILS, FAILS, FOREVER)


def test_of_one_that_was_killed_the_signal_and_the_log_are_named_and_no_line_of_it(tmp_path):
  code = (
    "import os, signal; print('some error: long over', flush=True);"
    "os.kill(os.getpid(), signal.SIGKILL)"
  )
  with pytest.raises(supervisor.ChildFailed) as failure:
    supervisor.supervise(
      [child(tmp_path, "server_0", code, ends_run=False), child(tmp_path, "trainer", FOREVER)],
      tick=lambda: None,
      interval_seconds=0.02,
    )
  log = tmp_path / "server_0.log"
  assert str(failure.value) == f"server_0 was killed by SIGKILL (log: {log})"


def test_a_child_that_comes_back_does_not_end_the_run(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(supervisor, "RESTART_SECONDS", 0.01)
  marker = tmp_path / "marker"
  once = (
    f"import os, signal, time, pathlib; m = pathlib.Path({str(marker)!r});"
    "m.exists() and time.sleep(600); m.touch(); os.kill(os.getpid(), signal.SIGKILL)"
  )
  supervisor.supervise(
    [
      child(tmp_path, "server", once, ends_run=False, group="servers", restarts=1),
      child(tmp_path, "trainer", "import time; time.sleep(1)"),
    ],
    tick=lambda: None,
    interval_seconds=0.02,
  )
  said = capfd.readouterr().err
  assert "server was killed by SIGKILL" in said and "started again in 0.01 s" in said


def test_a_child_is_started_again_as_often_as_it_may_after_longer_and_longer(
  tmp_path, capfd, monkeypatch
):
  monkeypatch.setattr(supervisor, "RESTART_SECONDS", 0.01)
  log = tmp_path / "starts"
  code = f"open({str(log)!r}, 'a').write('x'); raise SystemExit(3)"
  with pytest.raises(supervisor.ChildFailed, match="server ended with exit code 3"):
    supervisor.supervise(
      [
        child(tmp_path, "server", code, ends_run=False, restarts=2),
        child(tmp_path, "trainer", FOREVER),
      ],
      tick=lambda: None,
      interval_seconds=0.02,
    )
  assert log.read_text() == "xxx"
  said = capfd.readouterr().err
  assert said.count("started again in 0.01 s") == said.count("started again in 0.02 s") == 1
