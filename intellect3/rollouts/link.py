"""How messages travel between orchestrator and workers: in process, or over a WebSocket.

A worker connects to the orchestrator (which is the address that a cluster knows) and stays
connected; when the connection ends, what the worker ran is lost and counted so. The same server
tells the trainer of new batches and hears from it of new weights: files remain the truth, this only
makes them seen sooner than a shared file system shows them.
"""

import asyncio
import logging
from collections.abc import Callable

import aiohttp
from aiohttp import web

from intellect3.rollouts import messages
from intellect3.rollouts.orchestrator import Orchestrator
from intellect3.rollouts.worker import Worker

logger = logging.getLogger(__name__)

MakeWorker = Callable[[Callable[[messages.FromWorker], None]], Worker]
"""Builds a worker from its `send`."""


class InProcessLink:
  """A worker inside the orchestrator's process; messages keep their order."""

  def __init__(self, orchestrator: Orchestrator, make_worker: MakeWorker) -> None:
    self._loop = asyncio.get_running_loop()
    self._orchestrator = orchestrator
    self._worker = make_worker(self._send)
    self.name = self._worker.name
    orchestrator.connected(self, self._worker.hello())

  def post(self, message: messages.ToWorker) -> None:
    """Delivers on the next turn of the loop, as a network would."""
    self._loop.call_soon(self._worker.handle, message)

  def _send(self, message: messages.FromWorker) -> None:
    self._loop.call_soon(self._orchestrator.received, self.name, message)

  async def close(self) -> None:
    """Ends the worker's coroutines."""
    await self._worker.close()


class _SocketLink:
  """The orchestrator's end of a worker's WebSocket: a queue and a task that drains it."""

  def __init__(self, name: str, socket: web.WebSocketResponse) -> None:
    self.name = name
    self._socket = socket
    self._queue: asyncio.Queue[messages.ToWorker] = asyncio.Queue()
    self._sender = asyncio.ensure_future(self._drain())

  def post(self, message: messages.ToWorker) -> None:
    self._queue.put_nowait(message)

  async def _drain(self) -> None:
    while True:
      await self._socket.send_bytes(messages.encode(await self._queue.get()))
      self._queue.task_done()

  async def flush(self) -> None:
    """Waits until everything posted is sent."""
    await self._queue.join()

  def close(self) -> None:
    self._sender.cancel()


class OrchestratorServer:
  """HTTP face of the orchestrator.

  GET  /worker            WebSocket of one worker
  GET  /batches/STEP      200 once the step's manifest is committed, 204 after a while without
  POST /versions/VERSION  the trainer has published these weights
  """

  def __init__(
    self,
    orchestrator: Orchestrator,
    *,
    version_published: Callable[[int], None],
    batch_exists: Callable[[int], bool],
    poll_seconds: float = 10.0,
  ) -> None:
    self._orchestrator = orchestrator
    self._version_published = version_published
    self._batch_exists = batch_exists
    self._poll_seconds = poll_seconds
    self._batch_waiters: dict[int, asyncio.Event] = {}
    self._links: dict[str, _SocketLink] = {}
    self._runner: web.AppRunner | None = None

  async def start(self, host: str, port: int) -> None:
    """Listens on host:port; raises OSError where the port is taken."""
    app = web.Application()
    app.router.add_get("/worker", self._worker)
    app.router.add_get("/batches/{step}", self._batch)
    app.router.add_post("/versions/{version}", self._version)
    self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await self._runner.setup()
    await web.TCPSite(self._runner, host, port).start()

  async def close(self) -> None:
    """Sends what is posted, then closes every connection."""
    try:
      for link in list(self._links.values()):  # a worker may leave while another is awaited
        try:
          # Not `wait_for`: Python 3.11's loses a cancellation that comes together with the end.
          async with asyncio.timeout(2.0):
            await link.flush()
        except (TimeoutError, ConnectionError):
          logger.warning("worker %s did not take its last messages", link.name)
    finally:
      if self._runner is not None:
        await self._runner.cleanup()

  def batch_committed(self, step: int) -> None:
    """Wakes whoever waits for this step's batch."""
    event = self._batch_waiters.pop(step, None)
    if event is not None:
      event.set()

  async def _batch(self, request: web.Request) -> web.Response:
    step = int(request.match_info["step"])
    if self._batch_exists(step):
      return web.Response(status=200)
    event = self._batch_waiters.setdefault(step, asyncio.Event())
    try:
      async with asyncio.timeout(self._poll_seconds):
        await event.wait()
    except TimeoutError:
      return web.Response(status=204)
    return web.Response(status=200)

  async def _version(self, request: web.Request) -> web.Response:
    self._version_published(int(request.match_info["version"]))
    return web.Response(status=200)

  async def _worker(self, request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(heartbeat=30.0, max_msg_size=0)
    await socket.prepare(request)
    link: _SocketLink | None = None
    try:
      async for frame in socket:
        if frame.type != aiohttp.WSMsgType.BINARY:
          break
        message = messages.decode_from_worker(frame.data)
        if link is not None:
          self._orchestrator.received(link.name, message)
        elif isinstance(message, messages.Hello) and message.worker not in self._links:
          link = _SocketLink(message.worker, socket)
          self._links[link.name] = link
          self._orchestrator.connected(link, message)
        else:
          logger.error("a worker began with %s, or its name is taken; refused", message)
          break
    finally:
      if link is not None:
        link.close()
        del self._links[link.name]
        self._orchestrator.disconnected(link.name)
    return socket


async def run_remote_worker(url: str, make_worker: MakeWorker, *, patience_seconds: float) -> None:
  """Runs a worker in this process until the orchestrator ends it or its connection.

  Args:
    url: the orchestrator's, e.g. `http://127.0.0.1:8700`.
    make_worker: builds the worker.
    patience_seconds: how long to try to reach an orchestrator that is not up yet.

  Raises:
    ConnectionError: the orchestrator cannot be reached, or went away before it said Shutdown.
  """
  outbox: asyncio.Queue[messages.FromWorker] = asyncio.Queue()
  worker = make_worker(outbox.put_nowait)
  async with aiohttp.ClientSession() as session:
    socket = await _connect(session, f"{url}/worker", patience_seconds)

    async def send() -> None:
      await socket.send_bytes(messages.encode(worker.hello()))
      while True:
        await socket.send_bytes(messages.encode(await outbox.get()))

    async def receive() -> None:
      async for frame in socket:
        if frame.type != aiohttp.WSMsgType.BINARY:
          break
        worker.handle(messages.decode_to_worker(frame.data))
        if worker.stopped.is_set():
          return
      raise ConnectionError(f"orchestrator {url} closed the connection")

    sender, receiver = asyncio.ensure_future(send()), asyncio.ensure_future(receive())
    try:
      done, _ = await asyncio.wait([sender, receiver], return_when=asyncio.FIRST_COMPLETED)
      for task in done:
        task.result()
    finally:
      for task in (sender, receiver):
        task.cancel()
      await asyncio.gather(sender, receiver, return_exceptions=True)
      await worker.close()
      await socket.close()


async def _connect(
  session: aiohttp.ClientSession, url: str, patience_seconds: float
) -> aiohttp.ClientWebSocketResponse:
  loop = asyncio.get_running_loop()
  deadline = loop.time() + patience_seconds
  while True:
    try:
      return await session.ws_connect(url, heartbeat=30.0, max_msg_size=0)
    except aiohttp.ClientError as error:
      if loop.time() > deadline:
        raise ConnectionError(f"no orchestrator at {url}: {error}") from error
      await asyncio.sleep(0.2)
