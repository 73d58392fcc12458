"""An HTTP server between client and model that spoils what it passes on, as it is told.

It speaks HTTP by hand, so that it can break every rule of it. Behind it is arithmetic: the token at
position p is p % 200, the same as in `fake_servers`.
"""

import asyncio
import json

from fake_servers import logprob_at, token_at


def honest_reply(body, version="3"):
  """What a server that is well would answer."""
  start, count = len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
  made = range(start, start + count)
  return {
    "text": "",
    "output_ids": [token_at(p) for p in made],
    "meta_info": {
      "id": body["rid"],
      "finish_reason": {"type": "length", "length": count},
      "prompt_tokens": start,
      "completion_tokens": count,
      "cached_tokens": 0,
      "weight_version": version,
      "weight_versions": [{"version": version, "start": 0, "end": count}],
      "output_token_logprobs": [[logprob_at(p), token_at(p), None] for p in made],
    },
  }


class FaultProxy:
  """Listens on a port of its own; `spoil` turns an honest reply into what is sent.

  `spoil(reply)` gives a JSON value, bytes of a body, or a coroutine function of (writer, body) that
  writes whatever it likes.
  """

  def __init__(self):
    self.spoil = lambda reply: reply
    self.requests = 0
    self._server = None
    self.url = ""

  async def __aenter__(self):
    self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
    self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
    return self

  async def __aexit__(self, *_):
    self._server.close()

  async def _serve(self, reader, writer):
    try:
      head = await reader.readuntil(b"\r\n\r\n")
      length = next(
        (
          int(line.split(b":")[1])
          for line in head.split(b"\r\n")
          if line.lower().startswith(b"content-length")
        ),
        0,
      )
      body = json.loads(await reader.readexactly(length) or b"{}")
      if b"/generate" in head.split(b"\r\n")[0]:
        self.requests += 1
        spoiled = self.spoil(honest_reply(body))
      else:
        spoiled = b""
      if asyncio.iscoroutinefunction(spoiled):
        await spoiled(writer)
      else:
        data = spoiled if isinstance(spoiled, bytes) else json.dumps(spoiled).encode()
        writer.write(answer(data))
      await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
      pass
    finally:
      writer.close()


def answer(body, *, status=b"200 OK", length=None, headers=b""):
  """A whole HTTP answer; `length` may lie."""
  length = len(body) if length is None else length
  return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n%s" % (
    status,
    length,
    headers,
    body,
  )
