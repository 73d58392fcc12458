"""How requests travel: a protocol of one method, and its HTTP implementation.

Everything in this package talks to servers through a Transport, so that the same production code
runs against simulated servers under a virtual clock. A reply of any status is a reply; only a
request that got none raises.
"""

import io
from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp
import msgspec

MAX_ANSWER_BYTES = 256 << 20
"""Room for the routed experts of some 100,000 tokens of a large model."""


class TransportError(Exception):
  """A request got no whole answer: refused, dropped, timed out, or more than is taken.

  It may have been carried out or not.

  Attributes:
    url: what was asked.
    reason: what happened.
  """

  def __init__(self, url: str, reason: str):
    super().__init__(f"{url}: {reason}")
    self.url = url
    self.reason = reason


class Transport(Protocol):
  """Carries one request to a server and its answer back."""

  async def request(
    self, method: str, url: str, json: Mapping[str, Any] | bytes | None, timeout: float
  ) -> tuple[int, bytes]:
    """Sends a request and waits for the whole answer.

    Args:
      method: `GET` or `POST`.
      url: full address, e.g. `http://127.0.0.1:30000/generate`.
      json: body, of plain values, or encoded already; None sends none.
      timeout: seconds for everything, from connecting to the last byte.

    Returns:
      Status and body, whatever the status.

    Raises:
      TransportError: there was no answer.
    """
    ...

  async def close(self) -> None:
    """Closes connections; the transport is not used again."""
    ...


class HttpTransport:
  """Transport over HTTP: one aiohttp session, no limit on connections (the pool has its own)."""

  def __init__(
    self, headers: Mapping[str, str] | None = None, *, max_answer_bytes: int = MAX_ANSWER_BYTES
  ):
    """Args: headers: sent with every request, e.g. an authorization. max_answer_bytes: a longer
    answer is a TransportError, and not read to its end."""
    if max_answer_bytes < 1:
      raise ValueError(f"max_answer_bytes: expected at least 1, got {max_answer_bytes}")
    self._headers = dict(headers or {})
    self._max_answer_bytes = max_answer_bytes
    self._session: aiohttp.ClientSession | None = None

  async def request(
    self, method: str, url: str, json: Mapping[str, Any] | bytes | None, timeout: float
  ) -> tuple[int, bytes]:
    """See Transport.request."""
    if self._session is None:
      # Made here and not in __init__: a session belongs to the loop that runs.
      self._session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=self._headers
      )
    body = msgspec.json.encode(json) if isinstance(json, Mapping) else json
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
      async with self._session.request(
        method,
        url,
        # As a file it is sent piece by piece: a large body would hold up the loop.
        data=None if body is None else io.BytesIO(body),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=timeout),
        allow_redirects=False,  # a server answers for itself
      ) as response:
        return response.status, await self._read(url, response)
    except TimeoutError as error:
      raise TransportError(url, f"no answer within {timeout:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
      raise TransportError(url, f"{type(error).__name__}: {error}") from error

  async def _read(self, url: str, response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    room = self._max_answer_bytes
    async for chunk in response.content.iter_any():
      room -= len(chunk)
      if room < 0:
        raise TransportError(url, f"an answer of more than {self._max_answer_bytes} bytes")
      chunks.append(chunk)
    return b"".join(chunks)

  async def close(self) -> None:
    """See Transport.close."""
    if self._session is not None:
      await self._session.close()
      self._session = None
