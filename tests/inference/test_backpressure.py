"""A server that says it is full (503) is waited for: no failure, nothing lost, no hammering."""

import asyncio

import pytest
from fake_servers import (
  FakeServer,
  FakeTransport,
  check_continues,
  generate,
  make_pool,
  run_virtual,
)

from intellect3.inference import client


class Limited(FakeServer):
  """Takes so many requests at once and answers 503 to the rest, as an engine's queue limit does."""

  def __init__(self, limit, *, in_reply=False, **options):
    super().__init__(**options)
    self.limit = limit
    self.refused = 0
    self.in_reply = in_reply

  async def _generate(self, body):
    if self.in_flight < self.limit:
      return await super()._generate(body)
    self.refused += 1
    if not self.in_reply:
      return 503, {"error": {"message": "The queue is full"}}
    finish = {"type": "abort", "message": "The queue is full", "status_code": 503}
    return 200, self._reply(body, len(body["input_ids"]), 0, finish)


async def many(pool, count):
  return await asyncio.gather(*(generate(pool, rid=f"r{i}") for i in range(count)))


@pytest.mark.parametrize("in_reply", [False, True])
def test_many_times_what_a_server_takes_is_served_without_a_failure(in_reply):
  server = Limited(20, in_reply=in_reply)
  pool = make_pool(FakeTransport(a=server), max_concurrency=600, retries=0)
  generations, seconds = run_virtual(many(pool, 400))
  for generation in generations:
    check_continues(generation, 3, 6)
  assert pool.retried == 0 and server.most_in_flight == 20
  # Twenty at a time for a second each, and little lost to asking in vain.
  assert seconds < 30 and server.refused < 400 + 100


def test_others_are_tried_first_and_a_full_server_is_asked_again():
  small, large = Limited(1), FakeServer()
  pool = make_pool(FakeTransport(a=small, b=large), max_concurrency=4, retries=0)

  async def run():
    await many(pool, 8)
    before = len(small.seen)
    small.limit = 4
    for _ in range(20):
      await many(pool, 8)
    return before

  before, _ = run_virtual(run())
  assert 1 <= before <= 3 and small.most_in_flight == 4 and len(large.seen) > 40


def test_a_server_that_stays_full_ends_the_wait_in_time_and_is_not_hammered():
  server = Limited(0)
  pool = make_pool(FakeTransport(a=server), max_wait_seconds=50.0)

  async def run():
    clock = asyncio.get_running_loop().time
    with pytest.raises(client.NoServers, match="503"):
      await generate(pool)
    return clock()

  ended, _ = run_virtual(run())
  assert ended == pytest.approx(50.0, abs=1.0) and 3 < server.refused < 15
  assert pool.retried == 0 and pool.in_flight == {"http://a": 0} and pool.waiting == 0


def test_a_server_that_is_full_of_others_is_used_once_it_has_room():
  server = Limited(0)
  pool = make_pool(FakeTransport(a=server), max_wait_seconds=100.0)

  async def run():
    running = asyncio.ensure_future(many(pool, 5))
    await asyncio.sleep(30.0)
    server.limit = 3
    return await running

  generations, _ = run_virtual(run())
  assert len(generations) == 5


def test_what_was_made_before_a_refusal_is_kept():
  server = FakeServer()
  server.script.extend([("abort", 2), 503])
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=server))))
  check_continues(generation, 3, 6)
  assert [len(body["input_ids"]) for body in server.seen] == [3, 5, 5]
