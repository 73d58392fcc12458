"""A simulated inference server: continuous batching as processor sharing, one event a segment.

All running requests get tokens at the same pace, so one number, the tokens that each has been given
since the start (`_service`), tells when any of them ends: a request that joins at service s and
wants n tokens ends at s + n. The ends stand in a heap by that number, those of requests that joined
together (a group's) as one; nothing happens token by token. Prefill and weight syncs make it stand
still.
"""

import asyncio
import heapq
import operator
from collections import deque

from intellect3.simulation import clock, rates, requests, scenario
from intellect3.simulation.requests import Request, Usage

_order = operator.attrgetter("order")
_EPSILON = 1e-6  # of a token: rounding of a segment's end
_ROUNDING = 1e-15  # of the service, which is a sum of many
_GROUPS = 4096  # prompts that a server remembers


class Server:
  """See the module's docstring. Belongs to one event loop.

  Args:
    url: its name.
    settings: its speed and bounds.
    pace: of decoding.
    segment_tokens: at most so many are asked for at once; then the next request of the same
      generation stands behind whoever waits.
  """

  def __init__(
    self, url: str, settings: scenario.Servers, pace: rates.Rates, segment_tokens: int
  ) -> None:
    self.url = url
    self.version = -1
    self.down = False
    self.losses = 0
    self.usage = Usage()
    self.events = 0
    self._settings = settings
    self._pace = pace
    self._segment_tokens = segment_tokens
    self._loop = asyncio.get_running_loop()
    self._since = self._loop.time()  # up to here everything is counted
    self._busy_until = self._since  # prefilling
    self._paused = False
    self._service = 0.0
    self._cached = 0.0
    self._running: dict[int, Request] = {}  # by order
    self._ends: dict[float, list[Request]] = {}  # whose segments end at a service
    self._heap: list[float] = []  # the keys of `_ends`, and some that are there no more
    self._waiting: deque[Request] = deque()
    self._order = 0
    self._timer: asyncio.TimerHandle | None = None
    self._prompts: dict[str, int] = {}  # group -> version

  @property
  def running(self) -> int:
    """Requests being decoded."""
    return len(self._running)

  @property
  def waiting(self) -> int:
    """Requests in the queue."""
    return len(self._waiting)

  def submit(self, request: Request) -> None:
    """Takes a request; its `ended` is called back when all its tokens are there."""
    if self.down:
      self._fail(request)
      return
    self._advance()
    request.asked = self._since
    first = self._heap[0] if self._heap else None
    self._waiting.append(request)
    self._admit()
    # One more makes all of them slower: what was next comes later, and the timer may ring early.
    if self._timer is None or self._settings.cache_tokens or self._heap[0] != first:
      self._rearm()

  def withdraw(self, request: Request) -> None:
    """Forgets a request that nobody waits for any more."""
    request.ended = request.failed = None
    request.unfinished = 0
    self._advance()
    if request.order >= 0:
      self._break_off(request)
    elif request in self._waiting:
      self._waiting.remove(request)
    self._admit()
    self._rearm()

  def lose(self) -> None:
    """Is gone with all that it has, until `restart`."""
    self._advance()
    broken_off = [*self._running.values(), *self._waiting]
    for request in list(self._running.values()):
      self._break_off(request)
      requests.lose_segment(request)
    self._waiting.clear()
    self._prompts.clear()
    self._busy_until, self._paused = self._since, False
    self.version = -1
    self.down = True
    self.losses += 1
    self._rearm()
    for request in broken_off:
      self._fail(request)

  def restart(self) -> None:
    """Is there again, without weights."""
    self._advance()
    self.down = False

  def _fail(self, request: Request) -> None:
    request.known = 0
    if request.failed is not None:
      self._loop.call_soon(request.failed)

  # Weights.

  def pause(self) -> None:
    """Stands still until `resume`."""
    self._advance()
    self._paused = True
    self._rearm()

  def load(self, version: int, *, flush: bool) -> None:
    """New weights for a paused server; `flush` drops every cache.

    What runs goes on under the new version; flushed, it is computed again first.
    """
    self._advance()
    for request in self._running.values():
      self._count(request)
      if flush:
        self.usage.retracted += request.context
        self._prefill(request.context)
    if flush:
      self._prompts.clear()
      for request in self._waiting:
        request.known = 0
    self.version = version

  def resume(self) -> None:
    """Goes on."""
    self._advance()
    self._paused = False
    self._busy_until = max(self._busy_until, self._since)
    self._admit()
    self._rearm()

  def settle(self) -> Usage:
    """The usage up to now."""
    self._advance()
    return self.usage

  # Time.

  def _advance(self) -> None:
    """Brings service and usage up to the present."""
    now = self._loop.time()
    span = now - self._since
    if span <= 0.0:
      return
    usage, running = self.usage, len(self._running)
    if self.down:
      usage.lost += span
      self._since = now
      return
    usage.running += running * span
    usage.waiting += len(self._waiting) * span
    if self._paused:
      usage.paused += span
      if self._busy_until > self._since:
        self._busy_until += span
    else:
      if self._busy_until > self._since:
        still = min(self._busy_until - self._since, span)
        usage.prefilling += still
        span -= still
      if running and span > 0.0:
        usage.decoding += span
        steps = self._pace.steps(span, running, self._cached)
        self._service += steps
        self._cached += steps * running
        usage.sampled += steps * running
    self._since = now

  def _next(self) -> float | None:
    """When the next segment ends or the cache is full; None: nothing will happen by itself."""
    heap = self._heap
    while heap and heap[0] not in self._ends:
      heapq.heappop(heap)
    if self._paused or not heap:
      return None
    running = len(self._running)
    steps = heap[0] - self._service
    room = self._settings.cache_tokens
    if room and running > 1:
      steps = min(steps, (room - self._cached) / running)
    if steps < 0.0:
      steps = 0.0
    start = self._since if self._busy_until <= self._since else self._busy_until
    return start + self._pace.seconds(steps, running, self._cached)

  def _rearm(self) -> None:
    """Sets the timer, unless one rings before that anyway."""
    when = self._next()
    if when is None:
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None
    elif self._timer is None or when < self._timer.when():
      if self._timer is not None:
        self._timer.cancel()
      self._timer = self._loop.call_at(when, self._ring)

  def _ring(self) -> None:
    self._timer = None
    self.events += 1
    self._advance()
    heap, running = self._heap, self._running
    if running:
      # What comes sooner than the clock can tell from now has come: else it would ring for ever.
      unseen = self._pace.steps(clock.resolution(self._since), len(running), self._cached)
    else:
      unseen = 0.0
    unseen += _EPSILON + _ROUNDING * self._service
    reached = self._service + unseen
    ended: list[Request] = []
    while heap and heap[0] <= reached:
      together = self._ends.pop(heapq.heappop(heap), [])
      ended.extend(sorted(together, key=_order) if len(together) > 1 else together)
    for request in ended:
      self._end_segment(request)
    room = self._settings.cache_tokens
    while room and len(running) > 1 and self._cached + unseen * len(running) >= room:
      newest = running[next(reversed(running))]
      self._break_off(newest)
      newest.known = 0
      self.usage.retracted += newest.context
      self._waiting.appendleft(newest)
      self.usage.evicted += 1
    self._admit()
    self._rearm()

  # Requests.

  def _end_segment(self, request: Request) -> None:
    """A segment is sampled, and out of `_ends`."""
    taken = self._since - request.asked
    if taken > request.longest_segment:
      request.longest_segment = taken
    more = request.left - request.segment
    latency = self._settings.latency_seconds
    if more and not self._waiting and not latency:
      request.asked = self._since  # the next segment, at once; counted when something changes
      if more > self._segment_tokens:
        more = self._segment_tokens
      request.begun = self._service
      request.segment += more
      self._expect(request, more)
      return
    self._count(request, whole=True)
    request.unfinished = 0
    self._leave(request)
    request.known = request.context
    request.version = self.version
    if latency:
      self._loop.call_later(latency, self._answered, request)
    elif request.left:
      request.asked = self._since
      self._waiting.append(request)
    else:
      self._answered(request)

  def _answered(self, request: Request) -> None:
    if request.ended is None:
      return
    if request.left:
      self.submit(request)
    else:
      self._loop.call_soon(request.ended)

  def _count(self, request: Request, *, whole: bool = False) -> None:
    """Notes what was sampled since the segment, or this version, began."""
    sampled = request.segment
    if not whole and (so_far := round(self._service - request.start)) < sampled:
      sampled = so_far
    request.start = self._service
    if sampled > 0:
      request.made[self.version] = request.made.get(self.version, 0) + sampled
      request.segment -= sampled
      request.left -= sampled
      request.context += sampled

  def _expect(self, request: Request, tokens: int) -> None:
    """The running segment ends when so many more tokens are sampled."""
    request.end = end = self._service + tokens
    if end in self._ends:
      self._ends[end].append(request)
    else:
      self._ends[end] = [request]
      heapq.heappush(self._heap, end)

  def _break_off(self, request: Request) -> None:
    """Leaves in the midst of a segment."""
    together = self._ends[request.end]
    together.remove(request)
    if not together:
      del self._ends[request.end]
    request.unfinished = max(0, round(self._service - request.begun))
    self._count(request)
    self._leave(request)

  def _leave(self, request: Request) -> None:
    del self._running[request.order]
    request.order = -1
    self._cached = max(0.0, self._cached - request.context) if self._running else 0.0

  def _admit(self) -> None:
    waiting = self._waiting
    if waiting and not self._paused:
      settings = self._settings
      while waiting and len(self._running) < settings.max_running:
        request = waiting[0]
        segment = min(request.left, self._segment_tokens)
        needed = self._cached + request.context + segment
        if settings.cache_tokens and self._running and needed > settings.cache_tokens:
          break
        waiting.popleft()
        self._start(request, segment)
    if len(waiting) > self.usage.most_waiting:
      self.usage.most_waiting = len(waiting)

  def _start(self, request: Request, segment: int) -> None:
    # One generation keeps its cache key over an update; a new one asks under the new version.
    known = request.known if request.made or request.version == self.version else 0
    if not known and self._prompts.get(request.group) == self.version:
      known = request.prompt
    self._prefill(request.context - known)
    request.reprefilled += max(0, request.known - known)
    if request.group not in self._prompts and len(self._prompts) == _GROUPS:
      del self._prompts[next(iter(self._prompts))]
    self._prompts[request.group] = self.version
    request.order = self._order
    self._order += 1
    request.begun = request.start = self._service
    request.segment = segment
    self._cached += request.context
    self._running[request.order] = request
    self._expect(request, segment)

  def _prefill(self, tokens: int) -> None:
    if tokens > 0:
      self.usage.prefilled += tokens
      seconds = tokens / self._settings.prefill_tokens_per_second
      self._busy_until = max(self._busy_until, self._since) + seconds
