"""The thin layer between routes and the ASGI server: bodies in, answers or streams out.

Routes are functions of a body; where an answer comes in one piece it is returned, a stream is
written through the Wire.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from intellect3.inference.engine.request import RequestError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


class ClientGone(Exception):
  """The connection was closed before the body had come whole."""


class Answer(NamedTuple):
  """A whole HTTP answer."""

  body: bytes
  status: int = 200
  media_type: bytes = b"application/json"


@dataclasses.dataclass(slots=True)
class Wire:
  """One HTTP request's connection."""

  receive: Receive
  send: Send
  streaming: bool = False

  async def body(self, most: int | None = None) -> bytes:
    """The whole body.

    Args:
      most: bytes, or None for any number.

    Raises:
      RequestError: there are more (413); the rest is not kept.
      ClientGone: it will never be whole.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
      message = await self.receive()
      if message["type"] == "http.disconnect":
        raise ClientGone
      pieces.append(message.get("body", b""))
      size += len(pieces[-1])
      if most is not None and size > most:
        raise RequestError(
          f"The body is too large: expected at most {most} bytes (from the context length and "
          "--slots); send fewer prompts at a time.",
          status=413,
        )
      more = message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)

  async def gone(self) -> None:
    """Returns when the client has closed the connection or has its answer."""
    while (await self.receive())["type"] != "http.disconnect":
      pass

  async def answer(self, answer: Answer) -> None:
    body, status, media_type = answer
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body))]
    await self.send({"type": "http.response.start", "status": status, "headers": headers})
    await self.send({"type": "http.response.body", "body": body})

  async def stream(self, events: bytes, *, last: bool = False) -> None:
    """Sends further events; the first call begins the answer, the last one ends it."""
    if not self.streaming:
      self.streaming = True
      headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
      await self.send({"type": "http.response.start", "status": 200, "headers": headers})
    await self.send({"type": "http.response.body", "body": events, "more_body": not last})


Handler = Callable[[bytes, Wire], Awaitable[Answer | None]]
"""Takes a body; returns an answer, or None where it has streamed one."""


class Endpoint:
  """A handler as an ASGI application; RequestErrors become answers."""

  def __init__(
    self,
    handler: Handler,
    refuse: Callable[[RequestError], Answer],
    *,
    max_bytes: int | None = None,
  ):
    """Makes an application.

    Args:
      handler: of the bodies.
      refuse: words a refusal.
      max_bytes: of a body; None takes any.
    """
    self._handler, self._refuse, self._max_bytes = handler, refuse, max_bytes

  async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
    wire = Wire(receive, send)
    try:
      answer = await self._handler(await wire.body(self._max_bytes), wire)
    except ClientGone:
      return
    except RequestError as error:
      answer = self._refuse(error)
    if answer is not None:
      await wire.answer(answer)


def json_answer(value: Any, status: int = 200) -> Answer:
  return Answer(msgspec.json.encode(value), status)


def text_answer(text: str, status: int = 200) -> Answer:
  return Answer(text.encode(), status, b"text/plain; charset=utf-8")


def event(value: Any) -> bytes:
  """One server-sent event."""
  return b"data: " + msgspec.json.encode(value) + b"\n\n"


def refuse(error: RequestError) -> Answer:
  """A refusal as `/generate` and its kin word it."""
  return json_answer(error.payload, error.status)


def bad_request(message: str) -> Answer:
  """A refusal as SGLang's control routes word one."""
  error = {"object": "error", "message": message, "type": "Bad Request"}
  return json_answer(error | {"param": None, "code": 400}, 400)
