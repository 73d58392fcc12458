"""ServerPool against simulated servers in virtual time: balance, bounds, fences, joins."""

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
from hypothesis import given
from hypothesis import strategies as st

from intellect3.inference import client
from intellect3.inference.balance import Balancer, Server, choose, home_of, others_load


def test_load_is_balanced_and_bounded():
  servers = {name: FakeServer() for name in "abc"}

  async def run():
    pool = make_pool(FakeTransport(**servers), max_concurrency=2)
    await asyncio.gather(*(generate(pool, rid=f"r{i}") for i in range(12)))
    return pool

  pool, seconds = run_virtual(run())
  assert [server.most_in_flight for server in servers.values()] == [2, 2, 2]
  assert [len(server.seen) for server in servers.values()] == [4, 4, 4]
  assert seconds == 2.0
  assert set(pool.in_flight.values()) == {0} and pool.waiting == 0


def test_a_slow_server_gets_less():
  servers = {"slow": FakeServer(seconds=10.0), "fast": FakeServer(seconds=1.0)}

  async def run():
    pool = make_pool(FakeTransport(**servers), max_concurrency=1)
    await asyncio.gather(*(generate(pool, rid=f"r{i}") for i in range(11)))

  _, seconds = run_virtual(run())
  assert len(servers["slow"].seen) == 1 and len(servers["fast"].seen) == 10
  assert seconds == 10.0


def test_load_counts_and_not_turns():
  servers = {"slow": FakeServer(seconds=100.0), "fast": FakeServer(seconds=1.0)}

  async def run():
    pool = make_pool(FakeTransport(**servers), timeout_seconds=200.0)
    first = asyncio.create_task(generate(pool, rid="first"))
    await asyncio.sleep(0.1)
    for i in range(5):
      await generate(pool, rid=f"r{i}")
    await first

  run_virtual(run())
  assert [len(server.seen) for server in servers.values()] == [1, 5]


def test_waiting_is_first_come_first_served():
  ended = []

  async def one(pool, name):
    await generate(pool, rid=name)
    ended.append(name)

  async def run():
    pool = make_pool(FakeTransport(a=FakeServer()), max_concurrency=1)
    await asyncio.gather(*(one(pool, f"r{i}") for i in range(5)))

  run_virtual(run())
  assert ended == [f"r{i}" for i in range(5)]


def test_a_cancelled_wait_leaves_its_place_to_the_next():
  async def run():
    pool = make_pool(FakeTransport(a=FakeServer()), max_concurrency=1)
    tasks = [asyncio.create_task(generate(pool, rid=f"r{i}")) for i in range(3)]
    await asyncio.sleep(0.5)
    assert pool.waiting == 2
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    check_continues(results[2], 3, 6)
    assert pool.in_flight == {"http://a": 0}

  run_virtual(run())


def test_a_slot_given_to_one_who_is_cancelled_before_waking_is_not_lost():
  async def run():
    balancer = Balancer(["http://a"], 1)
    server = await balancer.acquire()
    waiting = asyncio.create_task(balancer.acquire())
    await asyncio.sleep(0)
    balancer.release(server)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
      await waiting
    assert server.in_flight == 0
    assert await balancer.acquire() is server

  run_virtual(run())


def test_a_fence_ends_what_is_there_and_sends_the_rest_elsewhere():
  bad, good = FakeServer(seconds=10.0), FakeServer(seconds=10.0)

  async def run():
    pool = make_pool(FakeTransport(a=bad, b=good), max_concurrency=2)
    tasks = [asyncio.create_task(generate(pool, rid=f"r{i}")) for i in range(6)]
    await asyncio.sleep(1.0)
    pool.fence("http://a", "canary off by 0.3")
    pool.fence("http://a", "again")
    assert pool.urls == ("http://b",)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [result for result in results if isinstance(result, client.ServerFenced)]
    assert [str(error) for error in failed] == ["http://a: canary off by 0.3"] * 2
    for result in results:
      if not isinstance(result, Exception):
        assert result.server == "http://b"
    assert len(bad.seen) == 2 and len(good.seen) == 4
    pool.set_servers(["http://b"])
    pool.set_servers(["http://a", "http://b"])
    assert pool.urls == ("http://b",)
    pool.admit("http://a")
    assert set(pool.urls) == {"http://a", "http://b"}
    assert (await generate(pool, rid="new")).server == "http://a"

  run_virtual(run())


def test_tokens_of_a_server_fenced_later_are_refused():
  first, second = FakeServer(seconds=1.0), FakeServer(seconds=10.0)
  first.script.append(("abort", 2))

  async def run():
    pool = make_pool(FakeTransport(a=first, b=second))
    task = asyncio.create_task(generate(pool))
    await asyncio.sleep(5.0)
    assert len(second.seen) == 1
    pool.fence("http://a", "wrong weights")
    with pytest.raises(client.ServerFenced, match="wrong weights"):
      await task

  run_virtual(run())


def test_without_servers_everybody_is_told_after_the_longest_wait():
  async def run():
    empty = make_pool(FakeTransport(), max_wait_seconds=7.0)
    with pytest.raises(client.NoServers, match="no server was there within 7 s"):
      await generate(empty)
    assert asyncio.get_running_loop().time() == 7.0
    transport = FakeTransport(a=FakeServer(seconds=5.0))
    pool = make_pool(transport, max_concurrency=1, max_wait_seconds=4.0)
    tasks = [asyncio.create_task(generate(pool, rid=f"r{i}")) for i in range(3)]
    await asyncio.sleep(1.0)
    pool.fence("http://a", "wrong weights")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [
      client.ServerFenced,
      client.NoServers,
      client.NoServers,
    ]
    assert "wrong weights" in str(results[1])
    return asyncio.get_running_loop().time()

  assert run_virtual(run())[0] == 11.0


def test_a_server_that_leaves_ends_what_it_has_and_one_that_joins_serves_the_waiting():
  leaving, joining = FakeServer(seconds=3.0), FakeServer(seconds=3.0)

  async def run():
    transport = FakeTransport(a=leaving, b=joining)
    pool = make_pool(transport, max_concurrency=1)
    pool.set_servers(["http://a"])
    tasks = [asyncio.create_task(generate(pool, rid=f"r{i}")) for i in range(2)]
    await asyncio.sleep(1.0)
    pool.set_servers(["http://b"])
    generations = await asyncio.gather(*tasks)
    assert [generation.server for generation in generations] == ["http://a", "http://b"]
    return asyncio.get_running_loop().time()

  assert run_virtual(run())[0] == 4.0


def test_cancelling_a_generation_cancels_its_request_and_is_no_fence():
  server = FakeServer()

  async def run():
    pool = make_pool(FakeTransport(a=server))
    task = asyncio.create_task(generate(pool))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    await asyncio.sleep(0.01)
    assert server.in_flight == 0 and pool.in_flight == {"http://a": 0}
    both = asyncio.create_task(generate(pool))
    await asyncio.sleep(0.5)
    both.cancel()
    pool.fence("http://a", "at the same moment")
    with pytest.raises(asyncio.CancelledError):
      await both

  run_virtual(run())


def server(name, in_flight=0, others=0, last_used=0, **options):
  return Server(f"http://{name}", in_flight, others, last_used=last_used, **options)


@pytest.mark.parametrize(
  ("servers", "home", "expected"),
  [
    # Least load, own and others' together; then the longest unused.
    ([server("a", 3), server("b", 1, 1), server("c", 0, 5)], None, "b"),
    ([server("a", 2, last_used=9), server("b", 2, last_used=4)], None, "b"),
    # Home while it is at most 1.25 times as busy as the least busy, and 4 more.
    ([server("a", 4), server("b", 0)], "a", "a"),
    ([server("a", 5), server("b", 0)], "a", "b"),
    ([server("a", 1, 28), server("b", 0, 20)], "a", "a"),
    ([server("a", 2, 28), server("b", 0, 20)], "a", "b"),
    # A home that failed a moment ago, is full, fenced or gone is none.
    ([server("a", blocked_until=11.0), server("b", 3)], "a", "b"),
    ([server("a", blocked_until=10.0), server("b", 3)], "a", "a"),
    ([server("a", 8), server("b", 7)], "a", "b"),
    ([server("a", fenced="wrong"), server("b", 3)], "a", "b"),
    ([server("a", listed=False), server("b", 3)], "a", "b"),
    ([server("b", 3)], "a", "b"),
    # With nothing else, one that failed is better than none.
    ([server("a", blocked_until=11.0), server("b", 8)], None, "a"),
    ([server("a", 8), server("b", fenced="wrong")], None, None),
  ],
)
def test_the_rule(servers, home, expected):
  home = home and f"http://{home}"
  by_url = {server.url: server for server in servers}
  chosen = choose(by_url, room=8, now=10.0, home=home, spill=4)
  assert (chosen and chosen.url) == (expected and f"http://{expected}")


URLS = st.sets(st.sampled_from([f"http://s{i}" for i in range(8)]), min_size=1)


@given(st.text(max_size=8), URLS, st.randoms(use_true_random=False))
def test_a_key_has_one_home_whoever_asks_and_moves_only_with_its_server(key, urls, random):
  home = home_of(key, urls)
  assert home in urls
  shuffled = random.sample(sorted(urls), len(urls))
  assert home_of(key, shuffled) == home
  for gone in urls - {home}:
    assert home_of(key, urls - {gone}) == home


def test_a_group_finds_its_home_also_when_the_servers_change():
  urls = [f"http://s{i}" for i in range(8)]

  async def main():
    balancer = Balancer(urls, 100)

    def asked():
      return balancer.take(affinity="group").url

    first = home_of("group", urls)
    others = [url for url in urls if url != first]
    second = home_of("group", others)
    assert asked() == first
    balancer.fence(first, "wrong")
    assert asked() == second
    balancer.admit(first)
    assert asked() == first
    balancer.set_servers(others)
    assert asked() == second
    balancer.set_servers(urls)
    assert asked() == first

  asyncio.run(main())


def test_homes_are_spread():
  urls = [f"http://s{i}" for i in range(4)]
  homes = [home_of(f"train-{group}", urls) for group in range(400)]
  assert all(60 < homes.count(url) < 140 for url in urls)
  assert home_of("train-0", []) is None


@pytest.mark.parametrize(
  ("told", "own", "others"), [((5, 2), 3, 4), ((5, 0), 5, 0), ((1, 0), 4, 0)]
)
def test_what_others_have_is_what_is_told_without_ours(told, own, others):
  assert others_load(*told, own) == others


def test_a_group_is_sent_to_one_server_and_spills_when_that_is_clearly_busier():
  servers = {name: FakeServer(seconds=10.0) for name in "abc"}

  async def run():
    pool = make_pool(FakeTransport(**servers), spill=4)
    await asyncio.gather(*(generate(pool, rid=f"r{i}", affinity="g") for i in range(4)))

  run_virtual(run())
  assert sorted(len(server.seen) for server in servers.values()) == [0, 0, 4]
  for server in servers.values():
    server.seen.clear()

  async def more():
    pool = make_pool(FakeTransport(**servers), spill=4)
    await asyncio.gather(*(generate(pool, rid=f"r{i}", affinity="g") for i in range(12)))

  run_virtual(more())
  assert sorted(len(server.seen) for server in servers.values()) == [2, 3, 7]


def test_a_conversation_stays_where_its_prefix_is_and_moves_when_others_load_that_server():
  servers = {name: FakeServer() for name in "ab"}

  async def run():
    pool = make_pool(FakeTransport(**servers), spill=4)
    first = await generate(pool, rid="r0")
    for turn in range(1, 4):
      await generate(pool, rid=f"r{turn}", prefer=first.server)
    pool.set_loads({first.server: (20, 5)})
    moved = await generate(pool, rid="r4", prefer=first.server)
    return first.server, moved.server

  (first, moved), _ = run_virtual(run())
  assert len(servers[first[-1]].seen) == 4 and moved != first


def test_no_more_than_so_many_wait():
  async def run():
    pool = make_pool(FakeTransport(a=FakeServer()), max_concurrency=1, max_waiting=2)
    tasks = [asyncio.create_task(generate(pool, rid=f"r{i}")) for i in range(5)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["Generation"] * 3 + ["NoServers"] * 2
    assert "2 requests wait already" in str(results[4])

  run_virtual(run())


def test_a_slot_given_at_the_moment_of_giving_up_is_not_lost():
  async def run():
    balancer = Balancer(["http://a"], 1, max_wait_seconds=5.0)
    taken = await balancer.acquire()
    asyncio.get_running_loop().call_later(5.0, balancer.release, taken)
    try:
      await balancer.acquire()
      taken.in_flight -= 1
    except client.NoServers:
      pass
    assert taken.in_flight == 0

  run_virtual(run())
