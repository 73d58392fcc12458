"""The routes that change the served weights: from a directory, or tensor by tensor.

Tensors come between `/begin_weight_update` and `/end_weight_update`. They are staged and served all
at once at the end, or not at all: no token is sampled from a mix of old and new. A session in which
a call was refused serves nothing, and `/end_weight_update` with `abort` true discards one, whoever
began it.
"""

import asyncio
import dataclasses
import logging
from typing import Any

import msgspec
import numpy as np

from intellect3.inference import tensor_wire
from intellect3.inference.engine import asgi
from intellect3.inference.engine.asgi import Answer, Wire
from intellect3.inference.engine.generate import off_loop
from intellect3.inference.engine.loop import Engine, UpdateRefused, Weights
from intellect3.inference.engine.parse import parse_body, typed
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.serving import Serving

log = logging.getLogger(__name__)


class FromDisk(msgspec.Struct):
  """The body of `/update_weights_from_disk`."""

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


class FromTensor(msgspec.Struct):
  """The body of `/update_weights_from_tensor`."""

  serialized_named_tensors: list[str]
  weight_version: str | None = None
  flush_cache: bool = True
  abort_all_requests: bool = False
  load_format: str | None = None
  selector: str = "all"

  def unsupported(self) -> str | None:
    if self.load_format is not None:
      return f"load_format={self.load_format!r}"
    if self.selector not in ("all", "target"):
      return f"selector={self.selector!r}"
    return None


@dataclasses.dataclass
class Session:
  """What came between begin and end; `failure` says why it can no longer be served."""

  tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  version: str | None = None
  flush_cache: bool = False
  abort_running: bool = False
  failure: str | None = None


class WeightRoutes:
  """The handlers; one instance per server."""

  def __init__(self, engine: Engine, serving: Serving):
    self._engine, self._serving = engine, serving
    self._lock = asyncio.Lock()
    self._session: Session | None = None

  async def update_weights_from_disk(self, body: bytes, wire: Wire) -> Answer:
    try:
      update = msgspec.convert(parse_body(body), FromDisk)
    except msgspec.ValidationError as error:
      return asgi.bad_request(str(error))
    unsupported = update.unsupported()
    if unsupported is not None:
      return _from_disk(False, f"{unsupported} is not supported by the embedded engine.")
    async with self._lock:
      if self._session is not None:
        return _from_disk(False, f"{_OPEN}; call end_weight_update() first")
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
        return _from_disk(False, str(error))
    log.info("serving weights of %s as version %s", weights.path, weights.version)
    return _from_disk(True, "Succeeded to update model weights." + _told(update.weight_version))

  async def begin_weight_update(self, body: bytes, wire: Wire) -> Answer:
    selector = parse_body(body).get("selector", "all")
    if selector not in ("all", "target"):
      return _answer(False, f"selector={selector!r} is not supported by the embedded engine.")
    async with self._lock:
      if self._session is not None:
        return _answer(False, f"{_OPEN}; call end_weight_update() first")
      self._session = Session()
    return _answer(True, "Success")

  async def update_weights_from_tensor(self, body: bytes, wire: Wire) -> Answer:
    try:
      update = msgspec.convert(await off_loop(body, parse_body, body), FromTensor)
    except (msgspec.ValidationError, RequestError) as error:
      if self._session is not None:
        self._session.failure = str(error)
      return asgi.bad_request(str(error))
    async with self._lock:
      session = self._session
      if session is None:
        return _answer(False, _outside("update_weights_from_tensor"))
      try:
        await _stage(session, update)
      except ValueError as error:
        session.failure = str(error)
        return _answer(False, str(error))
    return _answer(True, "Success" + _told(update.weight_version))

  async def end_weight_update(self, body: bytes, wire: Wire) -> Answer:
    abort = typed("abort", parse_body(body).get("abort"), bool | None)
    async with self._lock:
      session, self._session = self._session, None
      if session is None:
        return _answer(False, "no weight-update session is open; call begin_weight_update() first")
      if abort:
        log.warning("%d staged tensors discarded as asked", len(session.tensors))
      else:
        try:
          await self._serve(session)
        except (ValueError, UpdateRefused) as error:
          log.warning("%d tensors refused: %s", len(session.tensors), error)
          return _answer(False, str(error))
    return _answer(True, "Success")

  async def _serve(self, session: Session) -> None:
    if session.failure is not None:
      raise ValueError(f"Nothing of this session is served, since a call failed: {session.failure}")
    if not session.tensors:
      return
    path, version = self._engine.weights
    weights = Weights(path, session.version or version)
    params = await asyncio.to_thread(self._serving.prepare_tensors, session.tensors)
    await self._engine.update(
      params, weights, flush_cache=session.flush_cache, abort_running=session.abort_running
    )
    log.info("serving %d new tensors as version %s", len(session.tensors), weights.version)

  async def update_weights_from_distributed(self, body: bytes, wire: Wire) -> Answer:
    """Always refused: there is no process group that this engine could be in."""
    group = parse_body(body).get("group_name", "weight_update_group")
    if self._session is None:
      return _answer(False, _outside("update_weights_from_distributed"))
    return _answer(
      False,
      f"Failed to receive weights: Group {group} not in []. Please call "
      "`init_weights_update_group` first.",
    )

  async def init_weights_update_group(self, body: bytes, wire: Wire) -> Answer:
    parse_body(body)
    return _answer(
      False, "init_weights_update_group is not supported by the embedded engine; send tensors."
    )


async def _stage(session: Session, update: FromTensor) -> None:
  """Adds a call's tensors to a session; ValueError where they cannot be served."""
  unsupported = update.unsupported()
  if unsupported is not None:
    raise ValueError(f"{unsupported} is not supported by the embedded engine.")
  if not update.serialized_named_tensors:
    raise ValueError("serialized_named_tensors: expected one entry, got none")
  # One entry per rank of tensor parallelism, each the whole tensors; the first one serves.
  payload = update.serialized_named_tensors[0]
  try:
    session.tensors |= await asyncio.to_thread(tensor_wire.read, payload)
  except ValueError as error:
    raise ValueError(f"serialized_named_tensors: {error}") from error
  session.version = update.weight_version or session.version
  session.flush_cache |= update.flush_cache
  session.abort_running |= update.abort_all_requests


_OPEN = "a weight-update session is already open"


def _outside(name: str) -> str:
  return f"{name} must run between begin_weight_update() and end_weight_update()"


def _told(version: str | None) -> str:
  return "" if version is None else f" Weight version updated to {version}."


def _answer(success: bool, message: str) -> Answer:
  return asgi.json_answer({"success": success, "message": message}, 200 if success else 400)


def _from_disk(success: bool, message: str) -> Answer:
  body = {"success": success, "message": message, "num_paused_requests": 0}
  return asgi.json_answer(body, 200 if success else 400)
