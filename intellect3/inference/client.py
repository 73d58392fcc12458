"""The pool of servers that rollouts sample from.

Place in the ring: Conversation -> ServerPool -> `/generate` of some server. The pool picks the
least loaded server, bounds what each one gets, asks again after failures that asking again can
mend, and goes on from the tokens it has when a server aborts a generation or dies: the next
request's prompt is the prompt and those tokens, and each token keeps the version and logprob it was
sampled with.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from intellect3.inference import protocol
from intellect3.inference.balance import Balancer, NoServers, Server
from intellect3.inference.transport import Transport, TransportError
from intellect3.types import Generation

__all__ = [
  "NoServers",
  "RequestRejected",
  "ServerFenced",
  "ServerPool",
  "ServerUnavailable",
  "continued_seed",
]


class ServerFenced(Exception):
  """The server was fenced while this request was on it; its answer would not be trusted."""


class RequestRejected(Exception):
  """The server refused the request (a 4xx); asking again would change nothing."""


class ServerUnavailable(Exception):
  """The server answered 5xx, or aborted a generation; asking again may help."""


class ServerPool:
  """Generates on whichever server is least loaded. Belongs to one event loop."""

  def __init__(
    self,
    transport: Transport,
    urls: Sequence[str] = (),
    *,
    vocab_size: int,
    max_concurrency: int = 256,
    retries: int = 5,
    backoff_seconds: float = 0.5,
    backoff_max_seconds: float = 30.0,
    timeout_seconds: float = 600.0,
    seed: int = 0,
  ):
    """Makes a pool; nothing is sent yet.

    Args:
      transport: carries the requests; the pool does not close it.
      urls: addresses, e.g. `http://127.0.0.1:30000`.
      vocab_size: ids at or above it are neither sent nor accepted.
      max_concurrency: requests on one server at a time; further ones wait their turn.
      retries: failures in a row, with no token gained between them, that a generation survives.
      backoff_seconds: before retry n it waits a random time up to this times 2^(n-1) ("full
        jitter"), so that the clients of a server that fell do not return together.
      backoff_max_seconds: upper bound of that range.
      timeout_seconds: for one request.
      seed: of the jitter.
    """
    for name, value, least in (
      ("vocab_size", vocab_size, 1),
      ("retries", retries, 0),
      ("backoff_seconds", backoff_seconds, 0),
      ("backoff_max_seconds", backoff_max_seconds, 0),
    ):
      if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if timeout_seconds <= 0:
      raise ValueError(f"timeout_seconds: expected more than 0, got {timeout_seconds}")
    self._transport = transport
    self._vocab_size = vocab_size
    self._retries = retries
    self._backoff = backoff_seconds, backoff_max_seconds
    self._timeout_seconds = timeout_seconds
    self._jitter = random.Random(seed)
    self._balancer = Balancer(urls, max_concurrency)
    self.retried = 0
    self.continued = 0

  @property
  def urls(self) -> tuple[str, ...]:
    """Servers that get requests."""
    return tuple(server.url for server in self._balancer.open)

  @property
  def in_flight(self) -> dict[str, int]:
    """Requests on each server that gets any."""
    return {server.url: server.in_flight for server in self._balancer.open}

  @property
  def waiting(self) -> int:
    """Generations that wait for a server to have room."""
    return self._balancer.waiting

  def set_servers(self, urls: Iterable[str]) -> None:
    """Replaces the set. Requests on a server that left still end there; fences stay."""
    self._balancer.set_servers(urls)

  def fence(self, url: str, reason: str) -> None:
    """Sends nothing more to a server; its requests in flight fail with ServerFenced.

    Idempotent. An unknown url is remembered, in case it joins later.
    """
    self._balancer.fence(url, reason)

  def admit(self, url: str) -> None:
    """Adds a server or lifts its fence, once it was restarted or its weights were mended."""
    self._balancer.admit(url)

  async def generate(
    self,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    seed: int | None,
    rid: str,
    extra_key: str | Callable[[], str] | None = None,
  ) -> Generation:
    """Samples a continuation of a prompt.

    Args:
      prompt_ids: the prompt, checked against the vocabulary before anything is sent.
      max_new_tokens: at least 1.
      temperature: 0 is greedy.
      stop_token_ids: ids that end the generation.
      seed: sampling seed, below 2^31; a request that goes on after n tokens uses
        `continued_seed(seed, n)`, since a server counts from the request's start. None: the
        server chooses.
      rid: id of the request, unique; the second and later requests of one generation append `.1`,
        `.2`, ..., since a server may still hold the one before.
      extra_key: cache key, or a function that gives it at the moment of sending (the version may
        change while a generation waits).

    Returns:
      The stitched Generation: `finish_reason` is `stop` or `length`, never `abort`; `server` is the
      one that made the last token.

    Raises:
      ValueError: an id outside the vocabulary, or max_new_tokens below 1.
      NoServers: there is none left.
      ServerFenced: the server was fenced while it worked on this.
      RequestRejected: a 4xx. ProtocolError: a reply that cannot be right.
      TransportError, ServerUnavailable: the last failure, when `retries` were used up.
    """
    protocol.check_ids(prompt_ids, self._vocab_size)
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    prompt = [int(token) for token in prompt_ids]
    pieces: list[Generation] = []
    so_far: list[int] = []
    failures = requests = 0
    while True:
      request = protocol.GenerateRequest(
        input_ids=prompt + so_far,
        rid=rid if requests == 0 else f"{rid}.{requests}",
        sampling_params=protocol.SamplingParams(
          max_new_tokens=max_new_tokens - len(so_far),
          temperature=temperature,
          stop_token_ids=[int(token) for token in stop_token_ids],
          sampling_seed=seed if seed is None else continued_seed(seed, len(so_far)),
        ),
      )
      requests += 1
      error: Exception
      try:
        piece = await self._send(request, extra_key)
      except (TransportError, ServerUnavailable) as failure:
        error = failure
      else:
        pieces.append(piece)
        so_far.extend(piece.tokens.tolist())
        self._check_unfenced(pieces)
        if piece.finish_reason != "abort":
          return _stitch(pieces, piece.finish_reason)
        if len(so_far) >= max_new_tokens:
          return _stitch(pieces, "length")
        self.continued += 1
        failures = 0 if piece.tokens.size else failures
        error = ServerUnavailable(f"{piece.server}: aborted {request.rid}")
      failures += 1
      if failures > self._retries:
        raise error
      self.retried += 1
      await asyncio.sleep(self._jitter.uniform(0.0, self._backoff_range(failures)))

  async def _send(
    self, request: protocol.GenerateRequest, extra_key: str | Callable[[], str] | None
  ) -> Generation:
    """One request to one server; returns what it made, also of an aborted generation."""
    server = await self._balancer.acquire()
    try:
      body = protocol.encode(request)
      if extra_key is not None:
        body["extra_key"] = extra_key() if callable(extra_key) else extra_key
      status, answer = await self._request(server, body)
      if status >= 500:
        raise ServerUnavailable(f"{server.url}: {status} {protocol.error_message(answer)}")
      if status != 200:
        raise RequestRejected(f"{server.url}: {status} {protocol.error_message(answer)}")
      reply = protocol.decode(answer, protocol.GenerateReply)
      code = reply.meta_info.finish_reason.status_code
      if code is not None and 400 <= code < 500:
        raise RequestRejected(f"{server.url}: {code} {reply.meta_info.finish_reason.message}")
      piece = protocol.parse_generation(
        reply, request, vocab_size=self._vocab_size, server=server.url
      )
    except (TransportError, ServerUnavailable):
      server.failures += 1
      delay = self._backoff_range(server.failures)
      server.blocked_until = asyncio.get_running_loop().time() + delay
      raise
    except protocol.ProtocolError as error:
      raise protocol.ProtocolError(f"{server.url}: {error}") from error
    finally:
      self._balancer.release(server)
    server.failures = 0
    server.blocked_until = 0.0
    return piece

  async def _request(self, server: Server, body: dict) -> tuple[int, bytes]:
    """Carries a request such that `fence` can end it."""
    request = asyncio.ensure_future(
      self._transport.request("POST", f"{server.url}/generate", body, self._timeout_seconds)
    )
    server.requests.add(request)
    try:
      return await request
    except asyncio.CancelledError:
      current = asyncio.current_task()
      if server.fenced is None or (current is not None and current.cancelling()):
        raise  # Cancelled from outside, not by the fence.
      raise ServerFenced(f"{server.url}: {server.fenced}") from None
    finally:
      server.requests.discard(request)

  def _check_unfenced(self, pieces: Sequence[Generation]) -> None:
    """Refuses tokens of a server that was fenced after it made them."""
    for piece in pieces:
      if reason := self._balancer.fence_reason(piece.server):
        raise ServerFenced(f"{piece.server}: {reason}")

  def _backoff_range(self, failures: int) -> float:
    base, longest = self._backoff
    return min(longest, base * 2.0 ** (failures - 1))


def continued_seed(seed: int, tokens: int) -> int:
  """Seed of a request that goes on after `tokens` tokens; `seed` itself for 0. Below 2^31."""
  if tokens == 0:
    return seed
  # A Weyl step and a multiply-xorshift: different for nearby seeds and lengths, the same anywhere.
  mixed = (seed + tokens * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
  mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
  return (mixed ^ (mixed >> 31)) & 0x7FFFFFFF


def _stitch(pieces: Sequence[Generation], finish_reason: str) -> Generation:
  """The pieces as one Generation, in order."""
  made = [piece for piece in pieces if piece.tokens.size] or pieces[-1:]
  return Generation(
    tokens=np.concatenate([piece.tokens for piece in pieces]),
    inference_logprobs=np.concatenate([piece.inference_logprobs for piece in pieces]),
    policy_versions=np.concatenate([piece.policy_versions for piece in pieces]),
    finish_reason=finish_reason,
    server=made[-1].server,
  )
