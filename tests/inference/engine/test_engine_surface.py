"""The protocol with a live engine: streams, stop strings, several generations, weights by tensor,
memory, metrics, chats."""

import collections
import itertools
import json
import socket

import pytest

from intellect3.inference import tensor_wire
from intellect3.models import hf

PROMPT = [72, 101, 108, 300, 12, 45, 46]
GREEDY = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}


def stream(client, **body):
  status, events = client.post("/generate", stream=True, **body)
  assert status == 200 and events[-1] == "[DONE]"
  return events[:-1]


def test_a_stream_grows_to_the_whole_reply(client):
  whole = client.generate(PROMPT, sampling=GREEDY, return_logprob=True, top_logprobs_num=2)
  events = stream(
    client, input_ids=PROMPT, sampling_params=GREEDY, return_logprob=True, top_logprobs_num=2
  )
  assert len(events) > 1
  lengths = [len(event["output_ids"]) for event in events]
  assert lengths == sorted(lengths) and lengths[-1] == 24
  for event in events:
    count, meta = len(event["output_ids"]), event["meta_info"]
    assert event["output_ids"] == whole["output_ids"][:count]
    assert whole["text"].startswith(event["text"])
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == count
    assert ("weight_versions" in meta) == (meta["finish_reason"] is not None) == (count == 24)
  assert events[-1]["text"] == whole["text"]
  for key in ("output_token_logprobs", "output_top_logprobs"):
    assert events[-1]["meta_info"][key] == whole["meta_info"][key]


def test_a_stream_may_come_in_larger_steps(client):
  sampling = GREEDY | {"stream_interval": 20, "max_new_tokens": 48}
  lengths = [
    len(event["output_ids"]) for event in stream(client, input_ids=PROMPT, sampling_params=sampling)
  ]
  steps = [later - sooner for sooner, later in itertools.pairwise(lengths)]
  assert lengths[-1] == 48 and all(step >= 20 for step in steps[:-1])


def test_a_stop_string_ends_a_generation(client):
  whole = client.generate(PROMPT, sampling=GREEDY)
  string = next(s for s in whole["text"][3:] if s.isalnum())
  place = whole["text"].index(string)
  for keep in (False, True):
    sampling = GREEDY | {"stop": ["never said", string], "no_stop_trim": keep}
    reply = client.generate(PROMPT, sampling=sampling, return_logprob=True)
    meta = reply["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": string}
    assert reply["text"] == whole["text"][: place + keep]
    count = len(reply["output_ids"])
    assert reply["output_ids"] == whole["output_ids"][:count] and count < 24
    assert meta["weight_versions"][-1]["end"] == len(meta["output_token_logprobs"]) == count
    last = stream(client, input_ids=PROMPT, sampling_params=sampling)[-1]
    assert last["text"] == reply["text"] and last["output_ids"] == reply["output_ids"]


def test_a_text_prompt_is_the_prompt_of_its_ids(client):
  text = "hello world"
  by_text = client.post(
    "/generate", text=text, sampling_params=GREEDY, return_prompt_token_ids=True
  )[1]
  by_ids = client.generate(by_text["prompt_token_ids"], sampling=GREEDY)
  assert by_text["output_ids"] == by_ids["output_ids"]
  assert by_text["meta_info"]["prompt_tokens"] == len(by_text["prompt_token_ids"])


def test_several_generations_of_one_prompt_are_those_of_their_seeds(client):
  sampling = {"max_new_tokens": 12, "temperature": 1.0, "sampling_seed": 5, "n": 3}
  replies = client.generate(PROMPT, sampling=sampling)
  alone = [
    client.generate(PROMPT, sampling=sampling | {"n": 1, "sampling_seed": 5 + index})
    for index in range(3)
  ]
  assert [r["output_ids"] for r in replies] == [r["output_ids"] for r in alone]
  assert len({tuple(r["output_ids"]) for r in replies}) == 3


@pytest.mark.parametrize("batch", [False, True])
def test_one_abort_ends_all_that_a_name_stands_for(client, batch):
  body = {
    "input_ids": [PROMPT, PROMPT[:3]] if batch else PROMPT,
    "rid": "several",
    "sampling_params": {"max_new_tokens": 900, "ignore_eos": True, "n": 2},
  }
  future = client.pool.submit(client.call, "POST", "/generate", body)
  client.wait_until(lambda state: state["running_requests"] == (4 if batch else 2))
  status, refused = client.call("POST", "/generate", body)
  assert status == 400 and "several" in refused["error"]["message"]
  assert client.post("/abort_request", rid="several") == (200, "")
  status, replies = future.result(30)
  assert status == 200 and len(replies) == (4 if batch else 2)
  assert {reply["meta_info"]["finish_reason"]["type"] for reply in replies} == {"abort"}
  client.wait_until(lambda state: state["running_requests"] == 0)


def test_a_client_that_leaves_a_stream_ends_it(client):
  sampling = {"max_new_tokens": 900, "ignore_eos": True}
  body = json.dumps({"input_ids": PROMPT, "sampling_params": sampling, "stream": True})
  with socket.create_connection(("127.0.0.1", client.port)) as connection:
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    before = client.state()["generated_tokens"]
    assert b"200 OK" in connection.recv(4096)
  client.wait_until(lambda state: state["running_requests"] == 0)
  assert client.state()["generated_tokens"] - before < 800


def test_an_aborted_stream_ends_with_what_there_is(client):
  body = {
    "input_ids": PROMPT,
    "rid": "streamed",
    "stream": True,
    "sampling_params": {"max_new_tokens": 900, "ignore_eos": True},
  }
  future = client.pool.submit(client.call, "POST", "/generate", body)
  client.wait_until(lambda state: state["running_requests"] == 1)
  client.post("/abort_request", rid="streamed")
  _, events = future.result(30)
  last = events[-2]
  assert last["meta_info"]["finish_reason"]["type"] == "abort"
  assert last["meta_info"]["completion_tokens"] == len(last["output_ids"]) < 900


def named_tensors(directory):
  config, params = hf.load(directory)
  return list(hf.to_hf(config, params))


def greedy(client):
  reply = client.generate(PROMPT, sampling=GREEDY, return_logprob=True)
  return reply["output_ids"], reply["meta_info"]["weight_version"]


def test_tensors_are_served_all_at_once_at_the_end(client, models):
  before, version = greedy(client)
  tensors = named_tensors(models[1])
  send = "/update_weights_from_tensor"

  def payload(part):
    return [tensor_wire.write(part)]

  outside = client.post(send, serialized_named_tensors=payload(tensors[:1]))
  assert outside[0] == 400 and "begin_weight_update" in outside[1]["message"]
  assert client.post("/begin_weight_update") == (200, {"success": True, "message": "Success"})
  assert client.post("/begin_weight_update")[0] == 400
  half = len(tensors) // 2
  for part, more in ((tensors[:half], {}), (tensors[half:], {"weight_version": "t"})):
    status, answer = client.post(
      send, serialized_named_tensors=payload(part), flush_cache=False, **more
    )
    assert status == 200 and answer["success"], answer
    assert greedy(client) == (before, version)
  status, answer = client.post("/update_weights_from_disk", model_path=str(models[1]))
  assert status == 400 and "session" in answer["message"]
  assert client.post("/end_weight_update") == (200, {"success": True, "message": "Success"})
  by_tensor, served = greedy(client)
  assert served == "t" and by_tensor != before
  client.post("/update_weights_from_disk", model_path=str(models[1]), weight_version="d")
  assert greedy(client) == (by_tensor, "d")
  client.post("/update_weights_from_disk", model_path=str(models[0]), weight_version=version)
  assert greedy(client) == (before, version)
  assert client.post("/end_weight_update")[0] == 400


@pytest.mark.parametrize("fault", ["name", "shape", "payload", "format"])
def test_wrong_tensors_leave_the_old_weights_serving(client, models, fault):
  before = greedy(client)
  (name, array), other, *_ = named_tensors(models[1])
  body = {"flush_cache": False, "weight_version": "bad"}
  if fault == "name":
    body["serialized_named_tensors"] = [tensor_wire.write([("nobody", array)])]
  elif fault == "shape":
    body["serialized_named_tensors"] = [tensor_wire.write([(name, array[:1])])]
  elif fault == "payload":
    body["serialized_named_tensors"] = ["AAAA"]
  else:
    body |= {
      "serialized_named_tensors": [tensor_wire.write([(name, array)])],
      "load_format": "direct",
    }
  good = body | {"serialized_named_tensors": [tensor_wire.write([other])]}
  good.pop("load_format", None)
  client.post("/begin_weight_update")
  sent, answer = client.post("/update_weights_from_tensor", **body)
  assert sent == (200 if fault in ("name", "shape") else 400)
  assert client.post("/update_weights_from_tensor", **good)[0] == 200
  ended, refused = client.post("/end_weight_update")
  assert ended == 400 and not refused["success"] and refused["message"]
  if sent == 400:  # the good ones that came after it are not served either
    assert answer["message"] in refused["message"]
  assert greedy(client) == before
  assert client.post("/end_weight_update")[0] == 400


def test_what_is_staged_can_be_discarded(client, models):
  """By whoever finds the session open: the one who began it may be dead."""
  before, tensors = greedy(client), named_tensors(models[1])
  payload = [tensor_wire.write(tensors[: len(tensors) // 2])]
  client.post("/begin_weight_update")
  status, _ = client.post(
    "/update_weights_from_tensor", serialized_named_tensors=payload, weight_version="half"
  )
  assert status == 200 and client.post("/begin_weight_update")[0] == 400
  assert client.post("/end_weight_update", abort="yes")[0] == 400  # and nothing is done
  assert client.post("/end_weight_update", abort=True)[0] == 200
  assert client.post("/end_weight_update", abort=True)[0] == 400
  assert greedy(client) == before
  # Nothing of it is left in the next session.
  client.post("/begin_weight_update")
  assert client.post("/end_weight_update")[0] == 200
  assert greedy(client) == before


def test_memory_is_given_back_and_taken_again(client):
  before = greedy(client)
  for tags in (["kv_cache"], ["weights"], None):
    body = {} if tags is None else {"tags": tags}
    assert client.post("/release_memory_occupation", **body) == (200, None)
    assert client.post("/resume_memory_occupation", **body) == (200, None)
    assert greedy(client) == before
  status, answer = client.post("/release_memory_occupation", tags=["everything"])
  assert status == 400 and "everything" in answer["error"]["message"]


def metrics(client):
  status, text = client.call("GET", "/metrics")
  assert status == 200
  values = {}
  for line in text.splitlines():
    if not line.startswith("#"):
      name, value = line.rsplit(" ", 1)
      values[name.split("{")[0] + ("{le" if "le=" in name else "")] = float(value)
  return collections.defaultdict(float, values)


def test_metrics_count_what_was_done(client):
  before = metrics(client)
  client.generate(PROMPT, sampling=GREEDY)
  client.generate(PROMPT, sampling=GREEDY | {"n": 2})
  after = metrics(client)
  grown = {name: after[name] - before[name] for name in after}
  assert grown["sglang:num_requests_total"] == 3
  assert grown["sglang:prompt_tokens_total"] == 3 * len(PROMPT)
  assert grown["sglang:generation_tokens_total"] == 3 * 24
  assert grown["sglang:e2e_request_latency_seconds_count"] == 3
  assert grown["sglang:time_to_first_token_seconds_count"] == 3
  assert grown["sglang:inter_token_latency_seconds_count"] == 3 * 23
  assert after["sglang:num_running_reqs"] == after["sglang:num_queue_reqs"] == 0
  assert after["sglang:max_total_num_tokens"] > 0


def test_chats_and_completions_say_what_generate_says(client):
  body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
  _, completion = client.post("/v1/completions", prompt=PROMPT, return_token_ids=True, **body)
  _, chat = client.post(
    "/v1/chat/completions",
    messages=[{"role": "user", "content": "unused"}],
    input_ids=PROMPT,
    return_token_ids=True,
    separate_reasoning=False,
    **body,
  )
  whole = client.generate(PROMPT, sampling=GREEDY | {"max_new_tokens": 12})
  assert completion["choices"][0]["token_ids"] == whole["output_ids"]
  assert completion["choices"][0]["text"] == whole["text"]
  assert chat["choices"][0]["response_token_ids"] == whole["output_ids"]
  assert chat["choices"][0]["message"]["content"] == whole["text"]


def test_health_generates_only_when_asked_to(client):
  before = client.state()["generated_tokens"]
  assert client.call("GET", "/health") == (200, "")
  assert client.state()["generated_tokens"] == before
  assert client.call("GET", "/health_generate") == (200, "")
  assert client.state()["generated_tokens"] == before + 1
