"""New weights for a server that generates: version spans, the canary, failures, tensors by HTTP."""

import itertools

import numpy as np
import pytest

from intellect3.inference import tensor_sync
from intellect3.inference.weight_sync import Canary, from_disk, sync_server
from intellect3.weights import tensors
from tests.real_sglang import checkpoints
from tests.real_sglang.remote import LONG, PROMPT

CANARY_IDS = [*PROMPT, *range(32, 60)]


def canary(checkpoint):
  scores = checkpoints.trainer_logprobs(checkpoint.params, CANARY_IDS)
  return Canary(CANARY_IDS, [0.0, *scores.tolist()])


def bringing(load, checked, version, *, mode="in_place"):
  """What brings a version and checks it against a checkpoint; the trainer's part is done here."""
  wanted = {"version": version, "mode": mode, "canary": canary(checked), "bound": 1e-4}
  return lambda opened: sync_server(opened.control, opened.url, load=load, **wanted)


def by_disk(directory, version):
  return from_disk(directory, version)


def by_tensors(directory, version):
  places = tensors.index(directory)
  sizes = [(name, place.bytes) for name, place in places.items()]
  names = tensor_sync.plan_buckets(sizes, 100_000)
  assert len(names) > 2
  buckets = tensor_sync.Buckets(names, lambda some: tensors.read(directory, places, some))
  return tensor_sync.from_tensors(buckets, version)


@pytest.mark.parametrize("transport", [by_disk, by_tensors])
@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_an_update_in_flight_stamps_each_token_with_its_version(server, mode, transport):
  update = bringing(transport(server.second.directory, 1), server.second, 1, mode=mode)

  async def scenario(opened):
    return await opened.amid(lambda: update(opened), tokens=20)

  last, result = server.run(scenario)
  assert result.ok and result.max_difference < 1e-4, result.reason
  spans = last["meta_info"]["weight_versions"]
  assert [span["version"] for span in spans] == ["0", "1"]
  assert [span["start"] for span in spans] == [0, spans[0]["end"]]
  change = spans[0]["end"]
  assert 20 <= change < spans[1]["end"] == LONG == len(last["output_ids"])
  assert last["meta_info"]["weight_version"] == "1"

  tokens = [*PROMPT, *last["output_ids"]][: checkpoints.LENGTH]
  told = np.array([row[0] for row in last["meta_info"]["output_token_logprobs"]])
  told = told[: len(tokens) - len(PROMPT)]
  old, new = (
    checkpoints.trainer_logprobs(checkpoint.params, tokens)[len(PROMPT) - 1 :]
    for checkpoint in (server.first, server.second)
  )
  np.testing.assert_allclose(told[:change], old[:change], atol=1e-4)
  assert change < len(told), "the update came too late to be seen within the trainer's forward"
  assert np.max(np.abs(told[change:] - old[change:])) > 0.1
  if mode == "retract":  # its cache was computed anew: as if the new weights had read it all
    np.testing.assert_allclose(told[change:], new[change:], atol=1e-4)


def test_a_generation_after_an_update_is_of_the_new_weights_alone(server):
  sampling = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
  before = server.generate(PROMPT, sampling=sampling, extra_key="0")
  result = server.run(bringing(by_disk(server.second.directory, 7), server.second, 7))
  assert result.ok and result.max_difference < 1e-4, result.reason
  after = server.generate(PROMPT, sampling=sampling, extra_key="7", return_logprob=True)
  assert after["output_ids"] != before["output_ids"]
  assert after["meta_info"]["weight_versions"] == [{"version": "7", "start": 0, "end": 30}]
  tokens = [*PROMPT, *after["output_ids"]]
  expected = checkpoints.trainer_logprobs(server.second.params, tokens)[len(PROMPT) - 1 :]
  told = [row[0] for row in after["meta_info"]["output_token_logprobs"]]
  np.testing.assert_allclose(told, expected, atol=1e-4)


def test_weights_that_are_not_the_trainers_are_found_by_the_canary(server):
  result = server.run(bringing(by_disk(server.second.directory, 8), server.first, 8))
  assert not result.ok and "canary" in result.reason
  assert result.max_difference > 0.1


@pytest.mark.parametrize("what", ["nowhere", "no weights"])
def test_a_failed_update_leaves_the_old_weights_serving(server, tmp_path, what):
  path = tmp_path / "nowhere"
  if what == "no weights":
    path.mkdir()
    config = server.first.directory / "config.json"
    (path / "config.json").write_text(config.read_text())

  async def scenario(opened):
    outcome = await opened.control.update_weights(path, 9, flush_cache=True)
    assert outcome[opened.url].error is not None
    assert (await opened.control.model_info())[opened.url].value.weight_version == "0"
    return (await opened.control.score(CANARY_IDS, extra_key=what))[opened.url].value

  scores = server.run(scenario)
  assert scores.version == 0
  np.testing.assert_allclose(scores.logprobs, canary(server.first).logprobs, atol=1e-4)


def test_an_update_without_a_pause_waits_for_the_running(server):
  async def scenario(opened):
    return await opened.amid(
      lambda: opened.control.update_weights(server.second.directory, 3, flush_cache=False)
    )

  last, outcome = server.run(scenario)
  assert all(result.ok for result in outcome.values())
  assert last["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": LONG}]
  assert server.get("/model_info")[1]["weight_version"] == "3"


def test_a_cache_is_flushed_when_nothing_runs(server):
  sampling = {"max_new_tokens": 1, "temperature": 0}
  prompt = list(itertools.islice(itertools.cycle(PROMPT), 300))
  server.generate(prompt, sampling=sampling)
  assert server.generate(prompt, sampling=sampling)["meta_info"]["cached_tokens"] > 0
  assert server.post("/flush_cache")[0] == 200
  assert server.generate(prompt, sampling=sampling)["meta_info"]["cached_tokens"] == 0
