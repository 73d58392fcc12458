"""Load on a server that speaks SGLang's protocol: who asks, how fast the answers come.

One process, one event loop, bodies encoded beforehand, replies decoded as they come, so that the
client takes as little as it can of a machine that it shares with the server.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import msgspec
import numpy as np

TIMEOUT_SECONDS = 600.0


class Meta(msgspec.Struct):
  """What is read of a reply's `meta_info`."""

  completion_tokens: int
  cached_tokens: int
  output_token_logprobs: list[tuple[float, int, Any]] = []


class Reply(msgspec.Struct):
  """What is read of a reply of `/generate`."""

  meta_info: Meta


def body(prompt: Sequence[int], new_tokens: int, seed: int, **fields: Any) -> bytes:
  """A request with logprobs that ends only by its length."""
  sampling = {
    "max_new_tokens": new_tokens,
    "temperature": 1.0,
    "sampling_seed": seed,
    "ignore_eos": True,
  }
  request = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
  return msgspec.json.encode({**request, **fields})


class Load:
  """A client of one server. Use as an async context manager."""

  def __init__(self, url: str):
    self._url = url
    self._decoder = msgspec.json.Decoder(Reply)

  async def __aenter__(self) -> "Load":
    self._http = aiohttp.ClientSession(
      connector=aiohttp.TCPConnector(limit=0),
      timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
      headers={"content-type": "application/json"},
    )
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._http.close()

  async def json(self, path: str) -> Any:
    async with self._http.get(self._url + path) as response:
      return await response.json()

  async def text(self, path: str) -> str:
    async with self._http.get(self._url + path) as response:
      return await response.text()

  async def ask(self, request: bytes) -> Reply:
    async with self._http.post(self._url + "/generate", data=request) as response:
      answer = await response.read()
    if response.status != 200:
      raise RuntimeError(f"/generate: expected 200, got {response.status}: {answer[:500]!r}")
    return self._decoder.decode(answer)

  async def wave(self, requests: Sequence[bytes]) -> dict[str, float]:
    """All requests at once; `seconds` until the last answer, and `tokens`."""
    began = time.perf_counter()
    replies = await asyncio.gather(*map(self.ask, requests))
    seconds = time.perf_counter() - began
    for reply in replies:
      if len(reply.meta_info.output_token_logprobs) != reply.meta_info.completion_tokens:
        raise RuntimeError("/generate: expected a logprob for every token")
    return {
      "seconds": seconds,
      "tokens": sum(reply.meta_info.completion_tokens for reply in replies),
    }

  async def sustained(self, requests: Sequence[bytes], at_once: int) -> dict[str, float]:
    """So many callers, each asking again as soon as it is answered."""
    rest = iter(requests)
    tokens = 0

    async def caller() -> None:
      nonlocal tokens
      for request in rest:
        reply = await self.ask(request)
        tokens += reply.meta_info.completion_tokens

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return {"seconds": time.perf_counter() - began, "tokens": tokens}

  async def stream_times(self, request: bytes) -> list[tuple[float, int]]:
    """When the events of a stream came, in seconds from the request, with the tokens so far."""
    began = time.perf_counter()
    times = []
    async for event in self._events(request):
      reply = self._decoder.decode(event)
      times.append((time.perf_counter() - began, reply.meta_info.completion_tokens))
    return times

  async def _events(self, request: bytes) -> AsyncIterator[bytes]:
    async with self._http.post(self._url + "/generate", data=request) as response:
      async for line in response.content:
        event = line.removeprefix(b"data: ").strip()
        if event and event != b"[DONE]":
          yield event


def percentiles(values: Sequence[float]) -> dict[str, float]:
  """p50 and p99 in milliseconds."""
  p50, p99 = np.percentile(values, (50, 99))
  return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


def gaps(times: Sequence[tuple[float, int]]) -> list[float]:
  """Seconds per token between events; tokens that come together share their wait."""
  return [
    (later - earlier) / max(1, tokens - before)
    for (earlier, before), (later, tokens) in itertools.pairwise(times)
    for _ in range(tokens - before)
  ]
