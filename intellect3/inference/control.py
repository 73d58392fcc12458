"""Control calls: the same one to every server at once, each with its own outcome.

Place in the ring: the orchestrator's hand on the servers (pause, update, continue, score). sglang-
router proxies none of these, so they go to each server directly. A server that fails or hangs holds
up no other. A trap of SGLang is closed here: an update that flushes the cache under an `in_place`
pause answers 400 although the weights did change. Another is left alone: `/health` is never asked,
since a probe of a paused server hangs and leaves it marked unhealthy.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from intellect3.inference import load, protocol
from intellect3.inference.transport import Transport, TransportError

PAUSE_MODES = ("in_place", "retract", "abort")
"""`in_place` keeps the cache of running requests, `retract` computes it anew after the pause (so it
can be flushed), `abort` ends them with the tokens they have."""

T = TypeVar("T")


class ControlError(Exception):
  """A server refused a control call."""


class ServerBusy(ControlError):
  """A server has no room for a call now (503): back-pressure, and no fault of its."""


BUSY_SECONDS = 0.2
"""Between two attempts at a server without room."""


@dataclass(frozen=True)
class Scores:
  """A scored prompt.

  Attributes:
    logprobs: float32[T]; [t] scores id t at temperature 1, [0] is 0.0.
    version: the weights that scored it.
  """

  logprobs: np.ndarray
  version: int


@dataclass(frozen=True)
class Outcome(Generic[T]):
  """What one server made of a call.

  Attributes:
    value: its answer; None where the call failed.
    error: why it failed, or None.
    seconds: how long it took, on the event loop's clock.
    answered: whether there was an answer at all; one that refuses is an answer, one that has no
      room is none.
  """

  value: T | None
  error: str | None
  seconds: float
  answered: bool = True

  @property
  def ok(self) -> bool:
    return self.error is None


class ServerControl:
  """Steers a set of servers. Belongs to one event loop."""

  def __init__(
    self,
    transport: Transport,
    urls: Iterable[str] = (),
    *,
    vocab_size: int,
    timeout_seconds: float = 600.0,
    look_timeout_seconds: float = 5.0,
    client: str | None = None,
  ):
    """Makes a control; nothing is sent yet.

    Args:
      transport: carries the calls; the control does not close it.
      urls: addresses.
      vocab_size: ids at or above it are not sent.
      timeout_seconds: for one control call.
      look_timeout_seconds: for each question of `look`.
      client: tells its requests from those of others at the same servers; None: the process's id.
    """
    for name, value in (
      ("timeout_seconds", timeout_seconds),
      ("look_timeout_seconds", look_timeout_seconds),
    ):
      if value <= 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")
    self._transport = transport
    self._vocab_size = vocab_size
    self._timeout_seconds = timeout_seconds
    self._look_timeout_seconds = look_timeout_seconds
    self._urls = tuple(dict.fromkeys(urls))
    self._fenced: dict[str, str] = {}
    self._paused: dict[str, str] = {}
    self._tells_load: dict[str, bool] = {}
    self._client = str(os.getpid()) if client is None else client
    self._calls = itertools.count()

  @property
  def urls(self) -> tuple[str, ...]:
    """Servers that calls go to: those given and not fenced."""
    return tuple(url for url in self._urls if url not in self._fenced)

  @property
  def fenced(self) -> Mapping[str, str]:
    """Fenced servers and why."""
    return dict(self._fenced)

  def set_servers(self, urls: Iterable[str]) -> None:
    """Replaces the set; fences stay."""
    self._urls = tuple(dict.fromkeys(urls))

  def fence(self, url: str, reason: str) -> None:
    """Leaves a server out of all further calls."""
    self._fenced.setdefault(url, reason)

  def admit(self, url: str) -> None:
    """Lifts a fence, once the server was restarted or its weights were mended."""
    self._fenced.pop(url, None)
    self._tells_load.pop(url, None)
    self._paused.pop(url, None)
    if url not in self._urls:
      self._urls += (url,)

  async def pause(
    self, mode: str, *, urls: Sequence[str] | None = None
  ) -> dict[str, Outcome[None]]:
    """Stops generation; requests stay, or end with `abort`."""
    if mode not in PAUSE_MODES:
      raise ValueError(f"mode: expected one of {list(PAUSE_MODES)}, got {mode!r}")

    async def call(url: str) -> None:
      # Noted before it is sent: a pause whose answer is lost may have happened.
      self._paused[url] = mode
      await self.post(url, "/pause_generation", {"mode": mode})

    return await self.on_each(call, urls)

  async def resume(self, *, urls: Sequence[str] | None = None) -> dict[str, Outcome[None]]:
    """Lets generation go on; harmless where it was not paused."""

    async def call(url: str) -> None:
      await self.post(url, "/continue_generation", {})
      self._paused.pop(url, None)

    return await self.on_each(call, urls)

  async def update_weights(
    self,
    path: str | os.PathLike[str],
    version: int,
    *,
    flush_cache: bool,
    urls: Sequence[str] | None = None,
  ) -> dict[str, Outcome[None]]:
    """Loads weights from a directory that the servers can read.

    Args:
      path: directory with safetensors in Hugging Face's layout.
      version: stamped on every token sampled from now on.
      flush_cache: drop cached prefixes. Under `in_place` with running requests SGLang then answers
        400 although the weights did change, so that combination is a ValueError here.
      urls: some of the servers; None for all.

    Raises:
      ValueError: `flush_cache` while one of them is paused `in_place`.
    """
    targets = self.urls if urls is None else tuple(urls)
    held = [url for url in targets if self._paused.get(url) == "in_place"]
    if flush_cache and held:
      raise ValueError(
        f"flush_cache: expected False while paused in_place, got True ({', '.join(held)}); "
        "flush under retract"
      )
    body = {
      "model_path": os.fspath(path),
      "weight_version": str(version),
      "flush_cache": flush_cache,
    }

    async def call(url: str) -> None:
      await self.update(url, "/update_weights_from_disk", body)

    return await self.on_each(call, targets)

  async def discard_update(self, url: str) -> bool:
    """Ends a session of `/begin_weight_update` that was left open; nothing of it is to be served.

    Our engine drops what came in it. SGLang knows no `abort`: there each bucket has changed the
    weights already.

    Returns:
      Whether there was one. Raises TransportError where there was no answer.
    """
    try:
      await self.post(url, "/end_weight_update", {"abort": True})
    except ControlError:
      return False
    return True

  async def abort_all(self, *, urls: Sequence[str] | None = None) -> dict[str, Outcome[None]]:
    """Ends every generation with the tokens it has, also of those that are paused."""

    async def call(url: str) -> None:
      await self.post(url, "/abort_request", {"rid": "", "abort_all": True})

    return await self.on_each(call, urls)

  async def update(self, url: str, path: str, body: Mapping[str, Any] | bytes) -> None:
    """One call that changes weights; raises as `post`, and ControlError where it failed.

    Args: url: of the server. path: of the call. body: as an object or as its JSON.
    """
    reply = protocol.decode(await self.post(url, path, body), protocol.UpdateReply)
    if not reply.success:
      raise ControlError(f"{path}: update refused: {reply.message[:300]}")

  async def score(
    self,
    ids: Sequence[int],
    *,
    extra_key: str | None = None,
    new_tokens: int = 0,
    urls: Sequence[str] | None = None,
  ) -> dict[str, Outcome[Scores]]:
    """Logprobs of a prompt at temperature 1; a server without room is asked until it has some.

    Args:
      ids: the prompt.
      extra_key: one not used before bypasses the prefix cache.
      new_tokens: tokens to generate behind it, to see that the server does.
      urls: some of the servers; None for all.

    Raises:
      ValueError: an id outside the vocabulary; nothing was sent.
    """
    protocol.check_ids(ids, self._vocab_size)

    async def call(url: str) -> Scores:
      request = protocol.GenerateRequest(
        input_ids=[int(token) for token in ids],
        rid=f"score-{next(self._calls)}-{self._client}",
        sampling_params=protocol.SamplingParams(max_new_tokens=new_tokens, temperature=0.0),
        logprob_start_len=0,
        extra_key=extra_key,
      )
      answer = await self._once_there_is_room(url, "/generate", protocol.encode(request))
      reply = protocol.decode(answer, protocol.GenerateReply)
      return Scores(
        logprobs=protocol.parse_scores(reply, request),
        version=protocol.parse_version(reply.meta_info.weight_version),
      )

    return await self.on_each(call, urls)

  async def model_info(
    self, *, urls: Sequence[str] | None = None
  ) -> dict[str, Outcome[protocol.ModelInfo]]:
    """What each server serves; answers also while paused."""

    async def call(url: str) -> protocol.ModelInfo:
      answer = await self._ask("GET", url, "/model_info", None, self._timeout_seconds)
      return protocol.decode(answer, protocol.ModelInfo)

    return await self.on_each(call, urls)

  async def server_info(
    self, *, urls: Sequence[str] | None = None
  ) -> dict[str, Outcome[load.ServerInfo]]:
    """What each server says of itself; answers also while paused."""

    async def call(url: str) -> load.ServerInfo:
      answer = await self._ask("GET", url, "/server_info", None, self._timeout_seconds)
      return protocol.decode(answer, load.ServerInfo)

    return await self.on_each(call, urls)

  async def look(self, url: str) -> Outcome[tuple[int | None, load.ServerLoad]]:
    """The version that a server has, and how busy it is.

    The version is None where the server's word for it is none of ours: somebody else started it.
    """

    async def ask(path: str) -> bytes:
      return await self._ask("GET", url, path, None, self._look_timeout_seconds)

    async def call(url: str) -> tuple[int | None, load.ServerLoad]:
      model = protocol.decode(await ask("/model_info"), protocol.ModelInfo)
      version: int | None = None
      with contextlib.suppress(protocol.ProtocolError):
        version = protocol.parse_version(model.weight_version)
      if self._tells_load.get(url, True):
        info = protocol.decode(await ask("/server_info"), load.ServerInfo)
        self._tells_load[url] = info.tells_load
        if info.tells_load:
          return version, load.load_of_info(info)
      return version, load.parse_loads(await ask("/v1/loads?include=core"))

    return (await self.on_each(call, [url]))[url]

  async def on_each(
    self, call: Callable[[str], Awaitable[T]], urls: Sequence[str] | None
  ) -> dict[str, Outcome[T]]:
    """Makes a call to some servers (None: all) at once; each has its own outcome."""
    clock = asyncio.get_running_loop().time

    async def one(url: str) -> Outcome[T]:
      started = clock()
      try:
        value = await call(url)
      except (TransportError, ControlError, protocol.ProtocolError) as error:
        answered = not isinstance(error, TransportError | ServerBusy)
        return Outcome(None, f"{type(error).__name__}: {error}", clock() - started, answered)
      return Outcome(value, None, clock() - started)

    targets = self.urls if urls is None else tuple(urls)
    return dict(zip(targets, await asyncio.gather(*map(one, targets)), strict=True))

  async def post(self, url: str, path: str, body: Mapping[str, Any] | bytes) -> bytes:
    """One call to one server: its answer.

    Raises:
      TransportError: there was none. ControlError: it refused.
    """
    return await self._ask("POST", url, path, body, self._timeout_seconds)

  async def _once_there_is_room(self, url: str, path: str, body: Mapping[str, Any]) -> bytes:
    clock = asyncio.get_running_loop().time
    deadline = clock() + self._timeout_seconds
    while True:
      try:
        return await self.post(url, path, body)
      except ServerBusy:
        if clock() + BUSY_SECONDS > deadline:
          raise
      await asyncio.sleep(BUSY_SECONDS)

  async def _ask(
    self, method: str, url: str, path: str, body: Mapping[str, Any] | bytes | None, timeout: float
  ) -> bytes:
    status, answer = await self._transport.request(method, f"{url}{path}", body, timeout)
    if status != 200:
      kind = ServerBusy if status == 503 else ControlError
      raise kind(f"{path}: {status} {protocol.error_message(answer)}")
    return answer
