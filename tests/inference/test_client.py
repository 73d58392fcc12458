"""ServerPool against simulated servers in virtual time: balance, bounds, retries, continuation."""

import asyncio

import fake_servers
import numpy as np
import pytest
from fake_servers import FakeServer, FakeTransport, run_virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.inference import client
from intellect3.inference.balance import Balancer
from intellect3.inference.protocol import ProtocolError
from intellect3.inference.transport import TransportError

PROMPT = [5, 6, 7]


def make_pool(transport, **options):
  settings = {"vocab_size": fake_servers.VOCAB, "backoff_seconds": 1.0, "timeout_seconds": 100.0}
  return client.ServerPool(transport, list(transport.servers), **{**settings, **options})


def generate(pool, *, rid="r", max_new_tokens=6, seed=11, prompt=PROMPT, extra_key="0"):
  return pool.generate(
    prompt,
    max_new_tokens=max_new_tokens,
    temperature=1.0,
    stop_token_ids=(256,),
    seed=seed,
    rid=rid,
    extra_key=extra_key,
  )


def check_continues(generation, prompt_length, length):
  """The tokens and logprobs are those of positions prompt_length, prompt_length + 1, ..."""
  positions = range(prompt_length, prompt_length + length)
  assert generation.tokens.tolist() == [fake_servers.token_at(p) for p in positions]
  expected = np.asarray([fake_servers.logprob_at(p) for p in positions], np.float32)
  np.testing.assert_array_equal(generation.inference_logprobs, expected)


def test_a_generation_and_what_is_sent():
  server = FakeServer(version=4)
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=server))))
  check_continues(generation, 3, 6)
  assert generation.policy_versions.tolist() == [4] * 6
  assert (generation.finish_reason, generation.server) == ("length", "http://a")
  (body,) = server.seen
  assert body["input_ids"] == PROMPT and body["rid"] == "r" and body["extra_key"] == "0"
  assert body["sampling_params"] == {
    "max_new_tokens": 6,
    "temperature": 1.0,
    "stop_token_ids": [256],
    "sampling_seed": 11,
  }


@pytest.mark.parametrize("prompt", [[], [264], [-1], [1.5]])
def test_a_bad_prompt_is_never_sent(prompt):
  server = FakeServer()
  with pytest.raises(ValueError, match="input_ids"):
    run_virtual(generate(make_pool(FakeTransport(a=server)), prompt=prompt))
  assert server.seen == []


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


@pytest.mark.parametrize("fault", [500, 503, "drop", "hang"])
def test_failures_that_may_pass_are_retried_elsewhere(fault):
  broken, good = FakeServer(), FakeServer()
  broken.script.extend([fault] * 9)
  pool = make_pool(FakeTransport(a=broken, b=good))
  generation, _ = run_virtual(generate(pool))
  check_continues(generation, 3, 6)
  assert (len(broken.seen), len(good.seen), pool.retried) == (1, 1, 1)
  assert good.seen[0]["rid"] == "r.1"


def test_a_failing_server_is_avoided_until_its_time_is_over():
  broken, good = FakeServer(seconds=0.01), FakeServer(seconds=0.01)
  broken.script.append(503)

  async def run():
    pool = make_pool(FakeTransport(a=broken, b=good), backoff_seconds=4.0)
    for i in range(4):
      await generate(pool, rid=f"r{i}")
    await asyncio.sleep(5.0)
    before = len(broken.seen)
    for i in range(4, 6):
      await generate(pool, rid=f"r{i}")
    return before

  before, _ = run_virtual(run())
  assert before == 1 and len(broken.seen) == 2


def test_retries_end_and_back_off_grows():
  def failures(retries, seed):
    server = FakeServer(seconds=0.0)
    server.script.extend([503] * 99)
    pool = make_pool(FakeTransport(a=server), retries=retries, seed=seed, backoff_max_seconds=64.0)

    async def run():
      clock = asyncio.get_running_loop().time
      with pytest.raises(client.ServerUnavailable, match="503 scripted"):
        await generate(pool)
      return clock()

    return run_virtual(run())[0], len(server.seen)

  assert failures(0, 0) == (0.0, 1)
  waits = [failures(retries, 7)[0] for retries in range(7)]
  assert failures(6, 7)[1] == 7
  steps = np.diff(waits)
  assert all(0 <= step <= 2.0**n for n, step in enumerate(steps))
  assert max(steps) > 4.0
  assert failures(4, 7) == failures(4, 7) != failures(4, 8)


@pytest.mark.parametrize(
  ("fault", "error"),
  [
    (400, client.RequestRejected),
    (404, client.RequestRejected),
    (("reject", 400), client.RequestRejected),
  ],
)
def test_refusals_are_not_retried(fault, error):
  server = FakeServer()
  server.script.append(fault)
  with pytest.raises(error, match="http://a"):
    run_virtual(generate(make_pool(FakeTransport(a=server))))
  assert len(server.seen) == 1


def test_a_hostile_reply_is_an_error_and_not_a_retry():
  server = FakeServer()
  server.mutate = lambda reply: reply["output_ids"].reverse()
  with pytest.raises(ProtocolError, match="http://a"):
    run_virtual(generate(make_pool(FakeTransport(a=server))))
  assert len(server.seen) == 1


def test_an_aborted_generation_continues_with_the_tokens_it_has():
  first, second = FakeServer(version=3), FakeServer(version=4)
  first.script.append(("abort", 2))
  pool = make_pool(FakeTransport(a=first, b=second))
  generation, _ = run_virtual(generate(pool))
  check_continues(generation, 3, 6)
  assert generation.policy_versions.tolist() == [3, 3, 4, 4, 4, 4]
  assert (generation.finish_reason, generation.server) == ("length", "http://b")
  (body,) = second.seen
  assert body["input_ids"] == [*PROMPT, 3, 4]
  assert body["sampling_params"]["max_new_tokens"] == 4
  assert body["sampling_params"]["sampling_seed"] == client.continued_seed(11, 2) != 11
  assert (pool.continued, pool.retried) == (1, 1)


def test_a_server_that_dies_after_an_abort_costs_no_token():
  first, second = FakeServer(version=1), FakeServer(version=2)
  first.script.append(("abort", 3))
  second.script.extend(["drop", "drop"])
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=first, b=second), retries=3)))
  check_continues(generation, 3, 6)
  assert generation.policy_versions.tolist()[:3] == [1, 1, 1]


def test_aborts_with_progress_are_not_failures_and_without_are():
  server = FakeServer()
  server.script.extend([("abort", 1)] * 5)
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=server), retries=1)))
  check_continues(generation, 3, 6)
  stuck = FakeServer()
  stuck.script.extend([("abort", 0)] * 5)
  with pytest.raises(client.ServerUnavailable, match="aborted"):
    run_virtual(generate(make_pool(FakeTransport(a=stuck), retries=2)))
  assert len(stuck.seen) == 3


def test_an_abort_after_the_last_token_is_the_end():
  server = FakeServer()
  server.script.append(("abort", 6))
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=server))))
  assert generation.finish_reason == "length" and len(server.seen) == 1


def test_the_cache_key_is_read_when_a_request_is_sent():
  server = FakeServer()
  server.script.append(("abort", 2))
  keys = iter(["7", "8"])
  run_virtual(generate(make_pool(FakeTransport(a=server)), extra_key=lambda: next(keys)))
  assert [body["extra_key"] for body in server.seen] == ["7", "8"]


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


def test_without_servers_everybody_is_told_at_once():
  async def run():
    empty = make_pool(FakeTransport())
    with pytest.raises(client.NoServers, match="no server"):
      await generate(empty)
    pool = make_pool(FakeTransport(a=FakeServer(seconds=5.0)), max_concurrency=1)
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

  assert run_virtual(run())[0] == 1.0


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
    assert server.in_flight == 0 and pool.in_flight == {"http://a": 0}
    both = asyncio.create_task(generate(pool))
    await asyncio.sleep(0.5)
    both.cancel()
    pool.fence("http://a", "at the same moment")
    with pytest.raises(asyncio.CancelledError):
      await both

  run_virtual(run())


def test_timeouts_are_transport_errors():
  server = FakeServer()
  server.script.append("hang")
  with pytest.raises(TransportError, match="timeout"):
    run_virtual(generate(make_pool(FakeTransport(a=server), retries=0, timeout_seconds=3.0)))


_FAULTS = st.sampled_from(
  [None, 503, "drop", ("abort", 0), ("abort", 1), ("abort", 2), ("abort", 9), ("reject", 400), 400]
)


@settings(max_examples=150, deadline=None)
@given(
  st.lists(st.lists(_FAULTS, max_size=6), min_size=1, max_size=3),
  st.integers(1, 8),
  st.integers(1, 12),
)
def test_under_any_faults_every_generation_is_whole_or_an_error(scripts, generations, length):
  servers = {f"s{i}": FakeServer(version=i, seconds=0.1 * (i + 1)) for i in range(len(scripts))}
  for server, script in zip(servers.values(), scripts, strict=True):
    # A server cannot abort with more tokens than it was asked for.
    server.script.extend(("abort", 1) if f == ("abort", 9) and length < 9 else f for f in script)
  pool = make_pool(FakeTransport(**servers), retries=4, max_concurrency=2)

  async def run():
    return await asyncio.gather(
      *(generate(pool, rid=f"r{i}", max_new_tokens=length) for i in range(generations)),
      return_exceptions=True,
    )

  results, _ = run_virtual(run())
  for result in results:
    if isinstance(result, Exception):
      assert isinstance(
        result, (client.ServerUnavailable, TransportError, client.RequestRejected, ProtocolError)
      )
    else:
      check_continues(result, 3, length)
      assert result.finish_reason == "length"
  assert set(pool.in_flight.values()) == {0} and pool.waiting == 0
  rids = [body["rid"] for server in servers.values() for body in server.seen]
  assert len(rids) == len(set(rids))


def test_continued_seeds_differ_and_fit():
  seeds = {client.continued_seed(seed, tokens) for seed in range(50) for tokens in range(50)}
  assert len(seeds) > 50 * 49
  assert all(0 <= seed < 2**31 for seed in seeds)
  assert client.continued_seed(5, 0) == 5
  assert client.continued_seed(5, 3) == 509718174  # pinned


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("vocab_size", 0),
    ("max_concurrency", 0),
    ("retries", -1),
    ("backoff_seconds", -1.0),
    ("timeout_seconds", 0.0),
  ],
)
def test_bad_settings_are_named(field, value):
  with pytest.raises(ValueError, match=field):
    make_pool(FakeTransport(), **{field: value})
