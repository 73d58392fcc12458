"""The pool of servers that rollouts sample from.

Place in the ring: Conversation -> ServerPool -> `/generate` of some server. A generation is asked
for in segments on one server, so that a crash costs at most a segment. The pool picks the server
(`balance`), bounds what each one gets, asks again after failures that asking again can mend, and
goes on from the tokens it has when a segment is aborted, times out or its server dies: the next
request's prompt is the prompt and those tokens, and each token keeps the version and logprob it was
sampled with. Nothing is asked for twice at once.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from intellect3.inference import protocol, routed_experts
from intellect3.inference.balance import Balancer, NoServers, Server
from intellect3.inference.continuation import Progress, continued_seed
from intellect3.inference.transport import Transport, TransportError
from intellect3.types import Generation, RouterShape

__all__ = [
  "NoServers",
  "RequestRejected",
  "ServerFenced",
  "ServerPool",
  "ServerUnavailable",
  "continued_seed",
]


LEAST_FULL_SECONDS = 0.1
"""A full server is not asked again sooner, unless a request of ours ends there."""


class ServerFenced(Exception):
  """The server was fenced while this request was on it; its answer would not be trusted."""


class RequestRejected(Exception):
  """The server refused the request (a 4xx); asking again would change nothing."""


class ServerUnavailable(Exception):
  """The server answered 5xx, or aborted a generation; asking again may help."""


class _ServerFull(Exception):
  """The server has no room for the request (503): back-pressure, and no failure."""


class ServerPool:
  """Generates on whichever server suits best. Belongs to one event loop."""

  def __init__(
    self,
    transport: Transport,
    urls: Sequence[str] = (),
    *,
    vocab_size: int,
    router: RouterShape | None = None,
    max_concurrency: int = 256,
    max_waiting: int = 10_000,
    max_wait_seconds: float = 600.0,
    spill: int = 16,
    segment_tokens: int = 4096,
    retries: int = 5,
    backoff_seconds: float = 0.5,
    backoff_max_seconds: float = 30.0,
    timeout_seconds: float = 600.0,
    grace_seconds: float = 10.0,
    seed: int = 0,
  ):
    """Makes a pool; nothing is sent yet.

    Args:
      transport: carries the requests; the pool does not close it.
      urls: addresses, e.g. `http://127.0.0.1:30000`.
      vocab_size: ids at or above it are neither sent nor accepted.
      router: the model's; every generation then brings its routed experts, or fails.
      max_concurrency: requests on one server at a time, fewer where it says that it is full (503);
        further ones wait their turn.
      max_waiting: how many may wait.
      max_wait_seconds: how long each may wait.
      spill: requests that a home server may have more than the least busy one (`balance.choose`).
      segment_tokens: most tokens that one request asks for.
      retries: failures in a row, with no token gained between them, that a generation survives. A
        time-out is one whatever came of it.
      backoff_seconds: before retry n it waits a random time up to this times 2^(n-1) ("full
        jitter"), so that the clients of a server that fell do not return together.
      backoff_max_seconds: upper bound of that range.
      timeout_seconds: for one segment; then it is aborted.
      grace_seconds: how long an aborted segment may take to hand over its tokens.
      seed: of the jitter.
    """
    for name, value, least in (
      ("vocab_size", vocab_size, 1),
      ("segment_tokens", segment_tokens, 1),
      ("retries", retries, 0),
      ("backoff_seconds", backoff_seconds, 0),
      ("backoff_max_seconds", backoff_max_seconds, 0),
      ("grace_seconds", grace_seconds, 0),
    ):
      if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if timeout_seconds <= 0:
      raise ValueError(f"timeout_seconds: expected more than 0, got {timeout_seconds}")
    self._transport = transport
    self._vocab_size = vocab_size
    self._router = router
    self._segment_tokens = segment_tokens
    self._retries = retries
    self._max_wait_seconds = max_wait_seconds
    self._backoff = backoff_seconds, backoff_max_seconds
    self._timeout_seconds = timeout_seconds
    self._grace_seconds = grace_seconds
    self._jitter = random.Random(seed)
    self._balancer = Balancer(
      urls,
      max_concurrency,
      max_waiting=max_waiting,
      max_wait_seconds=max_wait_seconds,
      spill=spill,
    )
    self.retried = 0
    self.continued = 0
    self.timed_out = 0

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

  def set_servers(self, urls: Iterable[str], versions: Mapping[str, int] | None = None) -> None:
    """Replaces the set. Segments on a server that left still end there; fences stay.

    Args:
      urls: addresses.
      versions: the weights each has, the cache key of requests that bring none; lifts its fence.
    """
    self._balancer.set_servers(urls, versions)

  def set_loads(self, loads: Mapping[str, tuple[int, int]]) -> None:
    """Takes what servers say they have, of all clients: (running, waiting) by url."""
    self._balancer.set_loads(loads)

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
    affinity: str | None = None,
    prefer: str | None = None,
    known_tokens: int = 0,
    so_far: Generation | None = None,
    progress: Callable[[Generation], None] | None = None,
  ) -> Generation:
    """Samples a continuation of a prompt.

    Args:
      prompt_ids: the prompt, checked against the vocabulary before anything is sent.
      max_new_tokens: at least 1, tokens of `so_far` included.
      temperature: 0 is greedy.
      stop_token_ids: ids that end the generation.
      seed: sampling seed, below 2^31; a request that goes on after n tokens uses
        `continued_seed(seed, n)`, since a server counts from the request's start. None: the
        server chooses.
      rid: id of the request, unique; the second and later requests of one generation append `.1`,
        `.2`, ..., since a server may still hold the one before.
      extra_key: cache key, or a function that gives it at the moment of sending; None: the version
        of the server's weights, as told, when the generation first went there.
      affinity: name of the group whose members share the prompt.
      prefer: url of the server that holds the conversation so far.
      known_tokens: length of the prompt's prefix that servers have computed before, and whose
        experts, with a `router`, the caller has.
      so_far: what an earlier call (of another process, perhaps) had when it was broken off.
      progress: is given each segment's tokens as they come.

    Returns:
      The stitched Generation: `finish_reason` is `stop` or `length`, never `abort`; `server` is the
      one that made the last token, `servers` are all that made any.

    Raises:
      ValueError: an id outside the vocabulary, or max_new_tokens below 1.
      NoServers: none came free, or all were full, for as long as a request may wait.
      ServerFenced: the server was fenced while it worked on this.
      RequestRejected: a 4xx. ProtocolError: a reply that cannot be right.
      TransportError, ServerUnavailable: the last failure, when `retries` were used up.
    """
    protocol.check_ids(prompt_ids, self._vocab_size)
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    prompt = [int(token) for token in prompt_ids]
    made = Progress(known=known_tokens)
    if so_far is not None:
      made.resume(so_far, self._router)
    failures = requests = 0
    server: Server | None = None
    clock = asyncio.get_running_loop().time
    full_since: float | None = None
    try:
      while len(made.tokens) < max_new_tokens:
        budget = min(self._segment_tokens, max_new_tokens - len(made.tokens))
        request = made.next_request(
          prompt,
          rid=rid if requests == 0 else f"{rid}.{requests}",
          max_new_tokens=budget,
          temperature=temperature,
          stop_token_ids=stop_token_ids,
          seed=seed,
          router=self._router,
        )
        requests += 1
        if server is None:
          waited = 0.0 if full_since is None else clock() - full_since
          server = await self._balancer.acquire(
            prefer=prefer, affinity=affinity, within=max(0.0, self._max_wait_seconds - waited)
          )
        error: Exception
        try:
          piece, in_time = await self._segment(server, request, extra_key, made)
        except _ServerFull as refusal:
          full_since = clock() if full_since is None else full_since
          self._balancer.refused(server, self._full_seconds(server))
          self._balancer.release(server)
          server = None
          if clock() - full_since >= self._max_wait_seconds:
            raise NoServers(f"{refusal}, for {self._max_wait_seconds:g} s") from None
          continue
        except (TransportError, ServerUnavailable) as failure:
          error = failure
        else:
          full_since = None
          made.add(piece)
          self._check_unfenced(made.pieces)
          if progress is not None and piece.tokens.size:
            progress(piece)
          if piece.finish_reason == "stop":
            return made.whole("stop")
          if piece.finish_reason == "length":
            if piece.tokens.size < budget:  # the context is full
              break
            failures = 0
            if not server.open:
              self._balancer.release(server)
              server = None
            continue
          if len(made.tokens) >= max_new_tokens:
            break
          self.continued += 1
          prefer = None
          if in_time and piece.tokens.size:
            failures = 0
          error = ServerUnavailable(f"{piece.server}: aborted {request.rid}")
        self._balancer.release(server)
        server = None
        failures += 1
        if failures > self._retries:
          raise error
        self.retried += 1
        await asyncio.sleep(self._jitter.uniform(0.0, self._backoff_range(failures)))
      return made.whole("length")
    finally:
      if server is not None:
        self._balancer.release(server)

  async def _segment(
    self,
    server: Server,
    request: protocol.GenerateRequest,
    extra_key: str | Callable[[], str] | None,
    made: Progress,
  ) -> tuple[Generation, bool]:
    """One request to one server: what it made, also where aborted, and whether it was in time."""
    body = protocol.encode(request)
    if extra_key is not None:
      body["extra_key"] = extra_key() if callable(extra_key) else extra_key
    elif server.version is not None:
      body["extra_key"] = made.keys.setdefault(server.url, str(server.version))
    try:
      status, answer, in_time = await self._request(server, body)
      if status == 503:
        raise _ServerFull(f"{server.url}: {status} {protocol.error_message(answer)}")
      if status >= 500:
        raise ServerUnavailable(f"{server.url}: {status} {protocol.error_message(answer)}")
      if status != 200:
        raise RequestRejected(f"{server.url}: {status} {protocol.error_message(answer)}")
      reply = protocol.decode(answer, protocol.GenerateReply)
      code = reply.meta_info.finish_reason.status_code
      if code == 503:
        raise _ServerFull(f"{server.url}: {code} {reply.meta_info.finish_reason.message}")
      if code is not None and 400 <= code < 500:
        raise RequestRejected(f"{server.url}: {code} {reply.meta_info.finish_reason.message}")
      piece = protocol.parse_generation(
        reply, request, vocab_size=self._vocab_size, server=server.url
      )
      if self._router is not None:
        piece = routed_experts.add(piece, reply, request, self._router)
    except (TransportError, ServerUnavailable):
      self._avoid(server)
      raise
    except protocol.ProtocolError as error:
      raise type(error)(f"{server.url}: {error}") from error
    if in_time:
      self._balancer.succeeded(server)
    else:
      self._avoid(server)
    cached = reply.meta_info.cached_tokens
    if cached is not None:
      made.reprefilled += max(0, made.known - cached)
    if piece.tokens.size:  # of the last token there is no cache before the next one is made
      made.known = len(request.input_ids) + int(piece.tokens.size) - 1
    return piece, in_time

  async def _request(self, server: Server, body: dict) -> tuple[int, bytes, bool]:
    """Carries a request such that `fence` can end it; at its time-out asks for what it has."""
    limit = self._timeout_seconds + self._grace_seconds
    url = f"{server.url}/generate"
    request = asyncio.ensure_future(self._transport.request("POST", url, body, limit + 1.0))
    server.requests[request] = None
    abort: asyncio.Future | None = None
    try:
      in_time = bool((await asyncio.wait({request}, timeout=self._timeout_seconds))[0])
      if not in_time:
        self.timed_out += 1
        abort = asyncio.ensure_future(
          self._transport.request(
            "POST", f"{server.url}/abort_request", {"rid": body["rid"]}, self._grace_seconds + 1.0
          )
        )
        # It may answer late, while paused: the request's own answer is what counts.
        await asyncio.wait({request}, timeout=self._grace_seconds)
      if not request.done():
        raise TransportError(url, f"no answer within {limit:g} s, an abort included")
      if request.cancelled():
        raise ServerFenced(f"{server.url}: {server.fenced}")
      status, answer = request.result()
      return status, answer, in_time
    finally:
      server.requests.pop(request, None)
      for task in (request, abort):
        if task is not None:
          task.cancel()
          task.add_done_callback(_ignore)

  def _avoid(self, server: Server) -> None:
    server.failures += 1
    delay = self._backoff_range(server.failures)
    server.blocked_until = asyncio.get_running_loop().time() + delay

  def _full_seconds(self, server: Server) -> float:
    """How long a full server is left alone: longer each time, never together with other clients."""
    longest = max(LEAST_FULL_SECONDS, self._backoff_range(server.refusals + 1))
    return longest * self._jitter.uniform(0.5, 1.0)

  def _check_unfenced(self, pieces: Sequence[Generation]) -> None:
    """Refuses tokens of a server that was fenced after it made them."""
    made_by = (url for piece in pieces for url in piece.servers or (piece.server,))
    for url in dict.fromkeys(made_by):
      if reason := self._balancer.fence_reason(url):
        raise ServerFenced(f"{url}: {reason}")

  def _backoff_range(self, failures: int) -> float:
    base, longest = self._backoff
    return min(longest, base * 2.0 ** min(failures - 1, 60))  # of more a float has no room


def _ignore(task: asyncio.Future) -> None:
  """Looks at what became of an abandoned task, so that asyncio does not report it."""
  if not task.cancelled():
    task.exception()
