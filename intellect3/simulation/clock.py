"""An asyncio event loop whose time is a number: nothing waits, nothing happens outside it.

Place in the ring: beside it. Production coroutines run on it unchanged; where all of them wait for
timers, the clock jumps to the next one. Without sockets, threads and a wall clock the same calls
give the same order of events in every process.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
  """Every coroutine waits for something that no timer will bring, or the horizon was passed."""


class _Timer(asyncio.TimerHandle):
  """A timer that rings after those set before it for the same second.

  A heap of asyncio's own keeps no order among them: what was sent first could come last.
  """

  rank: tuple[float, int]

  def __lt__(self, other: object) -> bool:
    return self.rank < other.rank if isinstance(other, _Timer) else NotImplemented


class VirtualLoop(asyncio.BaseEventLoop):
  """The loop.

  Attributes:
    horizon: the virtual second after which `Stuck` is raised.
    fault: the first exception that a callback or a forgotten task ended with, or None.
  """

  def __init__(self, *, horizon: float = float("inf")) -> None:
    super().__init__()
    self.horizon = horizon
    self._now = 0.0
    self._numbers = itertools.count()
    self._selector = self  # BaseEventLoop waits in `select`
    self._clock_resolution = 1e-9  # timers up to so far ahead are due
    self.fault: BaseException | None = None
    self.set_exception_handler(_remember)

  def time(self) -> float:
    """Virtual seconds since the loop was made."""
    return self._now

  def call_at(  # type: ignore[override]
    self, when: float, callback: Any, *args: Any, context: Any = None
  ) -> asyncio.TimerHandle:
    """Calls back at a virtual second, in the order of the calls where it is the same one."""
    timer = _Timer(when, callback, args, self, context)
    timer.rank = when, next(self._numbers)
    heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
    timer._scheduled = True  # type: ignore[attr-defined]
    return timer

  def select(self, timeout: float | None) -> list[Any]:
    """Goes on to the next timer instead of waiting for it."""
    if timeout == 0:
      return []
    scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
    if timeout is None or not scheduled:
      raise Stuck(f"at {self._now:g} s everything waits for what never comes:\n{self.waiting()}")
    self._now = max(self._now, scheduled[0].when())
    if self._now > self.horizon:
      raise Stuck(f"not done after {self.horizon:g} s:\n{self.waiting()}")
    return []

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
  ) -> asyncio.Handle:
    """The same as `call_soon`."""
    return self.call_soon(callback, *args, context=context)

  def check(self) -> None:
    """Raises the first exception that a callback or a forgotten task ended with."""
    if self.fault is not None:
      raise self.fault

  def _process_events(self, event_list: Any) -> None:
    del event_list

  def _write_to_self(self) -> None:
    pass


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
