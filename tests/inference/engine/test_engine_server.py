"""What the engine promises beyond the recordings: batching, determinism, weights, numbers."""

import dataclasses
import functools
import json
import socket

import jax
import numpy as np
import pytest
from engine_http import random_params, serving

from intellect3.inference.engine import flags, server
from intellect3.models import hf, presets, transformer
from intellect3.models.config import ModelConfig

PROMPT = [72, 101, 108, 300, 12, 45, 46]
LONG = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0}


ROW = 128
"""Length to which the reference pads: one compilation."""

load = functools.cache(hf.load)


@functools.cache
def forward(config):
  return jax.jit(transformer.Transformer(config).apply)


def reference_logprobs(model, ids, temperature=1.0):
  """The trainer's own forward over a whole row: float64 logprobs of ids 1, 2, .. [T - 1]."""
  config, params = load(model)
  tokens, segments = np.zeros((2, 1, ROW), np.int32)
  tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
  output = forward(config)({"params": params}, tokens, np.arange(ROW)[None], segments)
  hidden = np.asarray(output.hidden_BTD[0, : len(ids)], np.float64)
  logits = hidden @ np.asarray(params["head"], np.float64)
  logits /= temperature
  logits -= logits.max(axis=1, keepdims=True)
  logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return logprobs[np.arange(len(ids) - 1), ids[1:]]


def output_logprobs(reply):
  return [logprob for logprob, _, _ in reply["meta_info"]["output_token_logprobs"]]


@pytest.fixture
def served(client, models):
  """The client, with the first checkpoint served under version "0" before and after."""

  def put(version):
    client.post("/continue_generation")
    status, reply = client.post(
      "/update_weights_from_disk", model_path=str(models[0]), weight_version=version
    )
    assert status == 200, reply

  put("0")
  yield client
  client.post("/abort_request", abort_all=True)
  put("default")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logprobs_are_the_trainers_forward(client, models, temperature):
  """Of the temperature-scaled softmax, over a prompt of several chunks and a decode."""
  prompt = (PROMPT * 6)[:37]
  reply = client.generate(
    prompt,
    sampling={"max_new_tokens": 24, "temperature": temperature, "sampling_seed": 1},
    return_logprob=True,
  )
  expected = reference_logprobs(models[0], prompt + reply["output_ids"], temperature)
  np.testing.assert_allclose(output_logprobs(reply), expected[len(prompt) - 1 :], atol=1e-5)


@pytest.mark.parametrize("start", [0, 5, 36])
def test_input_logprobs_are_the_trainers_forward(client, models, start):
  prompt = (PROMPT * 6)[:37]
  reply = client.generate(
    prompt, sampling={"max_new_tokens": 2}, return_logprob=True, logprob_start_len=start
  )
  scored = reply["meta_info"]["input_token_logprobs"]
  assert [token for _, token, _ in scored] == prompt[start:] and scored[0][0] is None
  expected = reference_logprobs(models[0], prompt)[start:]
  np.testing.assert_allclose([logprob for logprob, _, _ in scored[1:]], expected, atol=1e-5)


def test_a_request_that_arrives_while_others_run_is_served_before_they_end(served):
  running = [served.later(PROMPT, sampling=LONG) for _ in range(3)]
  served.wait_until(lambda state: state["running_requests"] == 3)
  reply = served.generate(PROMPT, sampling={"max_new_tokens": 1})
  assert not any(future.done() for future in running)
  served.post("/abort_request", abort_all=True)
  for future in running:
    meta = future.result(30)["meta_info"]
    assert meta["completion_tokens"] < LONG["max_new_tokens"]
    assert meta["request_finished_ts"] > reply["meta_info"]["prefill_finished_time"]


def test_tokens_do_not_depend_on_neighbours_slot_or_moment(client):
  """Bit for bit: the same ids and the same float32 logprobs, alone and in a full house."""
  prompt = (PROMPT * 6)[:37]
  sampling = {"max_new_tokens": 40, "temperature": 1.0, "sampling_seed": 11, "ignore_eos": True}
  alone = client.generate(prompt, sampling=sampling, return_logprob=True)
  others = [
    client.later(
      PROMPT[: 1 + index % 7] * (1 + index % 5),
      sampling={"max_new_tokens": 5 + 9 * index, "temperature": 0.7, "ignore_eos": True},
    )
    for index in range(9)
  ]
  client.wait_until(lambda state: state["running_requests"] >= 5)
  crowded = client.generate(prompt, sampling=sampling, return_logprob=True)
  for other in others:
    other.result(60)
  assert crowded["output_ids"] == alone["output_ids"]
  assert output_logprobs(crowded) == output_logprobs(alone)
  different = client.generate(prompt, sampling=sampling | {"sampling_seed": 12})
  assert different["output_ids"] != alone["output_ids"]


def test_requests_without_a_seed_differ(client):
  sampling = {"max_new_tokens": 12, "temperature": 1.0}
  replies = [client.generate(PROMPT, sampling=sampling)["output_ids"] for _ in range(3)]
  assert len({tuple(ids) for ids in replies}) == 3


def three_running(served):
  futures = [
    served.later(PROMPT, sampling=LONG | {"max_new_tokens": 120}, return_logprob=True)
    for _ in range(3)
  ]
  served.wait_until(
    lambda state: state["running_requests"] == 3 or any(future.done() for future in futures)
  )
  return futures


def paused_in_flight(served, mode):
  """Three requests that a pause caught half done; on a busy machine not at the first attempt."""
  for _ in range(20):
    futures = three_running(served)
    assert served.post("/pause_generation", mode=mode)[0] == 200
    if not any(future.done() for future in futures):
      return futures
    served.post("/continue_generation")
    for future in futures:
      future.result(60)
  raise AssertionError("no pause came while the three were running")


@pytest.mark.parametrize(("mode", "flush"), [("in_place", False), ("retract", True)])
def test_an_update_in_flight_stamps_each_token_with_its_weights(served, models, mode, flush):
  compiled = served.parts.device.compiled
  futures = paused_in_flight(served, mode)
  waiting = served.later(PROMPT, sampling={"max_new_tokens": 2})
  assert served.call("GET", "/health")[0] == 200
  status, reply = served.post(
    "/update_weights_from_disk", model_path=str(models[1]), weight_version="1", flush_cache=flush
  )
  assert status == 200, reply
  assert not waiting.done()
  served.post("/continue_generation")
  assert waiting.result(60)["meta_info"]["weight_versions"] == [
    {"version": "1", "start": 0, "end": 2}
  ]
  for future in futures:
    reply = future.result(60)
    spans = reply["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "1"]
    assert spans[0]["start"] == 0 and spans[1]["end"] == len(reply["output_ids"]) == 120
    assert spans[0]["end"] == spans[1]["start"] > 0
    assert reply["meta_info"]["num_retractions"] == (mode == "retract")
    ids, change = PROMPT + reply["output_ids"], spans[1]["start"]
    logprobs, prompt = output_logprobs(reply), len(PROMPT) - 1
    before = reference_logprobs(models[0], ids)[prompt:]
    np.testing.assert_allclose(logprobs[:change], before[:change], atol=1e-5)
    after = reference_logprobs(models[1], ids)[prompt:]
    error = np.abs(after[change:] - logprobs[change:]).max()
    # Retracted requests are computed anew; in place they still see keys of the old weights.
    assert error < 1e-5 if mode == "retract" else error > 1e-3
  assert served.parts.device.compiled == compiled


def test_an_update_without_a_pause_waits_and_later_requests_wait_for_it(served, models):
  early = served.later(PROMPT, sampling=LONG)
  served.wait_until(lambda state: state["running_requests"] == 1)
  update = served.pool.submit(
    served.post, "/update_weights_from_disk", model_path=str(models[1]), weight_version="1"
  )
  served.wait_until(lambda state: state["updating"])
  late = served.later(PROMPT, sampling={"max_new_tokens": 1})
  assert early.result(60)["meta_info"]["weight_versions"][0]["version"] == "0"
  assert update.result(60)[0] == 200
  assert late.result(60)["meta_info"]["weight_versions"][0]["version"] == "1"


def test_weights_published_in_bfloat16_are_served_by_a_float32_server(served, models, tmp_path):
  config, params = hf.load(models[0])
  hf.save(tmp_path / "half", config, params, dtype="bfloat16")
  status, reply = served.post(
    "/update_weights_from_disk", model_path=str(tmp_path / "half"), weight_version="7"
  )
  assert status == 200, reply
  scored = served.generate(
    PROMPT,
    sampling={"max_new_tokens": 0, "temperature": 0},
    return_logprob=True,
    logprob_start_len=0,
  )["meta_info"]["input_token_logprobs"]
  # The reference holds what the file holds, widened: rounding is in the file, not in the server.
  rounded = hf.load(tmp_path / "half", dtype="float32")[1]
  hf.save(tmp_path / "widened", config, rounded)
  expected = reference_logprobs(tmp_path / "widened", PROMPT)
  np.testing.assert_allclose([row[0] for row in scored[1:]], expected, atol=1e-4)
  assert np.max(np.abs(expected - reference_logprobs(models[0], PROMPT))) > 1e-4


def test_a_failed_update_keeps_the_old_weights_serving(served, models, tmp_path):
  def greedy():
    return served.generate(PROMPT, sampling={"max_new_tokens": 8, "temperature": 0})["output_ids"]

  before = greedy()
  config = ModelConfig.from_hf(json.loads((models[0] / "config.json").read_text()))
  wider = dataclasses.replace(config, mlp_dim=2 * config.mlp_dim)
  hf.save(tmp_path / "wider", wider, random_params(wider, 0))
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "config.json").write_text((models[0] / "config.json").read_text())
  (broken / "model.safetensors").write_bytes(b"\x08\x00\x00\x00")
  for path, named in [
    ("nowhere", "nowhere"),
    ("wider", "mlp_dim"),
    ("broken", "broken"),
  ]:
    status, reply = served.post(
      "/update_weights_from_disk", model_path=str(tmp_path / path), weight_version="9"
    )
    assert status == 400 and not reply["success"] and named in reply["message"], reply
  for more, named in [
    ({"load_format": "dummy"}, "load_format"),
    ({"model_path": 3}, "model_path"),
  ]:
    status, reply = served.post(
      "/update_weights_from_disk", **({"model_path": str(models[1])} | more)
    )
    assert status == 400 and named in reply["message"]
  assert served.call("GET", "/model_info")[1]["weight_version"] == "0"
  assert greedy() == before


def test_a_full_queue_answers_503(served):
  served.post("/pause_generation", mode="in_place")
  house = [served.later(PROMPT, sampling={"max_new_tokens": 1}) for _ in range(32)]
  served.wait_until(lambda state: state["running_requests"] + state["waiting_requests"] == 32)
  reply = served.generate(PROMPT, expect=503)
  assert "queue is full (--queue-limit 24)" in reply["error"]["message"]
  served.post("/continue_generation")
  assert all(future.result(60)["meta_info"]["completion_tokens"] == 1 for future in house)


def test_a_call_that_can_never_fit_is_not_told_to_try_again(served):
  reply = served.generate(PROMPT, expect=400, sampling={"max_new_tokens": 1, "n": 33})
  message = reply["error"]["message"]
  assert "at most 32 generations" in message and "--queue-limit 24" in message and "33" in message
  whole = served.generate(PROMPT, sampling={"max_new_tokens": 1, "n": 32})
  assert len(whole) == 32


def test_a_body_that_is_too_large_is_refused_and_the_server_goes_on(client):
  reply = client.generate([1] * 2_000_000, expect=413)
  assert "too large" in reply["error"]["message"]
  assert client.generate(PROMPT, sampling={"max_new_tokens": 1})["output_ids"]


def test_a_client_that_goes_away_frees_its_slot(served):
  body = json.dumps({"input_ids": PROMPT, "sampling_params": LONG | {"max_new_tokens": 900}})
  with socket.create_connection(("127.0.0.1", served.port)) as connection:
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    before = served.state()["generated_tokens"]
    connection.sendall((head + body).encode())
    served.wait_until(lambda state: state["running_requests"] == 1)
  served.wait_until(lambda state: state["running_requests"] == 0)
  assert served.state()["generated_tokens"] - before < 800


def test_a_name_that_is_in_use_is_refused(served):
  future = served.later(PROMPT, sampling=LONG, rid="twice")
  served.wait_until(lambda state: state["running_requests"] == 1)
  assert "twice" in served.generate(PROMPT, expect=400, rid="twice")["error"]["message"]
  served.post("/abort_request", rid="twice")
  assert future.result(30)["meta_info"]["finish_reason"]["type"] == "abort"
  assert served.generate(PROMPT, rid="twice", sampling={"max_new_tokens": 1})


def test_aborts_while_paused_answer_at_once(served):
  served.post("/pause_generation", mode="in_place")
  future = served.later(PROMPT, sampling=LONG, rid="early")
  served.wait_until(lambda state: state["waiting_requests"] == 1)
  assert served.post("/abort_request", rid="early") == (200, "")
  meta = future.result(5)["meta_info"]
  assert meta["finish_reason"]["type"] == "abort" and meta["completion_tokens"] == 0


def test_a_batch_is_answered_in_order(client):
  status, replies = client.post(
    "/generate",
    input_ids=[PROMPT, PROMPT[:3], PROMPT[:1]],
    sampling_params=[{"max_new_tokens": n} for n in (5, 1, 3)],
  )
  assert status == 200
  assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [7, 3, 1]
  assert [reply["meta_info"]["completion_tokens"] for reply in replies] == [5, 1, 3]


def test_bodies_that_are_no_json_are_refused(client):
  for path in ("/generate", "/pause_generation", "/update_weights_from_disk", "/abort_request"):
    status, reply = client.call("POST", path, [1])
    assert status == 400 and "JSON object" in json.dumps(reply)


def test_eos_of_the_model_and_bfloat16(tmp_path):
  """A served bfloat16 checkpoint stops at the ids of its generation config."""
  config = presets.tiny(vocab_size=16, max_positions=64, param_dtype="bfloat16")
  hf.save(tmp_path, config, random_params(config, 0))
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
  with serving(tmp_path, slots=4, prefill_rows=2, prefill_chunk=8) as client:
    assert client.call("GET", "/server_info")[1]["dtype"] == "bfloat16"
    replies = [client.generate([1, 2], sampling={"max_new_tokens": 60}) for _ in range(4)]
  stopped = [r for r in replies if r["meta_info"]["finish_reason"]["type"] == "stop"]
  assert stopped and all(reply["text"] == "" for reply in replies)
  for reply in stopped:
    assert reply["output_ids"][-1] in (3, 4)
    assert not {3, 4} & set(reply["output_ids"][:-1])


def test_a_dense_model_has_no_routed_experts_to_return(tmp_path):
  config = presets.tiny_qwen3()
  hf.save(tmp_path, config, random_params(config, 0))
  settings = flags.parse(
    ["--model", str(tmp_path), "--port", "0", "--enable-return-routed-experts"]
  )
  with pytest.raises(ValueError, match=r"enable_return_routed_experts: .* got qwen3 with 2 dense"):
    server.build(settings)
