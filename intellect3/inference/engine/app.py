"""The routes: SGLang's HTTP protocol over an `Engine`. Runs on the event loop, never on JAX.

Where we differ from SGLang on purpose stands in `docs/inference.md`.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from intellect3.inference.engine import request as requests
from intellect3.inference.engine.batcher import Running
from intellect3.inference.engine.loop import Engine, UpdateRefused, Weights
from intellect3.inference.engine.reply import Decoder, generate_reply
from intellect3.inference.engine.request import Limits, Request, RequestError

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_SECONDS = 20.0

_FLUSHED = (
  "Cache flushed.\nPlease check backend logs for more details. "
  "(When there are running or waiting requests, the operation will not be performed.)\n"
)


@dataclasses.dataclass(frozen=True)
class Serving:
  """What the routes need to know besides the engine.

  Attributes:
    limits: of the served model.
    max_requests: requests in the house (running and waiting) before new ones get a 503.
    decode: ids to text.
    prepare: path of a model directory -> weights on the device; raises ValueError; may be slow.
    model_info: fixed part of `/model_info`.
    server_info: fixed part of `/server_info`.
  """

  limits: Limits
  max_requests: int
  decode: Decoder
  prepare: Callable[[str], Any]
  model_info: dict[str, Any]
  server_info: dict[str, Any]


class Desk:
  """Joins HTTP requests with what the engine's thread finishes.

  Lives on the event loop. `finished` may be called on any thread.
  """

  def __init__(self, loop: asyncio.AbstractEventLoop):
    self._loop = loop
    self._waiting: dict[str, asyncio.Future[Running]] = {}

  def __len__(self) -> int:
    return len(self._waiting)

  def open(self, rid: str) -> "asyncio.Future[Running]":
    if rid in self._waiting:
      raise RequestError(f"rid: {rid!r} is the name of a request that is still running.")
    future: asyncio.Future[Running] = self._loop.create_future()
    self._waiting[rid] = future
    return future

  def close(self, rid: str) -> None:
    self._waiting.pop(rid, None)

  def finished(self, sequences: list[Running]) -> None:
    self._loop.call_soon_threadsafe(self._resolve, sequences)

  def _resolve(self, sequences: list[Running]) -> None:
    for sequence in sequences:
      future = self._waiting.pop(sequence.request.rid, None)
      if future is not None and not future.done():
        future.set_result(sequence)


class Routes:
  """The handlers. One instance per server."""

  def __init__(self, engine: Engine, desk: Desk, serving: Serving):
    self._engine, self._desk, self._serving = engine, desk, serving
    self._update_lock = asyncio.Lock()

  async def generate(self, http: HttpRequest) -> Response:
    received, batched = requests.parse_generate(await http.body(), self._serving.limits)
    if len(self._desk) + len(received) > self._serving.max_requests:
      raise RequestError(
        f"The queue is full ({self._serving.max_requests} requests). Please try again later.",
        status=503,
      )
    watch = asyncio.ensure_future(self._abort_on_disconnect(http, received))
    try:
      sequences = await self._run(received)
    finally:
      watch.cancel()
    version = self._engine.weights.version
    replies = [
      generate_reply(sequence, decode=self._serving.decode, version=version)
      for sequence in sequences
    ]
    return _json(replies if batched else replies[0])

  async def _run(self, received: list[Request]) -> list[Running]:
    opened: list[asyncio.Future[Running]] = []
    try:
      for request in received:
        opened.append(self._desk.open(request.rid))
    except RequestError:
      for request, _ in zip(received, opened, strict=False):
        self._desk.close(request.rid)
      raise
    for request in received:
      self._engine.submit(request)
    return [await future for future in opened]

  async def _abort_on_disconnect(self, http: HttpRequest, received: list[Request]) -> None:
    while (await http.receive())["type"] != "http.disconnect":
      pass
    for request in received:
      self._engine.abort(request.rid)

  async def abort_request(self, http: HttpRequest) -> Response:
    fields = requests.parse_body(await http.body())
    everything, rid = fields.get("abort_all", False), fields.get("rid")
    if everything is not True and not isinstance(rid, str):
      raise RequestError(f"rid: expected a string, or abort_all true, got {rid!r}")
    await self._engine.abort(None if everything is True else rid)
    return PlainTextResponse("")

  async def pause_generation(self, http: HttpRequest) -> Response:
    mode = requests.parse_body(await http.body()).get("mode", "abort")
    try:
      await self._engine.pause(mode)
    except ValueError as error:
      return _bad_request(str(error))
    return _json({"message": "Generation paused successfully.", "status": "ok"})

  async def continue_generation(self, http: HttpRequest) -> Response:
    requests.parse_body(await http.body())
    await self._engine.resume()
    return _json({"message": "Generation continued successfully.", "status": "ok"})

  async def flush_cache(self, http: HttpRequest) -> Response:
    if await self._engine.flush_cache():
      return PlainTextResponse(_FLUSHED)
    return PlainTextResponse("Flush cache failed.\n", status_code=400)

  async def update_weights_from_disk(self, http: HttpRequest) -> Response:
    fields = requests.parse_body(await http.body())
    try:
      update = msgspec.convert(fields, type=_UpdateFromDisk)
    except msgspec.ValidationError as error:
      return _bad_request(str(error))
    unsupported = update.unsupported()
    if unsupported is not None:
      return _updated(False, f"{unsupported} is not supported by the embedded engine.")
    async with self._update_lock:
      version = self._engine.weights.version
      weights = Weights(update.model_path, update.weight_version or version)
      try:
        params = await asyncio.to_thread(self._serving.prepare, update.model_path)
        await self._engine.update(
          params,
          weights,
          flush_cache=update.flush_cache,
          abort_running=update.abort_all_requests,
        )
      except (ValueError, UpdateRefused) as error:
        log.warning("weights of %s refused: %s", update.model_path, error)
        return _updated(False, str(error))
    log.info("serving weights of %s as version %s", weights.path, weights.version)
    message = "Succeeded to update model weights."
    if update.weight_version is not None:
      message += f" Weight version updated to {weights.version}."
    return _updated(True, message)

  async def health(self, http: HttpRequest) -> Response:
    return PlainTextResponse("", status_code=200 if self._engine.alive else 503)

  async def health_generate(self, http: HttpRequest) -> Response:
    """Generates one token; while paused only the thread is looked at."""
    if self._engine.paused:
      return await self.health(http)
    body = b'{"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}'
    probe, _ = requests.parse_generate(body, self._serving.limits)
    try:
      await asyncio.wait_for(self._run(probe), HEALTH_TIMEOUT_SECONDS)
    except TimeoutError:
      self._engine.abort(probe[0].rid)
      self._desk.close(probe[0].rid)
      return PlainTextResponse("", status_code=503)
    return PlainTextResponse("")

  async def model_info(self, http: HttpRequest) -> Response:
    path, version = self._engine.weights
    return _json(self._serving.model_info | {"model_path": path, "weight_version": version})

  async def server_info(self, http: HttpRequest) -> Response:
    engine = self._engine
    path, version = engine.weights
    state = {
      "weight_version": version,
      "paused": engine.paused,
      "updating": engine.updating,
      "running_requests": engine.num_running,
      "waiting_requests": engine.num_waiting,
      "generated_tokens": engine.generated_tokens,
      "steps": engine.steps,
    }
    return _json(
      self._serving.server_info
      | {"model_path": path, "weight_version": version, "internal_states": [state]}
    )


class _UpdateFromDisk(msgspec.Struct):
  model_path: str
  weight_version: str | None = None
  flush_cache: bool = True
  abort_all_requests: bool = False
  load_format: str | None = None
  is_async: bool = False
  manifest: Any = None

  def unsupported(self) -> str | None:
    if self.load_format not in (None, "auto", "safetensors"):
      return f"load_format={self.load_format!r}"
    if self.is_async:
      return "is_async=True"
    if self.manifest is not None:
      return "manifest"
    return None


def make_app(engine: Engine, desk: Desk, serving: Serving) -> Starlette:
  """The ASGI application."""
  routes = Routes(engine, desk, serving)
  post: dict[str, Callable[[HttpRequest], Awaitable[Response]]] = {
    "/generate": routes.generate,
    "/abort_request": routes.abort_request,
    "/pause_generation": routes.pause_generation,
    "/continue_generation": routes.continue_generation,
    "/update_weights_from_disk": routes.update_weights_from_disk,
  }
  get = {
    "/health": routes.health,
    "/health_generate": routes.health_generate,
    "/model_info": routes.model_info,
    "/get_model_info": routes.model_info,
    "/server_info": routes.server_info,
    "/get_server_info": routes.server_info,
  }
  return Starlette(
    routes=[
      *(Route(path, handler, methods=["POST"]) for path, handler in post.items()),
      *(Route(path, handler, methods=["GET"]) for path, handler in get.items()),
      Route("/flush_cache", routes.flush_cache, methods=["GET", "POST"]),
    ],
    exception_handlers={RequestError: _refuse, 404: _not_found},
  )


def _json(value: Any, status: int = 200) -> Response:
  return Response(msgspec.json.encode(value), status, media_type="application/json")


def _updated(success: bool, message: str) -> Response:
  body = {"success": success, "message": message, "num_paused_requests": 0}
  return _json(body, 200 if success else 400)


def _bad_request(message: str) -> Response:
  error = {"object": "error", "message": message, "type": "Bad Request"}
  return _json(error | {"param": None, "code": 400}, 400)


def _refuse(http: HttpRequest, error: Exception) -> Response:
  assert isinstance(error, RequestError)
  return _json(error.payload, error.status)


def _not_found(http: HttpRequest, error: Exception) -> Response:
  return _json({"detail": "Not Found"}, 404)
