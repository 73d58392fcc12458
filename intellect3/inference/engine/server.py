"""Builds the parts of a server from its flags and serves them until a signal comes."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn

from intellect3.inference.engine import device as devices
from intellect3.inference.engine import info
from intellect3.inference.engine.app import Desk, Serving, make_app
from intellect3.inference.engine.batcher import Batcher
from intellect3.inference.engine.device import Device
from intellect3.inference.engine.flags import Settings
from intellect3.inference.engine.loop import Engine, Weights
from intellect3.inference.engine.reply import make_decoder
from intellect3.inference.engine.request import Limits
from intellect3.models.config import ModelConfig

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 600
"""Longer than any client's: else a connection closes just as the client sends on it."""

FAREWELL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Parts:
  """A warmed-up device, an empty batcher and what the routes need to know."""

  device: Device
  batcher: Batcher
  serving: Serving


def build(settings: Settings) -> Parts:
  """Loads the model and compiles everything that serving will need.

  Raises:
    ValueError: the model directory or a flag is wrong; the message names which.
  """
  config, params = devices.load(settings.model, dtype=settings.dtype)
  context = settings.context_length or config.max_positions
  device = Device(config, params, slots=settings.slots, context_length=context)
  batcher = Batcher(
    slots=settings.slots,
    prefill_rows=settings.prefill_rows,
    prefill_chunk=settings.prefill_chunk,
    eos_token_ids=devices.eos_token_ids(settings.model),
  )
  seconds = device.warm_up(*batcher.padding())
  log.info("%d executables ready in %.1f s", device.compiled, seconds)
  serving = Serving(
    limits=Limits(vocab_size=config.vocab_size, context_length=context),
    max_requests=settings.slots + settings.queue_limit,
    decode=make_decoder(settings.model),
    prepare=lambda path: _prepare(device, path, settings.dtype),
    model_info=info.model_info(settings),
    server_info=info.server_info(
      settings,
      context_length=context,
      dtype=str(config.dtype),
      attention=config.attention,
      platform=devices.platform(),
    ),
  )
  return Parts(device, batcher, serving)


def _prepare(device: Device, path: str, dtype: str | None) -> Any:
  # Published weights may be of another dtype than the first ones (bfloat16 halves what travels).
  config, params = devices.load(
    path, dtype=dtype or device.config.dtype, param_dtype=device.config.param_dtype
  )
  for field in dataclasses.fields(ModelConfig):
    served, given = getattr(device.config, field.name), getattr(config, field.name)
    if served != given:
      raise ValueError(f"{path}: {field.name}: expected {served!r} as served, got {given!r}")
  return device.prepare(params)


async def serve(parts: Parts, listener: socket.socket, settings: Settings) -> None:
  """Serves on a listening socket until SIGTERM or SIGINT; running requests are aborted then."""
  desk = Desk(asyncio.get_running_loop())
  engine = Engine(
    parts.device,
    parts.batcher,
    Weights(settings.model, settings.weight_version),
    seed=settings.random_seed,
    on_finished=desk.finished,
    on_failure=_die,
  )
  app = make_app(engine, desk, parts.serving)
  server = _Server(
    uvicorn.Config(
      app,
      lifespan="off",
      access_log=False,
      log_config=None,
      log_level="warning",
      timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
  )
  engine.start()
  log.info("serving %s on http://%s:%d", settings.model, *listener.getsockname()[:2])
  try:
    await server.serve(sockets=[listener])
  finally:
    # Whoever still waits is answered with what there is, and can go on elsewhere.
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(engine.abort(), FAREWELL_SECONDS)
      await asyncio.sleep(0.05)
    engine.stop(FAREWELL_SECONDS)


class _Server(uvicorn.Server):
  """uvicorn, but the first signal ends it at once and with exit code 0."""

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    log.info("ending on %s", signal.Signals(sig).name)
    self.should_exit = self.force_exit = True


def _die(error: BaseException) -> None:
  # Called on the engine's thread: nothing can be served any more, and the event loop's thread
  # cannot be trusted to notice.
  log.critical("the server ends: its engine died of %r", error)
  logging.shutdown()
  os._exit(1)
