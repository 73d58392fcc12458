"""The processes meet, say who is missing, and hear how the others end; threads stand for them."""

import contextlib
import socket
import threading
import time

import pytest

from intellect3.distributed import meeting
from intellect3.distributed.cluster import Cluster
from intellect3.rl import checks


@pytest.fixture
def make():
  """Makes processes of one program, all with one free port."""
  (port,) = checks.free_ports("127.0.0.1", 1)
  made = []

  def one(index, count, start_seconds=20):
    cluster = Cluster(
      launcher="environment",
      coordinator=f"127.0.0.1:{port}",
      num_processes=count,
      process_id=index,
      start_seconds=start_seconds,
    )
    made.append(meeting.Meeting(cluster))
    return made[-1]

  one.port = port
  yield one
  for met in made:
    hang_up(met)


def hang_up(met):
  """What the kernel does with the connections of a process that is killed."""
  for line in met._lines.values():
    with contextlib.suppress(OSError):
      line.socket.shutdown(socket.SHUT_RDWR)
    line.socket.close()


def meet(*meetings):
  """All at once; gives what each was told instead of meeting, or None."""
  told = {}

  def one(met):
    try:
      met.meet()
    except meeting.NotMet as error:
      told[met] = str(error)

  threads = [threading.Thread(target=one, args=(met,)) for met in meetings]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return [told.get(met) for met in meetings]


def met(make, count, victim=None):
  """So many that have met and, but for the victim, watch; and what each is told of a lost one."""
  meetings = [make(index, count) for index in range(count)]
  assert meet(*meetings) == [None] * count
  losses = [[] for _ in meetings]
  for index, one in enumerate(meetings):
    if index != victim:
      one.watch(losses[index].append)
  return meetings, losses


def test_one_that_never_comes_is_named_by_all_that_did(make):
  told = meet(make(0, 4, start_seconds=2), make(1, 4), make(3, 4))
  for index, line in zip((0, 1, 3), told, strict=True):
    assert line == (
      f"coordinator 127.0.0.1:{make.port}: expected 4 processes within 2 s, got 3: 0, 1, 3; "
      f"missing: 2 (process {index} of 4)"
    )


def test_a_coordinator_that_never_comes_is_named():
  (port,) = checks.free_ports("127.0.0.1", 1)
  alone = meeting.Meeting(
    Cluster(
      launcher="slurm",
      coordinator=f"127.0.0.1:{port}",
      num_processes=2,
      process_id=1,
      start_seconds=1,
    )
  )
  with pytest.raises(meeting.NotMet) as failure:
    alone.meet()
  assert str(failure.value) == (
    f"coordinator 127.0.0.1:{port}: expected process 0 to answer within 1 s, "
    "got: Connection refused (process 1 of 2)"
  )


def test_a_port_that_is_taken_is_named(make):
  with socket.create_server(("127.0.0.1", make.port)), pytest.raises(meeting.NotMet) as failure:
    make(0, 2).meet()
  assert "a port that process 0 can listen on, got: Address already in use" in str(failure.value)


def test_strangers_are_not_let_in_and_do_not_disturb(make):
  first, second = make(0, 3), make(2, 3)
  told = []
  thread = threading.Thread(target=lambda: told.extend(meet(first, second)))
  thread.start()
  time.sleep(0.3)
  assert "INTELLECT3_NUM_PROCESSES: expected process 0's 3, got 4" in meet(make(1, 4))[0]
  assert "PROCESS_ID: expected each of 3 processes once, got 2 again" in meet(make(2, 3))[0]
  for said in (b"GET / HTTP/1.1\n", b"7\n", b'{"process": [1], "processes": 3}\n', b""):
    with socket.create_connection(("127.0.0.1", make.port)) as stranger:
      stranger.sendall(said)
  assert meet(make(1, 3)) == [None]
  thread.join(20)
  assert told == [None, None]


@pytest.mark.parametrize(
  ("index", "said"),
  [
    (0, "process 0 of 3, the coordinator (127.0.0.1:{}), ended without a word: killed, or cut off"),
    (1, "process 1 of 3 ended without a word: killed, or cut off"),
  ],
)
def test_all_hear_of_one_that_is_killed(make, index, said):
  meetings, losses = met(make, 3, index)
  hang_up(meetings[index])
  for other in {0, 1, 2} - {index}:
    assert meetings[other].wait_lost(20) == said.format(make.port)
    deadline = time.monotonic() + 20
    while not losses[other] and time.monotonic() < deadline:
      time.sleep(0.01)
    assert losses[other] == [said.format(make.port)]


def test_all_hear_why_one_fails_and_nothing_of_those_that_leave(make):
  meetings, losses = met(make, 3, 1)
  meetings[1].leave()
  hang_up(meetings[1])
  assert meetings[0].wait_lost(0.2) is None
  meetings[2].leave("ValueError: rows")
  assert meetings[0].wait_lost(20) == "process 2 of 3 failed: ValueError: rows"
  hang_up(meetings[2])
  meetings[0].wait_alone(20)
  assert meetings[0]._gone.is_set() and len(losses[0]) == 1
