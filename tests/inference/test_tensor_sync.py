"""Pushing tensors to simulated servers: order, buckets, ranks, failures, and who waits for whom."""

import asyncio

import numpy as np
import pytest
from fake_servers import (
  VOCAB,
  FakeServer,
  FakeTransport,
  check_continues,
  generate,
  logprob_at,
  make_pool,
  run_virtual,
)
from hypothesis import given
from hypothesis import strategies as st

from intellect3.inference import tensor_sync, tensor_wire, weight_sync
from intellect3.inference.control import ServerControl
from intellect3.inference.weight_sync import from_disk

CANARY = weight_sync.Canary(ids=[9, 8, 7], logprobs=[0.0, logprob_at(1), logprob_at(2)])
TENSORS = {f"t{i}": np.full((4,), i, np.float32) for i in range(5)}
NAMES = [["t0", "t1"], ["t2", "t3"], ["t4"]]


@pytest.fixture(autouse=True)
def inline(monkeypatch):
  """Encodes on the loop's thread: a virtual clock does not wait for others."""

  async def to_thread(function, *arguments):
    return function(*arguments)

  monkeypatch.setattr(asyncio, "to_thread", to_thread)


def read(names):
  return [(name, TENSORS[name]) for name in names]


def make_control(timeout_seconds=60.0, **servers):
  transport = FakeTransport(**servers)
  return ServerControl(
    transport, transport.servers, vocab_size=VOCAB, timeout_seconds=timeout_seconds
  )


def bring(control, buckets=None, url="http://a", mode="in_place", load=None, **options):
  return weight_sync.sync_server(
    control,
    url,
    load=load or tensor_sync.from_tensors(buckets, 3),
    version=3,
    mode=mode,
    canary=CANARY,
    bound=1e-4,
    **options,
  )


@pytest.mark.parametrize(("mode", "flushes"), [("in_place", [False] * 3), ("retract", [0, 0, 1])])
def test_the_order_of_a_push_and_what_each_call_carries(mode, flushes):
  server = FakeServer(version=2)
  server.ranks = 2
  result, _ = run_virtual(
    bring(make_control(a=server), tensor_sync.Buckets(NAMES, read), mode=mode)
  )
  assert result.ok and server.version == "3"
  assert server.log == [
    "/pause_generation",
    "/end_weight_update",  # of a session that somebody left open
    "/server_info",
    "/begin_weight_update",
    *["/update_weights_from_tensor"] * 3,
    "/end_weight_update",
    "/continue_generation",
    "/generate",
  ]
  bodies = [body for path, body in server.calls if path == "/update_weights_from_tensor"]
  assert [body["flush_cache"] for body in bodies] == flushes
  assert [body.get("weight_version") for body in bodies] == ["unchecked-3", "unchecked-3", "3"]
  received = {}
  for body, names in zip(bodies, NAMES, strict=True):
    first, second = body["serialized_named_tensors"]
    assert first == second  # one for each rank
    received |= (tensors := tensor_wire.read(first))
    assert list(tensors) == names
  for name, array in TENSORS.items():
    np.testing.assert_array_equal(received[name], array)


BROKEN_OFF = ["/end_weight_update", "/abort_request", "/continue_generation"]


def discarded(server):
  """The last session was closed as one of which nothing is to be served."""
  ends = [body for path, body in server.calls if path == "/end_weight_update"]
  return ends[-1] == {"abort": True} and not server.session


def test_a_refused_bucket_fences_and_closes_the_session():
  server = FakeServer()
  server.update = (400, {"success": False, "message": "wrong shape"})
  result, _ = run_virtual(bring(make_control(a=server), tensor_sync.Buckets(NAMES, read)))
  assert "wrong shape" in result.reason and result.answered
  assert server.log.count("/update_weights_from_tensor") == 1
  assert server.log[-3:] == BROKEN_OFF
  assert discarded(server) and server.running.is_set()


def fails_at(bucket):
  def read_some(names):
    if names == NAMES[bucket]:
      raise OSError("the disk went away")
    return read(names)

  return read_some


def test_a_push_that_breaks_off_is_told_before_the_server_goes_on_and_its_mixture_is_cut_off():
  server = FakeServer(version=2, seconds=5.0)
  elsewhere = FakeServer(version=2)
  transport = FakeTransport(a=server, b=elsewhere)
  control = ServerControl(transport, transport.servers, vocab_size=VOCAB, timeout_seconds=60.0)
  told = []

  async def run():
    pool = make_pool(transport)
    pool.set_servers(["http://a"])
    running = asyncio.ensure_future(generate(pool))
    await asyncio.sleep(1.0)

    def unusable(result):
      told.append((result.reason, server.running.is_set()))
      pool.set_servers(["http://b"])

    result = await bring(control, tensor_sync.Buckets(NAMES, fails_at(1)), unusable=unusable)
    return result, await running

  (result, generation), _ = run_virtual(run())
  assert result.reason == told[0][0] and "went away" in result.reason
  assert len(told) == 1 and told[0][1] is False
  assert server.version == "unchecked-3" and discarded(server)
  # Two tokens of three are of whole weights; the rest was made by the other server.
  check_continues(generation, 3, 6)
  assert generation.policy_versions.tolist() == [2] * 6
  assert generation.servers == ("http://a", "http://b")
  assert len(elsewhere.seen[0]["input_ids"]) == 5


def test_a_push_that_is_cancelled_serves_nothing_of_it():
  server = Slow(10.0)

  async def run():
    task = asyncio.ensure_future(bring(make_control(a=server), tensor_sync.Buckets(NAMES, read)))
    await asyncio.sleep(15.0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()

  run_virtual(run())
  assert server.log[-3:] == BROKEN_OFF and discarded(server) and server.running.is_set()


def test_a_session_that_somebody_left_open_is_discarded_first():
  for load in (tensor_sync.from_tensors(tensor_sync.Buckets(NAMES, read), 3), from_disk("d", 3)):
    server = FakeServer()
    server.session = True
    result, _ = run_virtual(bring(make_control(a=server), load=load))
    assert result.ok and server.version == "3" and not server.session
    path, body = server.calls[1]
    assert (path, body) == ("/end_weight_update", {"abort": True})


def test_a_bucket_that_could_not_be_read_is_read_again_the_next_time():
  server = FakeServer()
  down = [True]

  def flaky(names):
    if down[0]:
      raise OSError("not now")
    return read(names)

  buckets = tensor_sync.Buckets(NAMES, flaky)
  assert not run_virtual(bring(make_control(a=server), buckets))[0].ok
  down[0] = False
  assert run_virtual(bring(make_control(a=server), buckets))[0].ok


def test_a_server_that_dies_in_the_middle_is_lost_and_not_fenced_for_good():
  server = FakeServer()

  class Dying(FakeServer):
    async def _answer(self, path, body):
      if path == "/update_weights_from_tensor":
        self.kill()
        await asyncio.sleep(1.0)
      return await super()._answer(path, body)

  server = Dying()
  result, _ = run_virtual(bring(make_control(a=server), tensor_sync.Buckets(NAMES, read)))
  assert not result.ok and not result.answered


def test_weights_that_are_gone_are_a_failure_of_that_sync():
  def gone(names):
    raise FileNotFoundError("v_000003 was pruned")

  server = FakeServer()
  result, _ = run_virtual(bring(make_control(a=server), tensor_sync.Buckets(NAMES, gone)))
  assert "pruned" in result.reason
  assert server.log[-3:] == BROKEN_OFF and discarded(server)


class Slow(FakeServer):
  """Takes its time with each bucket."""

  def __init__(self, seconds):
    super().__init__()
    self.bucket_seconds = seconds

  async def _answer(self, path, body):
    if path == "/update_weights_from_tensor":
      await asyncio.sleep(self.bucket_seconds)
    return await super()._answer(path, body)


def test_each_server_goes_at_its_own_pace_and_buckets_are_encoded_once_for_those_near_by():
  encoded = []

  def counted(names):
    encoded.append(names[0])
    return [(names[0], np.zeros(1, np.float32))]

  names = [[f"t{i}"] for i in range(12)]
  servers = {"a": Slow(1.0), "b": Slow(1.0), "c": Slow(30.0)}

  async def run():
    buckets = tensor_sync.Buckets(names, counted)
    control = make_control(**servers)
    clock = asyncio.get_running_loop().time
    ended = {}

    async def one(url):
      assert (await bring(control, buckets, url)).ok
      ended[url] = clock()

    await asyncio.gather(*(one(f"http://{name}") for name in servers))
    return ended

  ended, _ = run_virtual(run())
  assert ended == {"http://a": 13.0, "http://b": 13.0, "http://c": 361.0}
  # The one that fell behind had to have the middle ones encoded again, the near ones shared.
  assert 12 < len(encoded) <= 24 and encoded.count("t0") == 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_buckets_hold_everything_in_order_and_no_more_than_they_may(sizes, room):
  named = [(f"t{i}", size) for i, size in enumerate(sizes)]
  buckets = tensor_sync.plan_buckets(named, room)
  assert [name for bucket in buckets for name in bucket] == [name for name, _ in named]
  by_name = dict(named)
  for bucket in buckets:
    assert len(bucket) == 1 or sum(by_name[name] for name in bucket) <= room


def test_no_bucket_of_nothing():
  with pytest.raises(ValueError, match="bucket_bytes"):
    tensor_sync.plan_buckets([("a", 1)], 0)
