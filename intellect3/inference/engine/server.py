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

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
import uvicorn

from intellect3.inference.engine import device as devices
from intellect3.inference.engine.app import make_app
from intellect3.inference.engine.batcher import Batcher
from intellect3.inference.engine.desk import Desk
from intellect3.inference.engine.device import Device
from intellect3.inference.engine.flags import Settings
from intellect3.inference.engine.loop import Engine, Weights
from intellect3.inference.engine.pages import Pages
from intellect3.inference.engine.programs import Shape
from intellect3.inference.engine.serving import Serving, make_serving
from intellect3.inference.engine.steps import MAX_STOP_IDS
from intellect3.models import hf
from intellect3.models.config import ModelConfig

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 600
"""Longer than any client's: else a connection closes just as the client sends on it."""

FAREWELL_SECONDS = 5.0

CACHE_BYTES = 4 << 30
"""Most that the cache takes where `--max-total-tokens` does not say."""


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
  config, params = devices.load(
    settings.model, dtype=settings.dtype, tensor_parallel=settings.tp_size
  )
  if settings.enable_return_routed_experts and not config.num_moe_layers:
    raise ValueError(
      f"enable_return_routed_experts: expected a model with experts, got {config.family} with "
      f"{config.num_dense_layers} dense layers of {config.num_layers}"
    )
  context = settings.context_length or config.max_positions
  pages = Pages(_num_pages(settings, config, context), settings.page_size)
  eos = devices.eos_token_ids(settings.model)
  device: Device | None = None
  # The device comes after whatever can be wrong with flags and files, since it takes long.
  serving = make_serving(
    settings,
    config,
    context_length=context,
    max_total_tokens=pages.count * pages.page_size,
    max_stop_ids=MAX_STOP_IDS - len(eos),
    platform=devices.platform(),
    prepare=lambda path: _prepare(device, path, settings.dtype),
    prepare_tensors=lambda tensors: _prepare_tensors(device, tensors),
  )
  batcher = Batcher(
    slots=settings.slots,
    pages=pages,
    context_length=context,
    prefill_rows=settings.prefill_rows,
    prefill_chunk=settings.prefill_chunk,
    decode_steps=settings.decode_steps,
    eos_token_ids=eos,
    deterministic=settings.enable_deterministic_inference,
    match_stop=_no_stops if serving.text is None else serving.text.match_stop,
  )
  device = Device(
    config,
    params,
    slots=settings.slots,
    pages=pages.count,
    page_size=pages.page_size,
    context_length=context,
    shape=Shape(
      steps=settings.decode_steps,
      max_top=min(settings.max_top_logprobs, config.vocab_size),
      experts=settings.enable_return_routed_experts,
    ),
    tensor_parallel=settings.tp_size,
  )
  seconds = device.warm_up(*batcher.padding())
  log.info("grouped_matmul: %s", config.grouped_matmul)
  log.info("%d executables ready in %.1f s", len(device.compiled), seconds)
  return Parts(device, batcher, serving)


def _num_pages(settings: Settings, config: ModelConfig, context: int) -> int:
  """Pages of the cache: as asked, or all that the slots can fill up to `CACHE_BYTES`."""
  size = settings.page_size
  width = -(-context // size)
  given = settings.max_total_tokens
  if given is not None:
    if given < width * size:
      raise ValueError(
        f"max_total_tokens: expected at least {width * size} (a context of {context} in whole "
        f"pages of {size}), got {given}"
      )
    return given // size
  itemsize = np.dtype(config.dtype).itemsize
  page_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size * itemsize
  return max(width, min(settings.slots * width, CACHE_BYTES // page_bytes))


def _no_stops(ids: Any, strings: Any) -> None:
  return None


def _prepare(device: Device | None, path: str, dtype: str | None) -> Any:
  assert device is not None
  # Published weights may be of another dtype than the first ones (bfloat16 halves what travels).
  config, params = devices.load(
    path,
    dtype=dtype or device.config.dtype,
    param_dtype=device.config.param_dtype,
    tensor_parallel=device.tensor_parallel,
  )
  for field in dataclasses.fields(ModelConfig):
    served, given = getattr(device.config, field.name), getattr(config, field.name)
    if served != given:
      raise ValueError(f"{path}: {field.name}: expected {served!r} as served, got {given!r}")
  return device.prepare(params)


def _prepare_tensors(device: Device | None, tensors: dict[str, np.ndarray]) -> Any:
  assert device is not None
  return device.prepare(hf.merge(device.config, device.host_params(), tensors))


async def serve(parts: Parts, listener: socket.socket, settings: Settings) -> None:
  """Serves on a listening socket until SIGTERM or SIGINT; running requests are aborted then."""
  desk = Desk(asyncio.get_running_loop(), settings.slots, settings.queue_limit)
  engine = Engine(
    parts.device,
    parts.batcher,
    Weights(settings.model, settings.weight_version),
    seed=settings.random_seed,
    on_events=desk.report,
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
