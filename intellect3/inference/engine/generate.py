"""`/generate`: a body in; one answer, a list of them, or a stream out."""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from intellect3.inference.engine import asgi, parse, stream
from intellect3.inference.engine.asgi import Answer, Wire
from intellect3.inference.engine.desk import Desk
from intellect3.inference.engine.loop import Engine, Event
from intellect3.inference.engine.metrics import Metrics
from intellect3.inference.engine.parse import Call
from intellect3.inference.engine.reply import Wording
from intellect3.inference.engine.request import RequestError
from intellect3.inference.engine.sequence import Sequence as Generation
from intellect3.inference.engine.serving import Serving
from intellect3.inference.engine.stream import GenerateStream

LARGE_BODY = 1 << 18
"""Bytes from which a body is read in a thread, so that others are served while it is checked. The
decoding of JSON holds the interpreter all the same; `Limits.max_body_bytes` bounds it."""


class Stream(Protocol):
  """Tells a call's progress in server-sent events."""

  def event(self, index: int, event: Event) -> bytes:
    """What a generation's progress is told as; maybe nothing."""
    ...

  def end(self, generations: Sequence[Generation]) -> bytes:
    """What comes last, when all have finished."""
    ...


@dataclasses.dataclass(frozen=True, slots=True)
class House:
  """What every route that generates works with."""

  engine: Engine
  desk: Desk
  wording: Wording
  serving: Serving
  metrics: Metrics

  @property
  def version(self) -> str:
    """Of the weights that are served now."""
    return self.engine.weights.version

  async def run(self, call: Call, wire: Wire) -> list[Generation]:
    """Runs a call to its end."""
    generations = await self.desk.run(self.engine, call, wire)
    self.metrics.count(generations)
    return generations

  async def stream(self, call: Call, wire: Wire, stream: Stream) -> None:
    """Runs a call and tells of it as it goes."""
    visit, watch = self.desk.admit(self.engine, call, wire)
    try:
      while news := await visit.news():
        events = b"".join([stream.event(index, event) for index, event in news])
        if events:
          await wire.stream(events)
      await wire.stream(stream.end(visit.generations) + asgi.DONE, last=True)
      self.metrics.count(visit.generations)
    finally:
      watch.cancel()


async def off_loop(body: bytes, read: Any, *arguments: Any) -> Any:
  """Calls `read`, in a thread where the body is large."""
  if len(body) < LARGE_BODY:
    return read(*arguments)
  return await asyncio.to_thread(read, *arguments)


class GenerateRoute:
  """The handler of `/generate`."""

  def __init__(self, house: House):
    self._house = house

  async def __call__(self, body: bytes, wire: Wire) -> Answer | None:
    house = self._house
    fields = await off_loop(body, parse.parse_body, body)
    try:
      call = await off_loop(
        body, parse.parse_generate, fields, house.serving.limits, house.wording.text
      )
    except RequestError as error:
      # A stream is refused inside the stream, but for what SGLang finds before it looks closer.
      if fields.get("stream") is not True or error.status != 400 or _by_contract(error):
        raise
      await wire.stream(stream.refusal(error), last=True)
      return None
    if call.stream:
      told = GenerateStream(
        house.wording,
        call,
        incremental=house.serving.incremental,
        version=lambda: house.version,
      )
      await house.stream(call, wire, told)
      return None
    generations = await house.run(call, wire)
    version, namer = house.version, house.wording.namer(call.token_names)
    replies = [
      house.wording.reply(generation, version=version, namer=namer, prompt_ids=call.prompt_ids)
      for generation in generations
    ]
    return asgi.json_answer(replies if call.listed else replies[0])


def _by_contract(error: RequestError) -> bool:
  return isinstance(error.payload.get("error"), str)
