"""Control calls and weight sync against simulated servers: order, traps, canary, fences."""

import asyncio

import fake_servers
import numpy as np
import pytest
from fake_servers import FakeServer, FakeTransport, run_virtual

from intellect3.inference.control import ServerControl
from intellect3.inference.weight_sync import Canary, from_disk, report, sync_server

IDS = [9, 8, 7, 6]
CANARY = Canary(ids=IDS, logprobs=[0.0, *(fake_servers.logprob_at(p) for p in (1, 2, 3))])


def make_control(timeout_seconds=60.0, **servers):
  transport = FakeTransport(**servers)
  return ServerControl(
    transport, transport.servers, vocab_size=fake_servers.VOCAB, timeout_seconds=timeout_seconds
  )


async def sync(control, *, version=3, mode="in_place", bound=1e-4):
  """Syncs all servers at once, as a fleet does, and fences those that fail."""
  clock = asyncio.get_running_loop().time
  started = clock()
  results = await asyncio.gather(
    *(
      sync_server(
        control,
        url,
        load=from_disk("weights/v_000003", version),
        version=version,
        mode=mode,
        canary=CANARY,
        bound=bound,
      )
      for url in control.urls
    )
  )
  for result in results:
    if not result.ok:
      control.fence(result.url, result.reason)
  return report(version, mode, bound, results, clock() - started)


def run_sync(control, **options):
  return run_virtual(sync(control, **options))[0]


@pytest.mark.parametrize(("mode", "flushed"), [("in_place", False), ("retract", True)])
def test_a_sync_pauses_updates_continues_and_scores(mode, flushed):
  servers = {"a": FakeServer(version=2), "b": FakeServer(version=2)}
  control = make_control(**servers)
  report = run_sync(control, mode=mode)
  assert report.healthy == ("http://a", "http://b") and report.fenced == {}
  for server in servers.values():
    assert server.log == [
      "/pause_generation",
      "/end_weight_update",
      "/update_weights_from_disk",
      "/continue_generation",
      "/generate",
    ]
    assert (server.mode, server.flushed, server.version) == (mode, flushed, "3")
    assert server.running.is_set()
  assert all(entry.max_difference < 1e-6 for entry in report.servers)
  assert report.parts == {"pause": 0.0, "load": 0.0, "resume": 0.0, "first_token": 1.0}
  assert report.seconds == 1.0


def test_the_canary_has_a_key_never_used_before():
  server = FakeServer()
  control = make_control(a=server)
  run_sync(control)
  run_sync(control)
  keys = [body["extra_key"] for body in server.seen]
  assert len(set(keys)) == 2 and all(key.startswith("canary-3-") for key in keys)
  assert server.seen[0]["sampling_params"]["max_new_tokens"] == 1
  assert server.seen[0]["logprob_start_len"] == 0


def test_a_server_whose_canary_disagrees_is_fenced_with_the_reason():
  good, bad = FakeServer(), FakeServer()
  bad.score_offset = -0.25
  control = make_control(good=good, bad=bad)
  report = run_sync(control)
  assert report.healthy == ("http://good",)
  reason = report.fenced["http://bad"]
  for part in ("http://bad", "v3", "0.25", "0.0001"):
    assert part in reason
  assert control.urls == ("http://good",) and control.fenced == report.fenced
  run_sync(control)
  assert bad.log.count("/pause_generation") == 1


def test_the_bound_is_what_decides():
  server = FakeServer()
  server.score_offset = -5e-3
  assert run_sync(make_control(a=server), bound=4e-3).fenced
  assert not run_sync(make_control(a=server), bound=6e-3).fenced


def corrupt(field, value):
  return lambda reply: reply["meta_info"].__setitem__(field, value)


@pytest.mark.parametrize(
  ("mutate", "says"),
  [
    (corrupt("input_token_logprobs", []), "input_token_logprobs"),
    (corrupt("input_token_logprobs", [[None, i, None] for i in IDS]), "input_token_logprobs"),
    (corrupt("weight_version", "2"), "version 2, expected 3"),
    (corrupt("weight_version", "default"), "default"),
    (
      lambda reply: reply["meta_info"]["input_token_logprobs"][1].__setitem__(0, float("nan")),
      "JSON",
    ),
  ],
)
def test_a_missing_or_odd_canary_fences(mutate, says):
  server = FakeServer()
  server.mutate = mutate
  report = run_sync(make_control(a=server))
  assert says in report.fenced["http://a"]


def test_a_failed_update_fences_and_leaves_nothing_paused():
  server = FakeServer()
  server.update = (
    400,
    {"success": False, "message": "Weights were updated, but the cache was not"},
  )
  report = run_sync(make_control(a=server))
  assert "load failed" in report.fenced["http://a"]
  assert "Weights were updated" in report.fenced["http://a"]
  assert server.running.is_set() and "/generate" not in server.log


def test_success_false_with_status_200_fences_too():
  server = FakeServer()
  server.update = (200, {"success": False, "message": "no such tensor"})
  assert "no such tensor" in run_sync(make_control(a=server)).fenced["http://a"]


class Hanging(FakeServer):
  """Never answers one path."""

  def __init__(self, path):
    super().__init__()
    self.path = path

  async def answer(self, method, path, body, timeout):
    if path == self.path:
      await asyncio.Event().wait()
    return await super().answer(method, path, body, timeout)


@pytest.mark.parametrize(
  "path", ["/pause_generation", "/update_weights_from_disk", "/continue_generation", "/generate"]
)
def test_a_hanging_server_holds_up_no_other(path):
  good = FakeServer()
  control = make_control(good=good, bad=Hanging(path))

  async def run():
    syncing = asyncio.create_task(sync(control))
    await asyncio.sleep(2.0)
    assert good.version == "3" and good.running.is_set() and "/generate" in good.log
    return await syncing

  report, _ = run_virtual(run())
  assert report.healthy == ("http://good",)
  assert "timeout" in report.fenced["http://bad"]


def test_a_cancelled_sync_leaves_nothing_paused():
  server = Hanging("/update_weights_from_disk")
  control = make_control(a=server)

  async def run():
    task = asyncio.create_task(sync(control, mode="retract"))
    await asyncio.sleep(1.0)
    assert not server.running.is_set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    assert server.running.is_set() and server.ended == 1

  run_virtual(run())


def test_a_generation_in_flight_spans_the_update():
  server = FakeServer(version=2, seconds=2.0)
  control = make_control(a=server)

  async def run():
    running = asyncio.create_task(control.score(IDS))
    await asyncio.sleep(1.0)
    report = await sync(control)
    assert (await running)["http://a"].ok
    return report

  assert not run_virtual(run())[0].fenced


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"mode": "abort"}, "mode"),
    ({"bound": 0.0}, "bound"),
    ({"bound": float("nan")}, "bound"),
    ({"version": -1}, "version"),
  ],
)
def test_bad_arguments_send_nothing(options, field):
  server = FakeServer()
  with pytest.raises(ValueError, match=field):
    run_sync(make_control(a=server), **options)
  assert server.log == []


@pytest.mark.parametrize(
  ("ids", "logprobs"), [([1], [0.0]), ([1, 2], [0.0]), ([1, 2], [0.0, float("nan")])]
)
def test_a_canary_is_checked(ids, logprobs):
  with pytest.raises(ValueError, match="canary"):
    Canary(ids=ids, logprobs=logprobs)


def test_the_flush_trap_is_refused():
  server = FakeServer()
  control = make_control(a=server)

  async def run():
    await control.pause("in_place")
    with pytest.raises(ValueError, match="flush_cache"):
      await control.update_weights("p", 1, flush_cache=True)
    assert "/update_weights_from_disk" not in server.log
    await control.resume()
    assert (await control.update_weights("p", 1, flush_cache=True))["http://a"].ok

  run_virtual(run())


class Refusing(FakeServer):
  """Answers everything with 503."""

  async def answer(self, method, path, body, timeout):
    return 503, "busy"


def test_a_refusal_is_an_outcome():
  control = make_control(a=Refusing(), b=FakeServer())
  outcomes = run_virtual(control.resume())[0]
  assert not outcomes["http://a"].ok and "503 busy" in outcomes["http://a"].error
  assert outcomes["http://b"].ok


def test_an_admitted_server_counts_as_running():
  server = Hanging("/continue_generation")
  control = make_control(a=server)

  async def run():
    report = await sync(control)
    assert "resume failed" in report.fenced["http://a"]
    server.path = None
    server.running.set()  # as a restart would
    control.admit("http://a")
    assert (await control.update_weights("p", 4, flush_cache=True))["http://a"].ok

  run_virtual(run())


def test_each_server_has_its_own_outcome():
  good, bad = FakeServer(version=5), Hanging("/model_info")
  outcomes, seconds = run_virtual(make_control(good=good, bad=bad).model_info())
  assert outcomes["http://good"].value.weight_version == "5"
  assert not outcomes["http://bad"].ok and "timeout" in outcomes["http://bad"].error
  assert seconds == 60.0


def test_scores_and_ids():
  server = FakeServer(version=8)
  control = make_control(a=server)
  outcome = run_virtual(control.score(IDS, extra_key="k"))[0]["http://a"]
  expected = np.asarray([0.0, *(fake_servers.logprob_at(p) for p in (1, 2, 3))], np.float32)
  np.testing.assert_array_equal(outcome.value.logprobs, expected)
  assert outcome.value.version == 8
  with pytest.raises(ValueError, match="input_ids"):
    run_virtual(control.score([1, 264]))
  assert len(server.seen) == 1


def test_servers_come_and_go():
  control = make_control(a=FakeServer(), b=FakeServer())
  control.fence("http://a", "old")
  control.set_servers(["http://a", "http://c", "http://c"])
  assert control.urls == ("http://c",)
  control.admit("http://a")
  control.admit("http://d")
  assert control.urls == ("http://a", "http://c", "http://d")


def test_an_unknown_mode_is_refused():
  with pytest.raises(ValueError, match="mode"):
    run_virtual(make_control(a=FakeServer()).pause("gently"))
