"""An asyncio event loop whose time is a number: nothing waits, nothing happens outside it.

Place in the ring: beside it. Production coroutines run on it unchanged; where all of them wait for
timers, the clock jumps to the next one. Without sockets, threads and a wall clock the same calls
give the same order of events in every process.
"""

import asyncio
import contextvars
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_RESOLUTION = 1e-9
"""Seconds: timers up to so far ahead are due."""
_ROUNDS = 1_000_000
"""Of calls at one virtual second, after which it is taken to go on so for ever."""


def resolution(now: float) -> float:
  """Seconds that timers must be apart at `now` to be told from each other."""
  return 2.0 * max(_RESOLUTION, math.ulp(now))


class Stuck(RuntimeError):
  """Every coroutine waits for something that no timer will bring, or the horizon was passed."""


class _Call:
  """A callback that will be called: what `call_soon` and `call_at` return.

  asyncio's own handles do more than virtual time needs, and theirs is a heap that keeps no order
  among timers of the same second: what was sent first could come last.
  """

  __slots__ = ("_when", "arguments", "callback", "context")

  def __init__(
    self,
    callback: Callable[..., object],
    arguments: tuple[Any, ...],
    context: contextvars.Context | None,
    when: float = 0.0,
  ) -> None:
    self.callback: Callable[..., object] | None = callback
    self.arguments = arguments
    self.context = contextvars.copy_context() if context is None else context
    self._when = when

  def cancel(self) -> None:
    """Nobody is called."""
    self.callback, self.arguments = None, ()

  def cancelled(self) -> bool:
    """Whether it was cancelled."""
    return self.callback is None

  def when(self) -> float:
    """The virtual second of a timer."""
    return self._when


class VirtualLoop(asyncio.BaseEventLoop):
  """The loop.

  Attributes:
    horizon: the virtual second after which `Stuck` is raised.
    fault: the first exception that a callback or a forgotten task ended with, or None.
  """

  _ready: deque[_Call]
  _scheduled: list[tuple[float, int, _Call]]  # a heap; the number keeps the order of the calls
  _stopping: bool

  def __init__(self, *, horizon: float = float("inf")) -> None:
    super().__init__()
    self.horizon = horizon
    self._now = 0.0
    self._numbers = itertools.count()
    self.fault: BaseException | None = None
    self.set_exception_handler(_remember)

  def time(self) -> float:
    """Virtual seconds since the loop was made."""
    return self._now

  def call_soon(  # type: ignore[override]
    self, callback: Any, *args: Any, context: Any = None
  ) -> _Call:
    """Calls back in the next round."""
    call = _Call(callback, args, context)
    self._ready.append(call)
    return call

  def call_at(  # type: ignore[override]
    self, when: float, callback: Any, *args: Any, context: Any = None
  ) -> _Call:
    """Calls back at a virtual second, in the order of the calls where it is the same one."""
    call = _Call(callback, args, context, when)
    heapq.heappush(self._scheduled, (when, next(self._numbers), call))
    return call

  def call_later(  # type: ignore[override]
    self, delay: float, callback: Any, *args: Any, context: Any = None
  ) -> _Call:
    """`call_at` so many seconds from now."""
    return self.call_at(self._now + delay, callback, *args, context=context)

  def _run_once(self) -> None:
    """Round after round until `stop`: what was asked for in the last one, then the timers due."""
    ready, scheduled = self._ready, self._scheduled
    next_ready, next_due = ready.popleft, heapq.heappop
    rounds, second = 0, self._now
    while True:
      if not ready and not self._stopping:
        self._jump()
      rounds += 1
      if rounds > _ROUNDS:
        if self._now == second:
          raise Stuck(f"at {second:g} s it goes round and round:\n{self.waiting()}")
        rounds, second = 0, self._now
      due = self._now + _RESOLUTION
      while scheduled and scheduled[0][0] <= due:
        call = next_due(scheduled)[2]
        if call.callback is not None:
          ready.append(call)
      for _ in range(len(ready)):
        call = next_ready()
        if (callback := call.callback) is None:
          continue
        # Who is called back often keeps the call: without this no reference count would free both.
        arguments, call.arguments = call.arguments, ()
        try:
          call.context.run(callback, *arguments)
        except (SystemExit, KeyboardInterrupt):
          raise
        except BaseException as error:
          self.call_exception_handler({"message": "a callback failed", "exception": error})
      if self._stopping:
        return

  def _jump(self) -> None:
    """Goes on to the next timer instead of waiting for it."""
    scheduled = self._scheduled
    while scheduled and scheduled[0][2].callback is None:
      heapq.heappop(scheduled)
    if not scheduled:
      raise Stuck(f"at {self._now:g} s everything waits for what never comes:\n{self.waiting()}")
    self._now = max(self._now, scheduled[0][0])
    if self._now > self.horizon:
      raise Stuck(f"not done after {self.horizon:g} s:\n{self.waiting()}")

  def waiting(self) -> str:
    """Where every unfinished task stands, one line each, in the order of their names."""
    lines = []
    for task in sorted(asyncio.all_tasks(self), key=lambda task: task.get_name()):
      frames = task.get_stack(limit=1)
      where = f"{frames[-1].f_code.co_qualname}:{frames[-1].f_lineno}" if frames else "?"
      lines.append(f"  {task.get_name()} at {where}")
    return "\n".join(lines)

  def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
    """Runs it here and now: there are no threads."""
    future = self.create_future()
    try:
      future.set_result(func(*args))
    except Exception as error:
      future.set_exception(error)
    return future

  def call_soon_threadsafe(  # type: ignore[override]
    self, callback: Any, *args: Any, context: Any = None
  ) -> _Call:
    """The same as `call_soon`."""
    return self.call_soon(callback, *args, context=context)

  def check(self) -> None:
    """Raises the first exception that a callback or a forgotten task ended with."""
    if self.fault is not None:
      raise self.fault


def _remember(loop: Any, context: dict[str, Any]) -> None:
  if loop.fault is None and isinstance(context.get("exception"), BaseException):
    loop.fault = context["exception"]


def run(main: Coroutine[Any, Any, T], *, horizon: float = float("inf")) -> T:
  """Runs a coroutine on a virtual loop of its own.

  Args:
    main: the coroutine.
    horizon: virtual seconds that it may take.

  Returns:
    Its result.

  Raises:
    Stuck: everything waits for what never comes, or the horizon is passed.
    Exception: what it raised, or the first thing that a callback or a forgotten task raised.
  """
  loop = VirtualLoop(horizon=horizon)
  try:
    result = loop.run_until_complete(main)
    loop.check()
    return result
  finally:
    loop.horizon = float("inf")
    _cancel_all(loop)
    loop.close()


def _cancel_all(loop: VirtualLoop) -> None:
  tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
  for task in tasks:
    task.cancel()
  if tasks:
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
  loop.run_until_complete(loop.shutdown_asyncgens())
