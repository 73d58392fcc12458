"""The routes: SGLang's HTTP protocol over an `Engine`. Runs on the event loop, never on JAX.

Where we differ from SGLang on purpose stands in `docs/inference.md`.
"""

import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from intellect3.inference.engine import asgi, info
from intellect3.inference.engine.asgi import Answer, Endpoint, Handler, Wire
from intellect3.inference.engine.control import ControlRoutes
from intellect3.inference.engine.desk import Desk
from intellect3.inference.engine.generate import GenerateRoute, House
from intellect3.inference.engine.loop import Engine
from intellect3.inference.engine.metrics import Metrics
from intellect3.inference.engine.openai import chat_answer, wording
from intellect3.inference.engine.openai.chat_answer import ChatRoute
from intellect3.inference.engine.openai.completions import CompletionsRoute
from intellect3.inference.engine.reply import Wording
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.serving import Serving
from intellect3.inference.engine.weight_routes import WeightRoutes

METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class InfoRoutes:
  """The routes that only tell."""

  def __init__(self, house: House):
    self._house = house
    self._started = int(time.time())

  async def model_info(self, body: bytes, wire: Wire) -> Answer:
    path, version = self._house.engine.weights
    fixed = self._house.serving.model_info
    return asgi.json_answer(fixed | {"model_path": path, "weight_version": version})

  async def server_info(self, body: bytes, wire: Wire) -> Answer:
    engine = self._house.engine
    path, version = engine.weights
    stats = {key: bool(value) if key in _FLAGS else value for key, value in engine.stats().items()}
    state = {"weight_version": version, **stats}
    fixed = self._house.serving.server_info
    return asgi.json_answer(
      fixed | {"model_path": path, "weight_version": version, "internal_states": [state]}
    )

  async def models(self, body: bytes, wire: Wire) -> Answer:
    serving = self._house.serving
    return asgi.json_answer(
      info.models(serving.name, created=self._started, context_length=serving.limits.context_length)
    )

  async def metrics(self, body: bytes, wire: Wire) -> Answer:
    return Answer(self._house.metrics.render(), media_type=METRICS_TYPE)


_FLAGS = ("paused", "updating")


def make_app(engine: Engine, desk: Desk, serving: Serving) -> Starlette:
  """The ASGI application."""
  house = House(
    engine=engine,
    desk=desk,
    wording=Wording(serving.text, serving.num_dense_layers),
    serving=serving,
    metrics=Metrics(engine.stats, model_name=serving.name),
  )
  control, weights, tell = ControlRoutes(house), WeightRoutes(engine, serving), InfoRoutes(house)
  update: dict[str, Handler] = {
    "/update_weights_from_disk": weights.update_weights_from_disk,
    "/begin_weight_update": weights.begin_weight_update,
    "/update_weights_from_tensor": weights.update_weights_from_tensor,
    "/update_weights_from_distributed": weights.update_weights_from_distributed,
    "/end_weight_update": weights.end_weight_update,
    "/init_weights_update_group": weights.init_weights_update_group,
  }
  post: dict[str, Handler] = {
    "/abort_request": control.abort_request,
    "/pause_generation": control.pause_generation,
    "/continue_generation": control.continue_generation,
    "/release_memory_occupation": control.release_memory_occupation,
    "/resume_memory_occupation": control.resume_memory_occupation,
  }
  get: dict[str, Handler] = {
    "/health": control.health,
    "/health_generate": control.health_generate,
    "/model_info": tell.model_info,
    "/get_model_info": tell.model_info,
    "/server_info": tell.server_info,
    "/get_server_info": tell.server_info,
    "/v1/models": tell.models,
    "/metrics": tell.metrics,
  }
  most = serving.limits.max_body_bytes

  def route(
    path: str,
    handler: Handler,
    *methods: str,
    refuse: Callable[[RequestError], Answer] = asgi.refuse,
    max_bytes: int | None = most,
  ) -> Route:
    endpoint = Endpoint(handler, refuse, max_bytes=max_bytes)
    return Route(path, endpoint, methods=list(methods))

  # Routes are tried in order: what is asked most comes first.
  routes = [
    route("/generate", GenerateRoute(house), "POST"),
    route("/v1/chat/completions", ChatRoute(house), "POST", refuse=chat_answer.refuse),
    route("/v1/completions", CompletionsRoute(house), "POST", refuse=wording.refuse),
    *(route(path, handler, "POST") for path, handler in post.items()),
    *(route(path, handler, "POST", max_bytes=None) for path, handler in update.items()),
    *(route(path, handler, "GET") for path, handler in get.items()),
    route("/flush_cache", control.flush_cache, "GET", "POST"),
  ]
  return Starlette(routes=routes, exception_handlers={404: _not_found})


def _not_found(http: HttpRequest, error: Exception) -> Response:
  return Response(b'{"detail":"Not Found"}', 404, media_type="application/json")
