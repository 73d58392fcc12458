"""Generations in segments on one server, time-outs and what is left of them, in virtual time."""

import asyncio

import numpy as np
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
from intellect3.inference.transport import TransportError
from intellect3.types import Generation


def lengths(server):
  return [
    (len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]) for body in server.seen
  ]


def test_segments_stay_on_one_server_and_are_stitched():
  servers = {"a": FakeServer(version=1), "b": FakeServer(version=2)}
  pool = make_pool(FakeTransport(**servers), segment_tokens=4)
  seen = []
  generation, seconds = run_virtual(generate(pool, max_new_tokens=10, progress=seen.append))
  check_continues(generation, 3, 10)
  assert (generation.finish_reason, generation.server) == ("length", "http://a")
  assert generation.servers == ("http://a",)
  assert lengths(servers["a"]) == [(3, 4), (7, 4), (11, 2)] and servers["b"].seen == []
  assert [body["rid"] for body in servers["a"].seen] == ["r", "r.1", "r.2"]
  seeds = [body["sampling_params"]["sampling_seed"] for body in servers["a"].seen]
  assert seeds == [client.continued_seed(11, tokens) for tokens in (0, 4, 8)]
  assert [piece.tokens.tolist() for piece in seen] == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]]
  assert seconds == 3.0  # one after another, without a pause
  assert (pool.retried, pool.continued, pool.in_flight) == (0, 0, {"http://a": 0, "http://b": 0})


def test_a_stop_in_a_segment_ends_the_generation():
  server = FakeServer()
  server.script.extend([None, ("stop", 2)])
  pool = make_pool(FakeTransport(a=server), segment_tokens=4)
  generation, _ = run_virtual(generate(pool, max_new_tokens=100))
  check_continues(generation, 3, 6)
  assert generation.finish_reason == "stop" and len(server.seen) == 2


def test_fewer_tokens_than_asked_mean_that_the_context_is_full():
  server = FakeServer()
  server.script.extend([None, ("short", 2)])
  pool = make_pool(FakeTransport(a=server), segment_tokens=4)
  generation, _ = run_virtual(generate(pool, max_new_tokens=100))
  check_continues(generation, 3, 6)
  assert generation.finish_reason == "length" and len(server.seen) == 2


def test_a_crash_costs_at_most_a_segment():
  first, second = FakeServer(version=1), FakeServer(version=2)
  first.script.extend([None, None, "drop"])
  pool = make_pool(FakeTransport(a=first, b=second), segment_tokens=4)
  generation, _ = run_virtual(generate(pool, max_new_tokens=12))
  check_continues(generation, 3, 12)
  assert generation.policy_versions.tolist() == [1] * 8 + [2] * 4
  assert generation.servers == ("http://a", "http://b")
  assert lengths(second) == [(11, 4)]


def test_a_segment_keeps_its_slot_while_others_wait():
  server = FakeServer()

  async def run():
    pool = make_pool(FakeTransport(a=server), segment_tokens=2, max_concurrency=1)
    await asyncio.gather(*(generate(pool, rid=f"r{i}") for i in range(2)))

  run_virtual(run())
  assert [body["rid"] for body in server.seen] == ["r0", "r0.1", "r0.2", "r1", "r1.1", "r1.2"]


def test_a_server_that_leaves_the_list_ends_its_segment_and_the_next_goes_elsewhere():
  leaving, staying = FakeServer(seconds=2.0), FakeServer(seconds=2.0)

  async def run():
    pool = make_pool(FakeTransport(a=leaving, b=staying), segment_tokens=4)
    task = asyncio.create_task(generate(pool, max_new_tokens=8))
    await asyncio.sleep(1.0)
    pool.set_servers(["http://b"])
    generation = await task
    check_continues(generation, 3, 8)
    assert generation.servers == ("http://a", "http://b")
    assert pool.in_flight == {"http://b": 0}

  run_virtual(run())


def test_a_generation_keeps_the_cache_key_that_it_began_with_on_a_server():
  server = FakeServer(seconds=2.0)

  async def run():
    pool = make_pool(FakeTransport(a=server), segment_tokens=2)
    pool.set_servers(["http://a"], {"http://a": 4})
    task = asyncio.create_task(generate(pool, extra_key=None))
    await asyncio.sleep(1.0)
    pool.set_servers(["http://a"], {"http://a": 5})  # an update in flight
    await task
    await generate(pool, rid="new", extra_key=None)

  run_virtual(run())
  assert [body["extra_key"] for body in server.seen] == ["4"] * 3 + ["5"] * 3


def test_a_time_out_takes_what_there_is_and_goes_on_elsewhere():
  slow, good = FakeServer(version=1), FakeServer(version=2)
  slow.script.append(("slow", 4))
  pool = make_pool(FakeTransport(a=slow, b=good), timeout_seconds=20.0, grace_seconds=5.0)
  generation, seconds = run_virtual(generate(pool))
  check_continues(generation, 3, 6)
  assert generation.policy_versions.tolist() == [1] * 4 + [2] * 2
  assert slow.calls[-1] == ("/abort_request", {"rid": "r"})
  assert (pool.timed_out, pool.continued) == (1, 1)
  assert 21.0 <= seconds <= 22.0


def test_a_time_out_without_an_answer_goes_on_from_what_was_had():
  slow, good = FakeServer(version=1), FakeServer(version=2)
  slow.script.extend([None, "hang"])
  pool = make_pool(
    FakeTransport(a=slow, b=good), segment_tokens=4, timeout_seconds=20.0, grace_seconds=5.0
  )
  generation, _ = run_virtual(generate(pool, max_new_tokens=8))
  check_continues(generation, 3, 8)
  assert generation.policy_versions.tolist() == [1] * 4 + [2] * 4
  assert lengths(good) == [(7, 4)]


def test_time_outs_are_bounded_even_where_each_gains_a_token():
  server = FakeServer()
  server.script.extend([("slow", 1)] * 99)
  pool = make_pool(FakeTransport(a=server), retries=3, timeout_seconds=20.0)
  with pytest.raises(client.ServerUnavailable, match="aborted"):
    run_virtual(generate(pool, max_new_tokens=50))
  assert len(server.seen) == 4


def test_a_slow_server_is_avoided_after_a_time_out():
  slow, good = FakeServer(), FakeServer()
  slow.script.append(("slow", 0))

  async def run():
    pool = make_pool(FakeTransport(a=slow, b=good), timeout_seconds=20.0, backoff_seconds=30.0)
    await generate(pool)
    for i in range(3):
      await generate(pool, rid=f"r{i}")

  run_virtual(run())
  assert len(slow.seen) == 1


def test_a_killed_server_fails_at_once_and_loses_only_its_segment():
  first, second = FakeServer(version=1, seconds=50.0), FakeServer(version=2)

  async def run():
    pool = make_pool(FakeTransport(a=first, b=second))
    task = asyncio.create_task(generate(pool))
    await asyncio.sleep(1.0)
    first.kill()
    generation = await task
    check_continues(generation, 3, 6)
    return asyncio.get_running_loop().time()

  assert run_virtual(run())[0] < 5.0
  assert lengths(second) == [(3, 6)]


def test_what_another_process_had_is_gone_on_from():
  had = Generation(
    tokens=np.asarray([3, 4], np.int32),
    inference_logprobs=np.asarray([-0.004, -0.005], np.float32),
    policy_versions=np.asarray([7, 7], np.int32),
    finish_reason="abort",
    server="http://old",
  )
  server = FakeServer(version=8)
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=server)), so_far=had))
  check_continues(generation, 3, 6)
  assert generation.policy_versions.tolist() == [7, 7, 8, 8, 8, 8]
  assert generation.servers == ("http://old", "http://a")
  assert lengths(server) == [(5, 4)]


def test_tokens_that_a_server_had_to_compute_again_are_counted():
  first, second = FakeServer(), FakeServer()
  first.cached = lambda body: len(body["input_ids"]) - 1 if len(body["input_ids"]) > 30 else 16
  second.cached = lambda body: 0
  first.script.extend([None, "drop"])
  pool = make_pool(FakeTransport(a=first, b=second), segment_tokens=4)
  prompt = list(range(40))
  # A conversation whose first 20 tokens were computed before, of which 39 are cached: none again.
  # The last segment is prefilled elsewhere: 40 and 4 tokens, the last of them never computed.
  generation, _ = run_virtual(generate(pool, prompt=prompt, max_new_tokens=8, known_tokens=20))
  assert generation.reprefilled_tokens == 43
  third = FakeServer()
  third.cached = lambda body: 16
  again = generate(make_pool(FakeTransport(a=third)), prompt=prompt, known_tokens=20)
  assert run_virtual(again)[0].reprefilled_tokens == 4
  untold = generate(make_pool(FakeTransport(a=FakeServer())), prompt=prompt, known_tokens=20)
  assert run_virtual(untold)[0].reprefilled_tokens == 0


def test_a_fence_ends_a_generation_in_any_segment():
  server = FakeServer(seconds=2.0)

  async def run():
    pool = make_pool(FakeTransport(a=server), segment_tokens=2)
    task = asyncio.create_task(generate(pool))
    await asyncio.sleep(3.0)
    pool.fence("http://a", "wrong weights")
    with pytest.raises(client.ServerFenced, match="wrong weights"):
      await task
    assert len(server.seen) == 2

  run_virtual(run())


def test_cancelling_between_time_out_and_answer_leaves_nothing_behind():
  server = FakeServer()
  server.script.append("hang")

  async def run():
    pool = make_pool(FakeTransport(a=server), timeout_seconds=5.0, grace_seconds=50.0)
    task = asyncio.create_task(generate(pool))
    await asyncio.sleep(10.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    assert pool.in_flight == {"http://a": 0}
    await asyncio.sleep(0.01)
    assert server.in_flight == 0

  run_virtual(run())


@pytest.mark.parametrize(
  ("field", "value"), [("segment_tokens", 0), ("grace_seconds", -1.0), ("max_waiting", -1)]
)
def test_bad_settings_are_named(field, value):
  with pytest.raises(ValueError, match=field):
    make_pool(FakeTransport(), **{field: value})


def test_the_last_failure_is_told_when_retries_are_used_up():
  server = FakeServer()
  server.script.extend(["hang"] * 9)
  pool = make_pool(FakeTransport(a=server), retries=1, timeout_seconds=5.0, grace_seconds=0.0)
  with pytest.raises(TransportError, match="no answer within 5 s"):
    run_virtual(generate(pool))
  assert len(server.seen) == 2
