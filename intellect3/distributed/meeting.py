"""The processes of one program meet before jax does, and hear of each other's end. No jax.

Place in the ring: under `processes.started`. Process 0 listens at the coordinator's address until
all have come, gives up the port to jax's coordinator and keeps the connections. jax would abort
where one never comes or dies, with a stack of C++ for a message and its heartbeat for a delay; a
connection is closed as soon as its process is gone, and then every log ends in who that was.
"""

import contextlib
import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from intellect3.distributed.cluster import NUM_PROCESSES, PROCESS_ID, Cluster

logger = logging.getLogger(__name__)

EXIT_LOST = 75
"""Exit code of a process that ended because another one had."""

_RETRY_SECONDS = 0.2
_MOST_BYTES = 1 << 16
"""Of one message."""


class NotMet(RuntimeError):
  """The processes did not meet; one line that says who was missing."""


class _Line:
  """Messages over a socket: a line of JSON each."""

  def __init__(self, connection: socket.socket) -> None:
    self.socket = connection
    self._rest = b""

  def say(self, **message: Any) -> None:
    with contextlib.suppress(OSError):  # who has gone is heard of by reading
      self.socket.sendall(json.dumps(message).encode() + b"\n")

  def hear(self) -> list[dict[str, Any]] | None:
    """What has come, once something has; None at the end, and of one that says something else."""
    try:
      data = self.socket.recv(_MOST_BYTES)
    except TimeoutError:
      return []
    except OSError:
      return None
    *lines, self._rest = (self._rest + data).split(b"\n")
    if not data or len(self._rest) > _MOST_BYTES:
      return None
    try:
      messages = [json.loads(line) for line in lines]
    except ValueError:
      return None
    return messages if all(isinstance(each, dict) for each in messages) else None


class Meeting:
  """This process's connections: process 0's to all others, another's to process 0."""

  def __init__(self, cluster: Cluster) -> None:
    """Meets nobody yet.

    Args:
      cluster: of several processes.
    """
    self._cluster = cluster
    self._name = f"process {cluster.process_id} of {cluster.num_processes}"
    host, _, port = cluster.coordinator.rpartition(":")
    self._address = (host.strip("[]"), int(port))
    self._lines: dict[int, _Line] = {}
    self._left: set[int] = set()
    self._gone = threading.Event()
    self.lost: str | None = None
    """Who ended without leaving, and how; None as long as nobody did."""

  def meet(self) -> None:
    """Returns once every process is here.

    Raises:
      NotMet: not within `start_seconds`, or process 0 cannot listen, or refuses this one.
    """
    deadline = time.monotonic() + self._cluster.start_seconds
    if self._cluster.process_id:
      self._lines[0] = self._join(deadline)
    else:
      self._receive(deadline)
    for line in self._lines.values():
      _keep_alive(line.socket, self._cluster.heartbeat_seconds)

  def watch(self, on_lost: Callable[[str], None]) -> None:
    """Calls `on_lost` once, from a thread, when a process ends without leaving; `lost` is set."""
    threading.Thread(target=self._watch, args=(on_lost,), name="meeting", daemon=True).start()

  def leave(self, failure: str | None = None) -> None:
    """Says that this process ends: as it should, or why not."""
    for line in list(self._lines.values()):
      line.say(**({"left": True} if failure is None else {"failed": failure}))

  def wait_lost(self, seconds: float) -> str | None:
    """`lost`, after waiting for it."""
    deadline = time.monotonic() + seconds
    while self.lost is None and time.monotonic() < deadline:
      time.sleep(0.01)
    return self.lost

  def wait_alone(self, seconds: float) -> None:
    """Waits until the connections of all others are closed."""
    self._gone.wait(seconds)

  def _absent(self, here: list[int]) -> str:
    count = self._cluster.num_processes
    missing = [index for index in range(count) if index not in here]
    return (
      f"coordinator {self._cluster.coordinator}: expected {count} processes within "
      f"{self._cluster.start_seconds} s, got {len(here)}: {_some(here)}; missing: {_some(missing)}"
    )

  def _join(self, deadline: float) -> _Line:
    cluster = self._cluster
    here: list[int] = []
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
      try:
        line = _Line(socket.create_connection(self._address, timeout=min(left, 10.0)))
      except OSError as error:
        why = error.strerror or str(error)
        time.sleep(min(_RETRY_SECONDS, left))
        continue
      line.say(process=cluster.process_id, processes=cluster.num_processes)
      while (left := deadline - time.monotonic()) > 0:
        line.socket.settimeout(left)
        messages = line.hear()
        if messages is None:
          here, why = [], "it closed the connection"
          line.socket.close()
          time.sleep(min(_RETRY_SECONDS, left))
          break
        for message in messages:
          if "refused" in message:
            raise NotMet(f"{message['refused']} ({self._name})")
          here = message.get("here", here)
          if "start" in message:
            line.socket.settimeout(None)
            return line
    if here:
      raise NotMet(f"{self._absent(here)} ({self._name})")
    raise NotMet(
      f"coordinator {cluster.coordinator}: expected process 0 to answer within "
      f"{cluster.start_seconds} s, got: {why} ({self._name})"
    )

  def _receive(self, deadline: float) -> None:
    """Process 0's side: takes connections until all have come, and tells them who is here."""
    with (
      _listen(self._cluster.coordinator, self._address[1]) as listener,
      selectors.DefaultSelector() as selector,
    ):
      selector.register(listener, selectors.EVENT_READ)
      while len(self._lines) < self._cluster.num_processes - 1:
        left = deadline - time.monotonic()
        if left <= 0:
          text = self._absent(self._here())
          self._tell(refused=text)
          raise NotMet(f"{text} ({self._name})")
        for key, _ in selector.select(left):
          if key.fileobj is listener:
            line = _Line(listener.accept()[0])
            selector.register(line.socket, selectors.EVENT_READ, line)
          else:
            self._admit(selector, key.data)
    self._tell(start=True)

  def _admit(self, selector: selectors.BaseSelector, line: _Line) -> None:
    messages = line.hear()
    if messages == []:
      return
    known = next((index for index, other in self._lines.items() if other is line), None)
    refusal = None
    if messages is not None and known is None:
      index, count = (messages[0].get(key) for key in ("process", "processes"))
      if count != self._cluster.num_processes:
        refusal = (
          f"{NUM_PROCESSES}: expected process 0's {self._cluster.num_processes}, got {count}"
        )
      elif not isinstance(index, int) or index in self._here() or not 0 < index < count:
        refusal = f"{PROCESS_ID}: expected each of {count} processes once, got {index} again"
      else:
        self._lines[index] = line
        self._tell(here=self._here())
        return
    elif known is not None:
      del self._lines[known]
      self._tell(here=self._here())
    if refusal:
      logger.warning("refused a process: %s", refusal)
      line.say(refused=refusal)
    selector.unregister(line.socket)
    line.socket.close()

  def _here(self) -> list[int]:
    return [0, *sorted(self._lines)]

  def _tell(self, **message: Any) -> None:
    for line in self._lines.values():
      line.say(**message)

  def _watch(self, on_lost: Callable[[str], None]) -> None:
    with selectors.DefaultSelector() as selector:
      for index, line in self._lines.items():
        selector.register(line.socket, selectors.EVENT_READ, (index, line))
      while selector.get_map():
        for key, _ in selector.select():
          index, line = key.data
          messages = line.hear()
          text = self._heard(index, messages)
          if messages is None:
            selector.unregister(line.socket)
          if text and self.lost is None:
            if not self._cluster.process_id:
              for other in self._lines.keys() - {index}:
                self._lines[other].say(lost=text)
            self.lost = text
            # Goes on reading: who ends last waits for the others' connections to close.
            threading.Thread(target=on_lost, args=(text,), daemon=True).start()
    self._gone.set()

  def _heard(self, index: int, messages: list[dict[str, Any]] | None) -> str | None:
    """How a process ended that did not leave."""
    name = f"process {index} of {self._cluster.num_processes}"
    if messages is None:
      if index in self._left:
        return None
      self._left.add(index)
      role = "" if index else f", the coordinator ({self._cluster.coordinator}),"
      return f"{name}{role} ended without a word: killed, or cut off"
    for message in messages:
      if "left" in message:
        self._left.add(index)
      if "failed" in message:
        self._left.add(index)
        return f"{name} failed: {message['failed']}"
      if "lost" in message:
        return str(message["lost"])
    return None


def _listen(coordinator: str, port: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
  except OSError as error:
    raise NotMet(
      f"coordinator {coordinator}: expected a port that process 0 can listen on, "
      f"got: {error.strerror}"
    ) from error


def _keep_alive(connection: socket.socket, seconds: int) -> None:
  """Lets the kernel ask whether the other machine is there, so that silence ends it in time."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  # Silent for a quarter, then asked twice, a quarter apart: before jax's heartbeat is missed.
  quarter = max(1, seconds // 4)
  for name, value in (("TCP_KEEPIDLE", quarter), ("TCP_KEEPINTVL", quarter), ("TCP_KEEPCNT", 2)):
    if hasattr(socket, name):
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _some(indices: list[int]) -> str:
  """The first of them, for people."""
  told = ", ".join(map(str, indices[:16]))
  return f"{told}, .." if len(indices) > 16 else told
