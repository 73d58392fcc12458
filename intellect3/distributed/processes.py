"""The processes of one program: started together, agreeing through the coordinator, ended together.

Place in the ring: `rl.trainer` and `sft` run inside `started`. What is agreed here (which batch is
there, whether to stop, what was written) travels through the coordinator's small key-value store
and not through collectives of the devices, so it may be asked from any thread and in any order
relative to the devices' work.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import jax

from intellect3.distributed import meeting
from intellect3.distributed.cluster import Cluster

logger = logging.getLogger(__name__)

_POLL_MS = 1000
_CHUNK = 1 << 20
"""Most bytes of one value; the store's messages are bounded."""
_GRACE_SECONDS = 0.5
"""How long an end may wait for the words of others."""


class Stop(Protocol):
  """What ends a wait."""

  def is_set(self) -> bool:
    """Whether to end."""
    ...


class Processes:
  """This process among the others. Values are what JSON holds; names may be used again."""

  def __init__(self, index: int = 0, count: int = 1, store: Any = None) -> None:
    """One of `count`.

    Args:
      index: this process's number.
      count: of processes.
      store: the client of the coordinator; not asked where there is one process.
    """
    self.index = index
    self.count = count
    self._store = store
    self._uses: Counter[str] = Counter()

  @property
  def is_first(self) -> bool:
    """Whether this one speaks for all: talks to others, writes metrics, removes old files."""
    return self.index == 0

  @property
  def name(self) -> str:
    """For people."""
    return f"process {self.index} of {self.count}"

  def post(self, name: str, value: Any) -> None:
    """Process 0 says a value once under a name of its own, for `await_post`."""
    if self.count > 1:
      self._put(f"post/{name}", value)

  def await_post(self, name: str, stop: Stop | None = None) -> Any:
    """What process 0 posted; waits for it. None where `stop` was set before it came.

    Every other process takes it, once; the last to do so removes it from the store.
    """
    return self._take_once(f"post/{name}", stop)

  def broadcast(self, name: str, value: Any) -> Any:
    """Process 0's value, on every process; all must call it, as often for each name."""
    if self.count == 1:
      return value
    key = self._next(name)
    if self.is_first:
      self._put(key, value)
      return value
    return self._take_once(key)

  def gather(self, name: str, value: Any) -> list[Any]:
    """Every process's value, in their order, on every process; all must call it likewise."""
    if self.count == 1:
      return [value]
    key = self._next(name)
    self._put(f"{key}/{self.index}", value)
    values = [self._take(f"{key}/{other}") for other in range(self.count)]
    # Whoever put a value here had taken all of the call before.
    before = self._uses[name] - 1
    if before:
      self._store.key_value_delete(f"intellect3/{name}/{before}/{self.index}/")
    return values

  def barrier(self, name: str) -> None:
    """Returns once every process is here."""
    self.gather(name, None)

  def _next(self, name: str) -> str:
    self._uses[name] += 1
    return f"{name}/{self._uses[name]}"

  def _put(self, key: str, value: Any) -> None:
    text = json.dumps(value)
    parts = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
    for number, part in enumerate(parts):
      self._store.key_value_set(f"intellect3/{key}/{number}", part)
    self._store.key_value_set(f"intellect3/{key}/count", str(len(parts)))

  def _take_once(self, key: str, stop: Stop | None = None) -> Any:
    """As `_take`; of the processes that do so, all but the first, the last deletes the value."""
    value = self._take(key, stop)
    # A value may be None: whether there was one, only a stop leaves open.
    if value is None and stop is not None and stop.is_set():
      return None
    if self._store.key_value_increment(f"intellect3/{key}/taken", 1) == self.count - 1:
      self._store.key_value_delete(f"intellect3/{key}/")
    return value

  def _take(self, key: str, stop: Stop | None = None) -> Any:
    count = self._wait(f"intellect3/{key}/count", stop)
    if count is None:
      return None
    parts = [self._wait(f"intellect3/{key}/{number}", None) for number in range(int(count))]
    return json.loads("".join(map(str, parts)))

  def _wait(self, key: str, stop: Stop | None) -> str | None:
    while stop is None or not stop.is_set():
      try:
        return self._store.blocking_key_value_get(key, _POLL_MS)
      except Exception as error:  # jaxlib's own class; a time-out is no failure
        if "DEADLINE_EXCEEDED" not in str(error):
          raise
    return None


ALONE = Processes()
"""Of a program that is one process."""


@contextlib.contextmanager
def started(cluster: Cluster) -> Iterator[None]:
  """Starts `jax.distributed`, before any device is touched; `here` then knows of the others.

  The processes meet first (`distributed.meeting`): where they do not within `start_seconds`, one
  line says who is missing. A process that fails inside ends at once, its traceback in the log, and
  tells the others why: at the usual end it would wait for them, which wait for it. They end with
  `meeting.EXIT_LOST` and a last line that names it, as they do where one is killed. Only where a
  process is there but silent (stopped, its memory exhausted) it is jax that aborts the others,
  after `heartbeat_seconds`.

  Args:
    cluster: of `cluster.detect`; of one process nothing is started.

  Raises:
    SystemExit: 2, the processes did not meet; nothing was started.
    RuntimeError: a device has been touched before.
  """
  if cluster.num_processes == 1:
    yield
    return
  logger.info(
    "process %d of %d (%s), coordinator %s",
    *(cluster.process_id, cluster.num_processes, cluster.launcher, cluster.coordinator),
  )
  met = meeting.Meeting(cluster)
  try:
    met.meet()
  except meeting.NotMet as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
  ending = threading.Lock()
  met.watch(lambda lost: _end_of_lost(cluster, met, ending, lost))
  try:
    # Only asked on CPUs; the default there has no collectives between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      cluster.coordinator,
      num_processes=cluster.num_processes,
      process_id=cluster.process_id,
      local_device_ids=cluster.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=cluster.start_seconds,
      heartbeat_timeout_seconds=cluster.heartbeat_seconds,
      shutdown_timeout_seconds=cluster.shutdown_seconds,
    )
    yield
    met.leave()
    jax.distributed.shutdown()
  except BaseException as error:
    _end_of_failure(cluster, met, ending, error)


def _end_of_failure(
  cluster: Cluster, met: meeting.Meeting, ending: threading.Lock, error: BaseException
) -> None:
  """Ends this process, which raised."""
  code, told = 1, f"{type(error).__name__}: {error}"
  if isinstance(error, SystemExit):
    code, told = exit_code(error.code), f"exit code {exit_code(error.code)}"
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
  else:
    traceback.print_exc()
    name = f"process {cluster.process_id} of {cluster.num_processes}"
    print(f"error: {name} failed: {told}", file=sys.stderr, flush=True)
    lost = met.wait_lost(_GRACE_SECONDS)  # a collective raises where another process is gone
    if lost is not None:
      _end_of_lost(cluster, met, ending, lost)
  sys.stdout.flush()
  with ending:
    met.leave(told if code else None)
    if not cluster.process_id:
      met.wait_alone(2 * _GRACE_SECONDS)
    os._exit(code)


def _end_of_lost(cluster: Cluster, met: meeting.Meeting, ending: threading.Lock, lost: str) -> None:
  """Ends this process because another one has; from whichever thread comes first."""
  with ending:
    if not lost.startswith("process 0 of"):  # then jax's client is about to abort
      time.sleep(_GRACE_SECONDS / 2)  # for what this process has to say itself
    name = f"process {cluster.process_id} of {cluster.num_processes}"
    print(f"error: {name} ends since {lost}", file=sys.stderr, flush=True)
    if not cluster.process_id:
      met.wait_alone(2 * _GRACE_SECONDS)  # else jax's clients abort before they have said it
    os._exit(meeting.EXIT_LOST)


def exit_code(code: object) -> int:
  """The exit code of a `SystemExit.code`, as the interpreter takes it."""
  if code is None:
    return 0
  return code if isinstance(code, int) else 1


def here() -> Processes:
  """This process among those that were started; touches the devices."""
  # The store has no public name; Orbax and jax.experimental reach it here too.
  from jax._src import distributed

  return Processes(jax.process_index(), jax.process_count(), distributed.global_state.client)
