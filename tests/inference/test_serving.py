"""The orchestrator's hand on its servers (`rl.serving`): simulated servers, weights on disk."""

import asyncio

import fake_servers
import jax
import numpy as np
import pytest
from fake_servers import FakeServer, FakeTransport, logprob_at, run_virtual

from intellect3.inference import fleet, tensor_wire
from intellect3.models import presets, transformer
from intellect3.rl import serving
from intellect3.rl.checks import NotStarted
from intellect3.rl.roles import Shared
from intellect3.types import RouterShape
from intellect3.weights import publish, tensors

CONFIG = presets.tiny(
  embed_dim=8, head_dim=4, num_heads=2, num_kv_heads=1, mlp_dim=8, expert_mlp_dim=4, vocab_size=16
)
IDS = [9, 8, 7]
A, B = "http://a", "http://b"


class Watcher:
  def __init__(self):
    self.versions = {}
    self.failures = []

  def servers(self, versions):
    self.versions = versions

  def loads(self, loads):
    pass

  def failed(self, url, version, reason, *, for_good):
    self.failures.append((url, version, reason, for_good))


class Renderer:
  vocab_size = fake_servers.VOCAB


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: transformer.init(CONFIG, jax.random.key(0)))()


@pytest.fixture(autouse=True)
def inline(monkeypatch):
  """Disk work on the loop's thread: a virtual clock does not wait for others."""

  async def to_thread(function, *arguments):
    return function(*arguments)

  monkeypatch.setattr(asyncio, "to_thread", to_thread)


def publish_version(run_dir, params, version, off=0.0):
  return publish.publish(
    run_dir / "weights",
    version,
    CONFIG,
    params,
    canary_ids=IDS,
    canary_logprobs=[0.0, *(logprob_at(p) + off for p in (1, 2))],
    keep=9,
  )


def make(run_dir, servers, *, router=None, **changes):
  shared = Shared(
    run_dir=run_dir,
    steps=9,
    seed=0,
    max_off_policy_steps=2,
    model_path=run_dir,
    renderer=Renderer(),
    environments={},
    environment_weights={},
    resume=False,
    num_workers=0,
    orchestrator_url="http://127.0.0.1:9",
    server_urls=tuple(f"http://{name}" for name in servers),
    router=router,
  )
  options = {
    "sync_mode": "in_place",
    "transport": "disk",
    "bucket_bytes": 300,
    "canary_bound": 1e-4,
    "verify_fingerprints": True,
    "start_seconds": 60.0,
    "timeout_seconds": 60.0,
    "fleet": fleet.Settings(),
  }
  watcher = Watcher()
  settings = serving.Settings(**{**options, **changes})
  return serving.Serving(shared, FakeTransport(**servers), settings, watcher), watcher


def run_with(hand, *versions):
  async def run():
    try:
      await hand.start()
      return [await hand.sync(version) for version in versions]
    finally:
      await hand.close()

  return run_virtual(run())[0]


def test_servers_that_an_orchestrator_left_paused_go_on_and_are_never_asked_for_their_health(
  tmp_path, params
):
  server = FakeServer()
  server.running.clear()
  publish_version(tmp_path, params, 0)
  hand, watcher = make(tmp_path, {"a": server})
  run_with(hand, 0)
  left = ["/model_info", "/end_weight_update", "/continue_generation"]
  assert server.log[:3] == left and "/health" not in server.log
  assert watcher.versions == {A: 0}


def test_a_server_that_would_not_tell_its_experts_is_fenced_before_anything_is_sampled(
  tmp_path, params
):
  servers = {"a": FakeServer(), "b": FakeServer()}
  servers["a"].settings = {"enable_return_routed_experts": True}
  publish_version(tmp_path, params, 0)
  router = RouterShape(num_layers=2, num_dense_layers=1, num_experts=8, num_experts_per_token=2)
  hand, watcher = make(tmp_path, servers, router=router)
  run_with(hand, 0)
  assert watcher.versions == {A: 0}
  ((url, version, reason, for_good),) = watcher.failures
  assert (url, version, for_good) == (B, 0, True)
  assert "enable_return_routed_experts: expected true" in reason
  assert "/update_weights_from_disk" not in servers["b"].log


@pytest.mark.parametrize("transport", ["disk", "tensor"])
def test_half_a_version_that_an_orchestrator_left_is_discarded(tmp_path, params, transport):
  server = FakeServer(version=4)
  server.running.clear()
  server.session = True
  publish_version(tmp_path, params, 0)
  hand, watcher = make(tmp_path, {"a": server}, transport=transport)
  run_with(hand, 0)
  assert server.calls[1] == ("/end_weight_update", {"abort": True})
  assert server.log[2:4] == ["/abort_request", "/continue_generation"]
  assert watcher.versions == {A: 0} and server.version == "0"


def test_nobody_uses_a_server_whose_load_failed_when_it_goes_on(tmp_path, params):
  at_resume = []

  class Failing(FakeServer):
    async def _answer(self, path, body):
      if path == "/continue_generation":
        at_resume.append([failure[:2] for failure in watcher.failures])
      return await super()._answer(path, body)

  server = Failing()
  server.update = (400, {"success": False, "message": "wrong shape"})
  publish_version(tmp_path, params, 0)
  hand, watcher = make(tmp_path, {"a": server, "b": FakeServer()})
  run_with(hand, 0)
  assert at_resume == [[], [(A, 0)]]  # at the start, and after the load
  assert len(watcher.failures) == 1 and watcher.versions == {B: 0}


def test_a_server_that_never_answers_is_named(tmp_path):
  server = FakeServer()
  server.kill()
  hand, _ = make(tmp_path, {"a": FakeServer(), "b": server})
  with pytest.raises(TimeoutError, match=r"http://b: no server after 60 s; last answer: .*refused"):
    run_with(hand)


def test_damaged_weights_reach_no_server(tmp_path, params):
  servers = {"a": FakeServer(), "b": FakeServer()}
  publish_version(tmp_path, params, 0)
  path = publish_version(tmp_path, params, 1) / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[-3] ^= 0x40
  path.write_bytes(data)
  hand, watcher = make(tmp_path, servers)
  _, report = run_with(hand, 0, 1)
  assert report.healthy == () and report.lost == () and set(report.fenced) == {A, B}
  assert "v_000001 differ from its manifest" in report.fenced[A]
  assert [url for url, _, _, for_good in watcher.failures if for_good] == [A, B]
  assert all(server.version == "0" for server in servers.values())


def test_the_bound_is_calibrated_at_the_first_sync_and_holds_from_then_on(tmp_path, params):
  server = FakeServer()
  for version, off in ((0, 4e-3), (1, 1.1e-2), (2, 1.3e-2)):
    publish_version(tmp_path, params, version, off=off)
  hand, _ = make(tmp_path, {"a": server}, canary_bound=None)
  first, second, third = run_with(hand, 0, 1, 2)
  assert first.healthy == (A,) and first.bound == pytest.approx(1.2e-2, rel=1e-3)
  assert second.healthy == (A,) and second.bound == first.bound
  assert third.healthy == () and "0.013" in third.fenced[A]


def test_a_calibrated_bound_is_no_smaller_than_float32_needs(tmp_path, params):
  publish_version(tmp_path, params, 0)
  hand, _ = make(tmp_path, {"a": FakeServer()}, canary_bound=None)
  assert run_with(hand, 0)[0].bound == 1e-4


def test_tensors_are_sent_as_they_were_published(tmp_path, params):
  server = FakeServer()
  directory = publish_version(tmp_path, params, 0)
  hand, _ = make(tmp_path, {"a": server}, transport="tensor")
  (report,) = run_with(hand, 0)
  assert report.healthy == (A,) and report.gigabytes > 0
  received = {}
  buckets = [body for path, body in server.calls if path == "/update_weights_from_tensor"]
  for body in buckets:
    received |= tensor_wire.read(body["serialized_named_tensors"][0])
  places = tensors.index(directory)
  assert len(buckets) > 3 and set(received) == set(places)
  for name, array in tensors.read(directory, places, list(places)):
    np.testing.assert_array_equal(received[name], array)


def test_reports_tell_what_a_sync_took(tmp_path, params):
  publish_version(tmp_path, params, 0)
  hand, _ = make(tmp_path, {"a": FakeServer(seconds=2.0), "b": FakeServer(seconds=3.0)})
  (report,) = run_with(hand, 0)
  row = report.metrics
  assert row["weight_sync/first_token_seconds"] == 3.0  # of the slower one
  assert row["weight_sync/first_token_seconds_per_gb"] == 3.0 / row["weight_sync/gigabytes"]
  files = (tmp_path / "weights" / "v_000000").iterdir()
  size = sum(path.stat().st_size for path in files if path.name != "manifest.json")
  assert row["weight_sync/gigabytes"] == size / 1e9
  assert row["weight_sync/canary_difference"] < 1e-6


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("sync_mode", "gently"),
    ("transport", "pigeon"),
    ("canary_bound", 0.0),
    ("bucket_bytes", 0),
    ("start_seconds", 0.0),
  ],
)
def test_bad_settings_are_named(tmp_path, field, value):
  with pytest.raises(NotStarted, match=field):
    make(tmp_path, {"a": FakeServer()}, **{field: value})
