"""ServerPool against simulated servers in virtual time: retries, refusals, continuation."""

import asyncio

import numpy as np
import pytest
from fake_servers import (
  PROMPT,
  FakeServer,
  FakeTransport,
  check_continues,
  generate,
  make_pool,
  run_virtual,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.inference import client
from intellect3.inference.protocol import ProtocolError
from intellect3.inference.transport import TransportError


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


@pytest.mark.parametrize("fault", [500, 502, "drop", "hang"])
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
  broken.script.append(500)

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
    server.script.extend([500] * 99)
    pool = make_pool(FakeTransport(a=server), retries=retries, seed=seed, backoff_max_seconds=64.0)

    async def run():
      clock = asyncio.get_running_loop().time
      with pytest.raises(client.ServerUnavailable, match="500 scripted"):
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


def test_a_server_that_failed_a_thousand_times_is_still_only_unavailable():
  server = FakeServer(seconds=0.0)
  server.script.extend([500] * 2000)
  pool = make_pool(FakeTransport(a=server), retries=3, max_concurrency=400, backoff_max_seconds=1.0)

  async def run():
    failed = await asyncio.gather(
      *(generate(pool, rid=f"r{i}") for i in range(400)), return_exceptions=True
    )
    assert {type(failure) for failure in failed} == {client.ServerUnavailable}

  run_virtual(run())
  assert len(server.seen) == 1600


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


def test_timeouts_are_transport_errors():
  server = FakeServer()
  server.script.append("hang")
  pool = make_pool(FakeTransport(a=server), retries=0, timeout_seconds=3.0, grace_seconds=2.0)
  with pytest.raises(TransportError, match="no answer within 5 s, an abort included"):
    run_virtual(generate(pool))
  assert server.log == ["/generate", "/abort_request"] and pool.timed_out == 1


_FAULTS = st.sampled_from(
  [
    None,
    500,
    503,
    "drop",
    ("abort", 0),
    ("abort", 1),
    ("abort", 2),
    ("abort", 9),
    ("reject", 400),
    400,
  ]
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
