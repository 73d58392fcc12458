"""Client, control, sync and conversation against the embedded engine in a process of its own."""

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from intellect3.environments.reverse_text import ReverseText
from intellect3.inference import client, fleet, launch, tensor_sync
from intellect3.inference.control import ServerControl
from intellect3.inference.transport import HttpTransport
from intellect3.inference.weight_sync import Canary, ServerSync, from_disk, sync_server
from intellect3.models import hf, presets, transformer
from intellect3.rendering.bytes import ByteRenderer
from intellect3.rendering.tokenizer_files import write_tokenizer
from intellect3.rollouts.conversation import RecordedConversation
from intellect3.types import RouterShape
from intellect3.weights import tensors as published

CONFIG = presets.tiny(max_positions=1024)
RENDERER = ByteRenderer()
CANARY_IDS = RENDERER.render([{"role": "user", "content": "the quick brown fox"}])
ROUTER = RouterShape(num_layers=2, num_dense_layers=1, num_experts=8, num_experts_per_token=2)
BOUND = 1e-4


@jax.jit
def _full(params, tokens_1T):
  """The trainer's logprobs of each token but the first, at temperature 1, and all its experts."""
  positions_1T = jnp.arange(tokens_1T.shape[1])[None]
  output = transformer.Transformer(CONFIG).apply(
    {"params": params}, tokens_1T, positions_1T, jnp.ones_like(tokens_1T)
  )
  logits_TV = output.hidden_BTD[0] @ transformer.head(params, CONFIG)
  scores_TV = jax.nn.log_softmax(logits_TV.astype(jnp.float32))
  logprobs_T = jnp.take_along_axis(scores_TV[:-1], tokens_1T[0, 1:, None], axis=1)[:, 0]
  return logprobs_T, output.router.experts_LBTA[:, 0].swapaxes(0, 1)


def full(params, tokens):
  """Both for any number of tokens, at one compiled shape; the first logprob is 0.0."""
  padded = np.pad(np.asarray(tokens, np.int32), (0, 128 - len(tokens)))[None]
  logprobs, experts_TLA = jax.device_get(_full(params, padded))
  return np.append(np.float32(0.0), logprobs)[: len(tokens)], experts_TLA[: len(tokens)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Directory and parameters of two models; v0's are what the server starts with."""
  made = []
  for seed in range(2):
    directory = tmp_path_factory.mktemp("model") / f"v{seed}"
    params = transformer.init(CONFIG, jax.random.key(seed))
    # At their initial scale the logits are flat, and wrong weights would hardly show.
    params = jax.tree.map(lambda leaf: leaf * 3.0 if leaf.ndim > 1 else leaf, params)
    hf.save(directory, CONFIG, params)
    write_tokenizer(directory)
    made.append((directory, params))
  return made


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
  """Address of a running engine with weights v0."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  launch.check_port_free("127.0.0.1", port)
  sizes = {"slots": 4, "prefill_rows": 2, "context_length": 512}
  flags = {"enable_return_routed_experts": True, "die_with_parent": True}
  command = launch.embedded_command(checkpoints[0][0], port, **sizes, **flags)
  log = tmp_path_factory.mktemp("engine") / "log"
  with open(log, "wb") as out:
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

  async def wait():
    async with transport_to() as transport:
      await launch.wait_until_healthy(transport, url, 120.0, lambda: process.poll() is None)

  url = f"http://127.0.0.1:{port}"
  try:
    asyncio.run(wait())
    yield url
  except launch.ServerDied as error:
    raise AssertionError(log.read_text()[-3000:]) from error
  finally:
    process.send_signal(signal.SIGTERM)
    try:
      process.wait(timeout=10.0)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


@contextlib.asynccontextmanager
async def transport_to():
  transport = HttpTransport()
  try:
    yield transport
  finally:
    await transport.close()


@contextlib.asynccontextmanager
async def connected(url):
  """A pool and a control of one server."""
  async with transport_to() as transport:
    options = {"vocab_size": RENDERER.vocab_size, "timeout_seconds": 60.0}
    pool = client.ServerPool(transport, [url], router=ROUTER, **options)
    yield pool, ServerControl(transport, [url], **options)


async def until_running(url, requests):
  """Waits until the server generates for so many requests, and has had time for some tokens."""
  async with transport_to() as transport:
    for _ in range(1000):
      _, body = await transport.request("GET", f"{url}/server_info", None, 5.0)
      if json.loads(body)["internal_states"][0]["running_requests"] >= requests:
        await asyncio.sleep(0.03)
        return
      await asyncio.sleep(0.005)
  raise AssertionError(f"{requests} requests never ran at once")


def generate(pool, prompt, *, rid, seed=1, max_new_tokens=16, temperature=1.0, stop=()):
  return pool.generate(
    prompt,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    stop_token_ids=stop,
    seed=seed,
    rid=rid,
    extra_key="test",
  )


class Watched:
  """What a fleet tells a run's orchestrator."""

  def __init__(self):
    self.versions, self.failures = {}, []

  def servers(self, versions):
    self.versions = dict(versions)

  def loads(self, loads):
    pass

  def failed(self, url, version, reason, *, for_good):
    self.failures.append((url, version, for_good))


def to_server(control, url, checkpoint, version, *, mode="in_place", load=None, **options):
  directory, params = checkpoint
  return sync_server(
    control,
    url,
    load=load or from_disk(directory, version),
    version=version,
    mode=mode,
    canary=Canary(CANARY_IDS, full(params, CANARY_IDS)[0].tolist()),
    bound=BOUND,
    **options,
  )


async def bring(control, checkpoint, version, **options) -> tuple[ServerSync, Watched]:
  """Brings weights to a control's server as a run does: through a fleet."""
  watched = Watched()
  book = fleet.Fleet(
    control,
    bring=lambda url, version, unusable: to_server(
      control, url, checkpoint, version, unusable=unusable, **options
    ),
    wanted=lambda: control.urls,
    watcher=watched,
    settings=fleet.Settings(),
  )
  (result,) = await book.sync(version)
  return result, watched


async def brought(control, checkpoint, version, **options) -> ServerSync:
  """The same where it must go well."""
  result, watched = await bring(control, checkpoint, version, **options)
  assert result.ok, result.reason
  assert watched.versions == {result.url: version} and watched.failures == []
  return result


def test_generations_have_the_trainers_logprobs_and_obey_their_seed(server, checkpoints):
  prompt = RENDERER.render([{"role": "user", "content": "abc"}])

  async def run():
    async with connected(server) as (pool, control):
      await brought(control, checkpoints[0], 0)
      return await asyncio.gather(
        *(generate(pool, prompt, rid=f"g{i}", seed=i % 3) for i in range(6))
      )

  generations = asyncio.run(run())
  for generation in generations:
    assert generation.policy_versions.tolist() == [0] * 16
    tokens = [*prompt, *generation.tokens.tolist()]
    expected = full(checkpoints[0][1], tokens)[0][len(prompt) :]
    np.testing.assert_allclose(generation.inference_logprobs, expected, atol=1e-4)
  texts = [generation.tokens.tolist() for generation in generations]
  assert texts[:3] == texts[3:] and texts[0] != texts[1]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_sync_in_flight_stamps_both_versions_and_passes_its_canary(server, checkpoints, mode):
  prompt = RENDERER.render([{"role": "user", "content": "abcdef"}])

  async def run():
    async with connected(server) as (pool, control):
      await brought(control, checkpoints[0], 10)
      tasks = [
        asyncio.create_task(generate(pool, prompt, rid=f"{mode}{i}", max_new_tokens=400))
        for i in range(4)
      ]
      await until_running(server, 4)
      result = await brought(control, checkpoints[1], 11, mode=mode)
      return result, await asyncio.gather(*tasks)

  result, generations = asyncio.run(run())
  assert 0 <= result.max_difference <= BOUND
  assert sum(result.parts.values()) <= result.seconds * 1.01 + 0.01
  for generation in generations:
    versions = generation.policy_versions
    assert set(versions.tolist()) == {10, 11} and np.all(np.diff(versions) >= 0)
    assert generation.tokens.size == 400
    first = int(np.sum(versions == 10))
    tokens = [*prompt, *generation.tokens[:first].tolist()][:128]
    expected = full(checkpoints[0][1], tokens)[0][len(prompt) :]
    np.testing.assert_allclose(generation.inference_logprobs[: len(expected)], expected, atol=1e-4)


def test_a_generation_aborted_by_a_pause_continues_by_itself(server):
  prompt = RENDERER.render([{"role": "user", "content": "abcdef"}])

  async def run():
    async with connected(server) as (pool, control):
      task = asyncio.create_task(generate(pool, prompt, rid="aborted", max_new_tokens=400))
      await until_running(server, 1)
      pausing = asyncio.create_task(control.pause("abort"))
      await asyncio.sleep(0.1)
      assert (await pausing)[server].ok
      assert (await control.resume())[server].ok
      generation = await task
      return generation, pool.continued

  generation, continued = asyncio.run(run())
  assert continued == 1
  assert generation.tokens.size == 400 and generation.finish_reason == "length"


def test_a_corrupted_tensor_is_found_by_the_canary(server, checkpoints, tmp_path):
  directory = tmp_path / "corrupted"
  shutil.copytree(checkpoints[1][0], directory)
  file = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  name = next(name for name in sorted(tensors) if "layers.1.self_attn.v_proj.weight" in name)
  tensors[name] = tensors[name].copy()
  tensors[name].flat[::7] += 0.5
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})

  async def run():
    async with connected(server) as (_, control):
      await brought(control, checkpoints[1], 20)
      bad = await bring(control, (directory, checkpoints[1][1]), 21)
      await brought(control, checkpoints[1], 22)
      return bad

  bad, watched = asyncio.run(run())
  assert watched.failures == [(server, 21, True)] and watched.versions == {}
  assert "v21" in bad.reason and "canary" in bad.reason and f"{BOUND:g}" in bad.reason
  assert bad.max_difference > 10 * BOUND


def test_a_missing_checkpoint_fences_and_the_server_goes_on(server, checkpoints):
  async def run():
    async with connected(server) as (pool, control):
      bad, watched = await bring(control, (checkpoints[0][0] / "nowhere", checkpoints[0][1]), 30)
      assert watched.failures == [(server, 30, True)]
      await brought(control, checkpoints[0], 31)
      generation = await generate(pool, [97], rid="after", max_new_tokens=2)
      info = (await control.model_info())[server]
      return bad, generation, info

  bad, generation, info = asyncio.run(run())
  assert "load failed" in bad.reason
  assert generation.policy_versions.tolist() == [31, 31]
  assert info.value.weight_version == "31"


class Broken(OSError):
  """The disk went away."""


@pytest.mark.parametrize("how", ["a bucket cannot be read", "cancelled", "somebody died"])
def test_of_a_push_that_breaks_off_nothing_is_served(server, checkpoints, how):
  """Half of other tensors has arrived when it ends: greedy output and version are as before."""
  prompt = RENDERER.render([{"role": "user", "content": "abc"}])
  directory = checkpoints[1][0]
  places = published.index(directory)
  names = tensor_sync.plan_buckets([(name, place.bytes) for name, place in places.items()], 20_000)
  assert len(names) > 3
  half_way = asyncio.Event()

  async def run():
    loop = asyncio.get_running_loop()

    def read(some):
      if some == names[len(names) // 2]:
        if how == "a bucket cannot be read":
          raise Broken("the disk went away")
        loop.call_soon_threadsafe(half_way.set)
      return published.read(directory, places, some)

    def greedy(pool, rid, length=24):
      return generate(pool, prompt, rid=rid, temperature=0.0, max_new_tokens=length)

    load = tensor_sync.from_tensors(tensor_sync.Buckets(names, read), 51)
    async with connected(server) as (pool, control):
      await brought(control, checkpoints[0], 50)
      before = await greedy(pool, f"before {how}")
      running = asyncio.ensure_future(greedy(pool, f"amid {how}", 400))
      await until_running(server, 1)
      if how == "a bucket cannot be read":
        result, watched = await bring(control, checkpoints[1], 51, load=load)
        assert "went away" in result.reason and watched.failures == [(server, 51, True)]
      elif how == "cancelled":
        task = asyncio.ensure_future(to_server(control, server, checkpoints[1], 51, load=load))
        await half_way.wait()
        task.cancel()
        await asyncio.wait([task])
      else:
        body = await tensor_sync.Buckets(names, read).get(0, version=51, flush=False, ranks=1)
        await control.update(server, "/begin_weight_update", {})
        await control.update(server, "/update_weights_from_tensor", body)
        await brought(control, checkpoints[0], 52)  # by the next one, from disk
      after = await greedy(pool, f"after {how}")
      amid = await running
      # The session is closed: the whole version goes through, and other weights speak.
      load = tensor_sync.from_tensors(
        tensor_sync.Buckets(names, lambda some: published.read(directory, places, some)), 53
      )
      await brought(control, checkpoints[1], 53, load=load)
      return before, amid, after, await greedy(pool, f"new {how}")

  before, amid, after, new = asyncio.run(run())
  version = 52 if how == "somebody died" else 50
  assert after.tokens.tolist() == before.tokens.tolist()
  np.testing.assert_allclose(after.inference_logprobs, before.inference_logprobs, atol=1e-6)
  assert set(after.policy_versions.tolist()) == {version}
  assert amid.tokens.tolist()[:24] == before.tokens.tolist() and amid.tokens.size == 400
  assert set(amid.policy_versions.tolist()) <= {50, version}
  assert new.tokens.tolist() != before.tokens.tolist()


def test_an_environment_runs_and_its_trajectory_is_what_the_trainer_scores(server, checkpoints):
  environment = ReverseText()
  task = environment.task("train", 0)

  async def run():
    async with connected(server) as (pool, control):
      await brought(control, checkpoints[0], 40)
      conversation = RecordedConversation(
        RENDERER,
        pool,
        seed=3,
        rid="rollout",
        temperature=1.0,
        max_new_tokens=12,
        max_tokens=64,
      )
      score = await environment.run(task, conversation)
      await conversation.send([{"role": "user", "content": "again"}])
      return score, conversation

  score, conversation = asyncio.run(run())
  assert 0.0 <= score.reward <= 1.0
  (trajectory,) = conversation.trajectories()
  trajectory.check()
  expected, experts_TLA = full(checkpoints[0][1], trajectory.tokens)
  mask = trajectory.loss_mask
  np.testing.assert_allclose(trajectory.inference_logprobs[mask], expected[mask], atol=1e-4)
  chosen = np.sort(trajectory.routed_experts, axis=-1)  # over two turns, of all but the last token
  np.testing.assert_array_equal(chosen, np.sort(experts_TLA[:-1], axis=-1))
  assert set(trajectory.policy_versions[mask].tolist()) == {40}
