"""A simulated server: hand-worked times, and a witness that goes on by small steps of time."""

import asyncio
import dataclasses
import itertools
import random

import pytest

from intellect3.simulation import clock, rates, server
from tests.simulation import scenes


def request(tokens, *, group="g", prompt=0, context=None, known=0, version=-1):
  return server.Request(
    group=group,
    prompt=prompt,
    context=prompt if context is None else context,
    known=known,
    version=version,
    left=tokens,
    ended=None,
  )


def serve(settings, play, *, segment_tokens=10**9):
  """Runs `play(server, now)` against one server, under the virtual clock."""

  async def main():
    one = server.Server("http://a", settings, rates.Rates(settings), segment_tokens)
    one.version = 0
    return await play(one, asyncio.get_running_loop().time)

  return clock.run(main())


async def answer(one, wanted):
  """Submits a request and waits until all its tokens are there."""
  told = asyncio.Event()
  wanted.ended = told.set
  one.submit(wanted)
  await told.wait()


async def ended(one, now, *requests):
  """When each was done."""

  async def follow(wanted):
    await answer(one, wanted)
    return now()

  return await asyncio.gather(*map(follow, requests))


def test_requests_share_the_rate_of_their_number():
  # Alone 100 tokens a second; two together 120, 60 each.
  settings = scenes.servers(decode_batch=(1, 2), decode_tokens_per_second=(100.0, 120.0))

  async def play(one, now):
    return await ended(one, now, request(60), request(160))

  # Together until the first has its 60 after 1 s; then 100 more at 100 a second.
  assert serve(settings, play) == pytest.approx([1.0, 2.0])


def test_who_came_first_stands_first_when_segments_end_together():
  settings = scenes.servers(max_running=2)

  async def play(one, now):
    return await ended(one, now, request(100), request(100), request(50))

  # After half a second the third and, again, the first go on; the second waits for them.
  assert serve(settings, play, segment_tokens=50) == pytest.approx([1.0, 1.5, 1.0])


def test_cached_tokens_slow_every_step():
  settings = scenes.servers(seconds_per_cached_token=0.001)

  async def play(one, now):
    return await ended(one, now, request(10, prompt=100))

  # (0.01 + 0.001 * 100) * 10 + 0.001 * 10^2 / 2
  assert serve(settings, play) == pytest.approx([1.15])


def test_who_finds_no_room_waits_and_segments_take_turns():
  settings = scenes.servers(max_running=1)

  async def play(one, now):
    first, second = request(100), request(100)
    times = await ended(one, now, first, second)
    return times, first.longest_segment, one.settle().most_waiting

  times, longest, most = serve(settings, play)
  assert (times, longest, most) == (pytest.approx([1.0, 2.0]), pytest.approx(1.0), 1)
  # Segments of 50: the first stands behind the second after half a second.
  times, longest, _ = serve(settings, play, segment_tokens=50)
  assert (times, longest) == (pytest.approx([1.5, 2.0]), pytest.approx(1.0))


def test_a_prompt_is_computed_once_for_a_group_and_version():
  settings = scenes.servers(prefill_tokens_per_second=100.0)

  async def play(one, now):
    same = await ended(one, now, *(request(100, prompt=200) for _ in range(3)))
    again = await ended(one, now, request(100, prompt=200, context=350, known=300, version=0))
    one.pause()
    one.load(1, flush=False)
    one.resume()
    renewed = await ended(one, now, request(100, prompt=200, context=350, known=300, version=0))
    return same, again[0] - same[0], renewed[0] - again[0], one.settle().prefilled

  same, again, renewed, prefilled = serve(settings, play)
  assert same == pytest.approx([3.0] * 3)  # 2 s of prefill, once; 1 s of decoding
  assert again == pytest.approx(1.5)  # 50 of 350 tokens are new
  assert renewed == pytest.approx(4.5)  # under new weights all of them
  assert prefilled == 200 + 50 + 350


@pytest.mark.parametrize(("flush", "seconds"), [(False, 3.0), (True, 3.0 + 1.5)])
def test_tokens_are_stamped_with_the_version_of_their_moment(flush, seconds):
  settings = scenes.servers(prefill_tokens_per_second=100.0)

  async def play(one, now):
    wanted = request(200)
    answered = asyncio.ensure_future(answer(one, wanted))
    await asyncio.sleep(1.5)
    one.pause()
    await asyncio.sleep(1.0)
    one.load(1, flush=flush)
    one.resume()
    await answered
    return now(), wanted.made, one.settle()

  when, made, usage = serve(settings, play)
  assert when == pytest.approx(seconds)
  assert made == {0: 150, 1: 50}
  assert usage.paused == pytest.approx(1.0)
  assert usage.retracted == (150 if flush else 0)
  assert usage.decoding == pytest.approx(2.0)


def test_a_prompt_that_is_being_computed_waits_for_the_weights_too():
  settings = scenes.servers(prefill_tokens_per_second=100.0)

  async def play(one, now):
    wanted = request(100, prompt=200)
    answered = asyncio.ensure_future(answer(one, wanted))
    await asyncio.sleep(0.5)
    one.pause()
    await asyncio.sleep(4.0)
    one.resume()
    await answered
    return now()

  assert serve(settings, play) == pytest.approx(2.0 + 1.0 + 4.0)


def test_a_full_cache_puts_the_newest_back():
  settings = scenes.servers(cache_tokens=250, prefill_tokens_per_second=100.0)

  async def play(one, now):
    first, second = request(150), request(100, group="h")
    return await ended(one, now, first, second), one.settle(), (first.made, second.made)

  times, usage, made = serve(settings, play, segment_tokens=50)
  # They fit while they begin; after 1.25 s both have 125, had the second not ended at 1.0.
  assert (times, usage.evicted) == (pytest.approx([1.5, 1.0]), 0)

  async def crowd(one, now):
    first, second = request(150), request(150, group="h")
    return await ended(one, now, first, second), one.settle(), (first.made, second.made)

  times, usage, made = serve(settings, crowd, segment_tokens=50)
  # At 1.25 s 250 tokens are cached: the second goes, and comes back when the first is done at
  # 1.5 s (with its 125, and 25 to come, 150 + 150 do not fit): 1.25 s of prefill, 0.25 s to go.
  assert (times, usage.evicted, usage.retracted) == (pytest.approx([1.5, 3.0]), 1, 125)
  assert made == ({0: 150}, {0: 150})


def test_latency_is_paid_for_each_segment():
  settings = scenes.servers(latency_seconds=0.25)

  async def play(one, now):
    return await ended(one, now, request(100))

  assert serve(settings, play, segment_tokens=40) == pytest.approx([1.0 + 3 * 0.25])


def test_who_is_withdrawn_leaves_its_place():
  settings = scenes.servers(max_running=1)

  async def play(one, now):
    running, waiting, last = request(1000), request(1000), request(100)
    one.submit(running)
    one.submit(waiting)
    await asyncio.sleep(1.0)
    one.withdraw(waiting)
    one.withdraw(running)
    return await ended(one, now, last)

  assert serve(settings, play) == pytest.approx([2.0])


@pytest.mark.parametrize("start", [0.0, 1e9])
@pytest.mark.parametrize("rate", [1.0, 3e6])
def test_neither_late_nor_fast_requests_ring_for_ever(start, rate):
  """At 1e9 s the clock has steps of 1.2e-7 s, in which such a server makes a third of a token."""
  settings = scenes.servers(
    decode_batch=(1, 3), decode_tokens_per_second=(rate, rate), cache_tokens=400
  )

  async def play(one, now):
    await asyncio.sleep(start)
    return await ended(one, now, request(100), request(101), request(102, prompt=33))

  times = [time - start for time in serve(settings, play)]
  assert times == pytest.approx([300 / rate, 302 / rate, 303 / rate], rel=1e-6, abs=1e-6)


@dataclasses.dataclass
class Walker:
  arrives: float
  prompt: int
  tokens: int
  got: float = 0.0
  end: float = 0.0


def walked(settings, arrivals, step):
  """When each ends, by small steps of time: every runner moves at the pace of the moment."""
  waiting, running, now, pending = [], [], 0.0, sorted(arrivals, key=lambda one: one.arrives)
  table = list(zip(settings.decode_batch, settings.decode_tokens_per_second, strict=True))
  while pending or waiting or running:
    while pending and pending[0].arrives <= now:
      waiting.append(pending.pop(0))
    while waiting and len(running) < settings.max_running:
      running.append(waiting.pop(0))
    if running:
      count = len(running)
      (low, slow), (high, fast) = next(
        pair for pair in itertools.pairwise(table) if pair[1][0] >= count
      )
      rate = slow + (fast - slow) * (count - low) / (high - low)
      cached = sum(one.prompt + one.got for one in running)
      pace = 1.0 / (count / rate + settings.seconds_per_cached_token * cached)
      for one in running:
        one.got += pace * step
    now += step
    for one in [one for one in running if one.got >= one.tokens]:
      one.end = now
      running.remove(one)
  return [one.end for one in arrivals]


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_ends_when_a_slow_witness_says(seed):
  rng = random.Random(seed)
  settings = scenes.servers(
    max_running=4,
    decode_batch=(1, 2, 5),
    decode_tokens_per_second=(80.0, 130.0, 200.0),
    seconds_per_cached_token=5e-5,
  )
  crowd = [
    Walker(rng.uniform(0.0, 6.0), rng.randrange(1, 80), rng.randrange(20, 200)) for _ in range(12)
  ]

  async def play(one, now):
    async def arrive(walker, index):
      await asyncio.sleep(walker.arrives)
      return (
        await ended(one, now, request(walker.tokens, prompt=walker.prompt, group=f"{index}"))
      )[0]

    return await asyncio.gather(*(arrive(walker, i) for i, walker in enumerate(crowd)))

  assert serve(settings, play) == pytest.approx(walked(settings, crowd, 5e-4), abs=0.02)
