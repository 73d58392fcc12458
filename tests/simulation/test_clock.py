"""Virtual time: jumps, order, and what never comes."""

import asyncio
import gc
import weakref

import pytest

from intellect3.simulation import clock


def test_an_hour_passes_at_once_and_in_order():
  seen = []

  async def sleeper(name, seconds):
    await asyncio.sleep(seconds)
    seen.append((name, asyncio.get_running_loop().time()))

  async def main():
    await asyncio.gather(sleeper("b", 3600.0), sleeper("a", 0.25), sleeper("c", 3600.0))
    return asyncio.get_running_loop().time()

  assert clock.run(main()) == 3600.0
  assert seen == [("a", 0.25), ("b", 3600.0), ("c", 3600.0)]


def test_timeouts_are_of_virtual_time():
  async def main():
    with pytest.raises(TimeoutError):
      await asyncio.wait_for(asyncio.Event().wait(), 7.5)
    return asyncio.get_running_loop().time()

  assert clock.run(main()) == 7.5


def test_what_never_comes_is_named():
  async def forgotten():
    await asyncio.Event().wait()

  async def main():
    await asyncio.create_task(forgotten(), name="forgotten")

  with pytest.raises(clock.Stuck, match=r"(?s)never comes.*forgotten at .*forgotten"):
    clock.run(main())


def test_the_horizon_bounds_what_goes_round_for_ever():
  async def again():
    await asyncio.sleep(10.0)
    return asyncio.create_task(again())

  async def main():
    task = asyncio.create_task(again())
    while task is not None:
      task = await task

  with pytest.raises(clock.Stuck, match="not done after 100 s"):
    clock.run(main(), horizon=100.0)


def test_threads_are_calls():
  async def main():
    return await asyncio.to_thread(sum, [1, 2, 3]), asyncio.get_running_loop().time()

  assert clock.run(main()) == (6, 0.0)


def test_an_exception_nobody_awaits_is_raised():
  def callback():
    raise RuntimeError("lost")

  async def main():
    asyncio.get_running_loop().call_later(1.0, callback)
    await asyncio.sleep(2.0)

  with pytest.raises(RuntimeError, match="lost"):
    clock.run(main())


def test_what_rings_at_the_same_second_keeps_its_order():
  async def main():
    loop, seen = asyncio.get_running_loop(), []
    for number in range(30):
      loop.call_at(1.0, seen.append, number)
    for number in range(30, 60):
      loop.call_later(0.5 + number / 100, seen.append, number)
    dropped = loop.call_at(1.0, seen.append, "dropped")
    dropped.cancel()
    await asyncio.sleep(2.0)
    return seen

  assert clock.run(main()) == [*range(30, 50), *range(30), *range(50, 60)]


def test_late_timers_ring_though_the_clock_is_coarse_there():
  async def main():
    await asyncio.sleep(1e9)  # where floats are 1.2e-7 s apart
    await asyncio.sleep(1e-9)
    await asyncio.sleep(1.0)
    return asyncio.get_running_loop().time()

  assert clock.run(main()) == 1e9 + 1.0


def test_who_never_lets_time_pass_is_stuck(monkeypatch):
  monkeypatch.setattr(clock, "_ROUNDS", 1000)

  async def main():
    await asyncio.sleep(2.0)
    for _ in range(10_000):
      await asyncio.sleep(0)

  with pytest.raises(clock.Stuck, match=r"(?s)at 2 s it goes round and round:.*main"):
    clock.run(main())


def test_much_at_once_is_not_stuck(monkeypatch):
  monkeypatch.setattr(clock, "_ROUNDS", 1000)

  async def main():
    for _ in range(10):
      for _ in range(900):
        await asyncio.sleep(0)
      await asyncio.sleep(1.0)

  clock.run(main())


def test_what_keeps_its_own_timer_is_freed_when_it_rang():
  class Waiting:
    pass

  async def main():
    one = Waiting()
    one.timer = asyncio.get_running_loop().call_later(1.0, lambda waiting: None, one)
    seen = weakref.ref(one)
    del one
    await asyncio.sleep(2.0)
    return seen()

  gc.disable()
  try:
    assert clock.run(main()) is None
  finally:
    gc.enable()
