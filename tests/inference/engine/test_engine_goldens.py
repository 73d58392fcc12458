"""The recorded exchanges again, with a live server of the recorded model: statuses, keys, types,
finish reasons; and the numbers, token for token where nothing was drawn.

How the same tokens are told, to the letter, is `test_engine_replay`'s.
"""

import base64
import copy
import itertools
import json
import math

import numpy as np
import pytest
from engine_http import exchanges

EXCHANGES = exchanges()
PLAIN = [
  name
  for name, exchange in EXCHANGES.items()
  if "during" not in exchange and exchange["status"] is not None and name != "health_while_paused"
]
DURING = [name for name, exchange in EXCHANGES.items() if "during" in exchange]
NEW_TOKENS = 150
"""Of the requests that something happens to; the recorded 600 would only take longer."""

TRAP = "update_in_place_flush_cache_trap"
NULL_OR_NOT = ("cached_tokens_details", "matched_stop", "reasoning_content", "details")
WORDED_OTHERWISE = {
  *("bad_pause_mode", "chat_bad_no_messages", "update_weights_from_disk_no_model_path"),
  *("bad_unknown_sampling_param", "update_weights_from_disk_missing_path"),
  "update_weights_from_disk_no_weights",
}
"""Refusals that quote SGLang's own source, its list of names, another library, or its loader."""

OF_CUDA = "capture_batch_sizes"
SOMETIMES = {"decode_throughput", "tool_calls"}


def assert_same_shape(ours, theirs, where="response"):
  """Same keys, same JSON types, nulls and empty lists where they are recorded.

  Lists have elements of one shape. They may differ in length, since what is sampled does; rows of a
  list, and a list of answers, may not.
  """
  if theirs is None or ours is None:
    # What the prefix cache held, and what random tokens say, differs.
    assert theirs is ours or where.endswith(NULL_OR_NOT), where
  elif isinstance(theirs, dict):
    assert isinstance(ours, dict), where
    differing = (set(ours) ^ set(theirs)) - SOMETIMES
    assert not differing, f"{where}: {differing}"
    for key in set(ours) & set(theirs):
      assert_same_shape(ours[key], theirs[key], f"{where}.{key}")
  elif isinstance(theirs, list):
    assert isinstance(ours, list), where
    assert bool(ours) == bool(theirs) or where.endswith(OF_CUDA), f"{where}: {ours!r}"
    if where.endswith("[]") or where == "response":
      assert len(ours) == len(theirs), where
    for one, other in zip(ours, theirs, strict=False):
      assert_same_shape(one, other, f"{where}[]")
  else:
    number = (int, float)
    kinds = number if isinstance(theirs, float) else type(theirs)
    if where.endswith(("matched", "matched_stop")):
      kinds = (int, str)
    assert isinstance(ours, kinds), f"{where}: {ours!r} against {theirs!r}"


def is_same_shape(ours, theirs):
  try:
    assert_same_shape(ours, theirs)
  except AssertionError:
    return False
  return True


def assert_same_stream(ours, theirs):
  """The first and the last event of the first choice are shaped as those that were recorded, the
  middle one as one in between."""
  assert ours[-1] == theirs[-1] == "[DONE]"
  mine, recorded = (
    [e for e in events[:-1] if e.get("index", 0) == 0 and e.get("choices") != []]
    for events in (ours, theirs)
  )
  # A short stream may come in one event.
  if len(mine) > 1 and "choices" not in recorded[0]:
    assert_same_shape(mine[0], recorded[0])
  if len(mine) > 2:
    event = mine[len(mine) // 2]
    assert any(is_same_shape(event, other) for other in recorded[1:-1]), event
  assert_same_shape(mine[-1], recorded[-1])


def localise(value, models, tmp_path):
  """Replaces the recording's names of directories by ours."""
  empty = tmp_path / "empty"
  empty.mkdir(exist_ok=True)
  (empty / "config.json").write_text((models[0] / "config.json").read_text())
  names = {
    "MODEL_DIR_A": models[0],
    "MODEL_DIR_B": models[1],
    "MISSING_DIR": tmp_path / "missing",
    "EMPTY_DIR": empty,
  }
  text = json.dumps(value)
  for name, path in names.items():
    text = text.replace(name, str(path))
  return json.loads(text)


def restore(client, models):
  """Serves the first checkpoint under its first version again, not paused."""
  client.post("/continue_generation")
  status, reply = client.post(
    "/update_weights_from_disk", model_path=str(models[0]), weight_version="default"
  )
  assert status == 200, reply


@pytest.mark.parametrize("name", PLAIN)
def test_answers_are_shaped_as_recorded(name, client, models, tmp_path):
  exchange = copy.deepcopy(EXCHANGES[name])
  request, theirs = exchange["request"], exchange["response"]
  body = localise(request["json"], models, tmp_path)
  if body and "regex" in body:  # forces the text; grammars are not supported
    body.pop("regex")
  session = name == "end_weight_update" or name.endswith("distributed_no_group")
  if session:
    client.post("/begin_weight_update")
  status, ours = client.call(request["method"], request["path"], body)
  if name == "begin_weight_update" or name.endswith("distributed_no_group"):
    client.post("/end_weight_update")
  if name == "release_memory_occupation":
    client.post("/resume_memory_occupation", **body)
  assert status == exchange["status"], ours
  if name == "server_info":
    states = theirs.pop("internal_states")
    assert ours["internal_states"][0]["weight_version"] == states[0]["weight_version"]
    assert_same_shape({key: ours[key] for key in theirs}, theirs)
  elif isinstance(theirs, str):
    assert ours == theirs
  elif isinstance(theirs, list) and theirs[-1] == "[DONE]":
    assert_same_stream(ours, theirs)
  else:
    assert_same_shape(ours, theirs)
  if status >= 400 and name not in WORDED_OTHERWISE:
    assert ours == localise(theirs, models, tmp_path)
  if request["path"] == "/generate" and status == 200:
    assert_same_ends(ours, theirs)
  if request["path"] == "/update_weights_from_disk":
    restore(client, models)


def assert_same_ends(ours, theirs):
  mine, recorded = (
    [
      reply
      for reply in (answer if isinstance(answer, list) else [answer])
      if "meta_info" in reply and reply["meta_info"]["finish_reason"] is not None
    ]
    for answer in (ours, theirs)
  )
  for one, other in zip(mine, recorded, strict=True):
    end, recorded_end = one["meta_info"]["finish_reason"], other["meta_info"]["finish_reason"]
    assert end["type"] == recorded_end["type"]
    if end["type"] == "length":
      assert end == recorded_end
    if isinstance(ours, dict):
      assert_consistent(one)


def assert_consistent(reply):
  meta, ids = reply["meta_info"], reply["output_ids"]
  assert meta["completion_tokens"] == len(ids)
  spans = meta["weight_versions"]
  assert spans[0]["start"] == 0 and spans[-1]["end"] == len(ids)
  assert all(a["end"] == b["start"] for a, b in itertools.pairwise(spans))
  if "output_token_logprobs" in meta:
    assert [token for _, token, _ in meta["output_token_logprobs"]] == ids
    assert all(math.isfinite(p) and p <= 0 for p, _, _ in meta["output_token_logprobs"])
  matched = meta["finish_reason"].get("matched")
  if isinstance(matched, int):
    assert ids[-1] == matched
  elif matched is not None:
    assert matched not in reply["text"]


@pytest.mark.parametrize("name", DURING)
def test_what_happens_to_running_requests_is_as_recorded(name, client, models, tmp_path):
  exchange = copy.deepcopy(EXCHANGES[name])
  body = localise(exchange["request"]["json"], models, tmp_path)
  theirs = exchange["response"]
  stream = isinstance(theirs, list)
  last = theirs[-2] if stream else theirs
  recorded = last["meta_info"]
  sampling = body["sampling_params"]
  paused_before = name == "generate_sent_while_paused"
  if paused_before:
    client.post("/pause_generation", mode="in_place")
  elif recorded["finish_reason"]["type"] == "length":
    sampling["max_new_tokens"] = NEW_TOKENS
  before = client.state()["generated_tokens"]
  future = client.pool.submit(client.call, "POST", "/generate", body)
  if not paused_before:
    client.wait_until(
      lambda state: state["running_requests"] == 1 and state["generated_tokens"] > before + 9
    )
  for other in exchange["during"]:
    request = localise(other["request"], models, tmp_path)
    status, ours = client.call(request["method"], request["path"], request["json"])
    if name == TRAP and request["path"] == "/update_weights_from_disk":
      # Ours refuses before anything is changed; SGLang has changed the weights by then.
      assert status == 400 and not ours["success"] and "not updated" in ours["message"]
      continue
    assert status == other["status"], ours
    if isinstance(other["response"], str):
      assert ours == other["response"]
    else:
      assert_same_shape(ours, other["response"])
  status, reply = future.result(60)
  assert status == 200
  if stream:
    assert_same_stream(reply, theirs)
    reply = reply[-2]
  else:
    assert_same_shape(reply, theirs)
  assert_consistent(reply)
  meta = reply["meta_info"]
  assert meta["finish_reason"]["type"] == recorded["finish_reason"]["type"]
  assert meta["num_retractions"] == recorded["num_retractions"]
  spans = len(meta["weight_versions"])
  in_flight = name == "update_spanning_stream"  # recorded after the generation had ended
  assert spans == (1 if name == TRAP else len(recorded["weight_versions"]) + in_flight)
  if meta["finish_reason"]["type"] == "length" and not paused_before:
    assert meta["completion_tokens"] == NEW_TOKENS
  restore(client, models)


def generations():
  """(name, body, reply) of every whole recording of sampled ids with their logprobs."""
  found = []
  for name, exchange in EXCHANGES.items():
    body, answer = exchange["request"]["json"], exchange["response"]
    if exchange["request"]["path"] != "/generate" or "input_ids" not in (body or {}):
      continue
    replies = answer if isinstance(answer, list) else [answer]
    if "[DONE]" in replies:
      replies = [] if "incremental" in name else [replies[-2]]
    for index, reply in enumerate(replies):
      if isinstance(reply, dict) and "output_token_logprobs" in reply.get("meta_info", {}):
        several = isinstance(body["input_ids"][0], list)
        prompt = body["input_ids"][index] if several else body["input_ids"]
        sampling = body["sampling_params"]
        found.append((name, prompt, sampling[index] if several else sampling, reply))
  return found


RECORDED = generations()
MODEL_OF_VERSION = {"default": 0, "1": 1, "2": 0, "3": 1, "4": 0, "5": 1, "6": 0, "7": 1}
STALE = {
  ("update_spanning_in_place", "2"),
  ("update_spanning_retract", "2"),
  (TRAP, "5"),
  (TRAP, "6"),
  ("update_abort_all_requests", "6"),
}
"""(recording, version) whose tokens saw keys of earlier weights: their own, or those in SGLang's
prefix cache after an update that did not flush it. No forward pass gives those numbers."""


def logprobs(rows):
  return [row[0] for row in rows]


def test_greedy_recordings_come_out_token_for_token(client):
  greedy = [name for name, _, sampling, _ in RECORDED if sampling.get("temperature") == 0]
  assert len(greedy) >= 3
  for name in greedy:
    status, ours = client.call("POST", "/generate", EXCHANGES[name]["request"]["json"])
    theirs = EXCHANGES[name]["response"]
    assert status == 200 and ours["output_ids"] == theirs["output_ids"]
    assert ours["text"] == theirs["text"]
    mine, recorded = ours["meta_info"], theirs["meta_info"]
    assert mine["finish_reason"] == recorded["finish_reason"]
    for side in ("input", "output"):
      key = f"{side}_token_logprobs"
      assert len(mine[key]) == len(recorded[key])
      for one, other in zip(mine[key], recorded[key], strict=True):
        assert one[1:] == other[1:] and one[0] == pytest.approx(other[0], abs=1e-4)
      for one, other in zip(
        mine.get(f"{side}_top_logprobs", []), recorded.get(f"{side}_top_logprobs", []), strict=True
      ):
        assert (one is None) == (other is None)
        if one is not None:
          assert [row[1] for row in one] == [row[1] for row in other]
          assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-4)


def test_every_recorded_logprob_is_scored_within_1e_4(client, models):
  """Prompt, output and alternatives, under the weights that made each span."""
  by_model = {0: [], 1: []}
  for name, prompt, sampling, reply in RECORDED:
    if sampling.get("temperature", 1.0) not in (0, 1):
      continue
    meta = reply["meta_info"]
    recorded, tops = meta["output_token_logprobs"], meta.get("output_top_logprobs")
    inputs = [p for p, _, _ in meta.get("input_token_logprobs", [])]
    for span in meta["weight_versions"]:
      if (name, span["version"]) in STALE:
        continue
      places = range(span["start"], span["end"])
      expected = {len(prompt) + i: recorded[i][0] for i in places}
      expected |= {i: p for i, p in enumerate(inputs) if p is not None}
      top = {len(prompt) + i: tops[i] for i in places} if tops else {}
      by_model[MODEL_OF_VERSION[span["version"]]].append((name, prompt, reply, expected, top))
  assert sum(len(rows) for rows in by_model.values()) >= 25
  worst, count = 0.0, 0
  for model, rows in by_model.items():
    client.post("/update_weights_from_disk", model_path=str(models[model]))
    futures = [
      client.later(
        (prompt + reply["output_ids"])[:1023],
        sampling={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
      )
      for _, prompt, reply, _, _ in rows
    ]
    for (name, _, _, expected, top), future in zip(rows, futures, strict=True):
      meta = future.result(60)["meta_info"]
      for position, logprob in expected.items():
        worst = max(worst, abs(meta["input_token_logprobs"][position][0] - logprob))
        count += 1
      for position, alternatives in top.items():
        ours = meta["input_top_logprobs"][position][: len(alternatives)]
        assert [row[1] for row in ours] == [row[1] for row in alternatives], name
        assert logprobs(ours) == pytest.approx(logprobs(alternatives), abs=1e-4)
      assert worst < 1e-4, name
  assert count > 2000
  restore(client, models)


def test_logprobs_of_a_temperature_are_scored_within_1e_4(client):
  """At temperature 0.5 with top-p and top-k: of the scaled softmax, before anything is left out."""
  [(_, prompt, sampling, theirs)] = [row for row in RECORDED if row[2].get("temperature") == 0.5]
  ids = theirs["output_ids"]
  recorded = theirs["meta_info"]
  for place in range(len(ids)):
    # The same context, greedy at the recorded place: its alternatives are the recorded ones.
    reply = client.generate(
      prompt + ids[:place],
      sampling=sampling | {"max_new_tokens": 1, "top_k": 1},
      return_logprob=True,
      top_logprobs_num=3,
    )
    [ours] = reply["meta_info"]["output_top_logprobs"]
    expected = recorded["output_top_logprobs"][place]
    assert [row[1] for row in ours] == [row[1] for row in expected]
    assert logprobs(ours) == pytest.approx(logprobs(expected), abs=1e-4)
    [drawn] = reply["meta_info"]["output_token_logprobs"]
    assert drawn[0] == pytest.approx(ours[0][0], abs=1e-6) and drawn[1] == ours[0][1]


def experts_of(reply):
  """[tokens, layers, A], experts of a token in order."""
  flat = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), np.int32)
  return np.sort(flat.reshape(-1, 2, 2), axis=-1)


def test_recorded_experts_are_chosen_again(client):
  """As sets, at every position; the dense layer is zeros."""
  exchange = EXCHANGES["generate_routed_experts"]
  prompt, theirs = exchange["request"]["json"]["input_ids"], exchange["response"]
  reply = client.generate(
    prompt + theirs["output_ids"],
    sampling={"max_new_tokens": 4, "ignore_eos": True},
    return_routed_experts=True,
  )
  ours, recorded = experts_of(reply), experts_of(theirs)
  assert ours.shape == (len(prompt) + 6 + 3, 2, 2) and recorded.shape == (len(prompt) + 5, 2, 2)
  np.testing.assert_array_equal(ours[: len(recorded)], recorded)
  assert not ours[:, 0].any() and ours[:, 1].any()
  rest = client.generate(
    prompt + theirs["output_ids"],
    sampling={"max_new_tokens": 4, "ignore_eos": True, "temperature": 0.0},
    return_routed_experts=True,
    routed_experts_start_len=len(prompt) + 3,
  )
  np.testing.assert_array_equal(experts_of(rest)[:3], ours[len(prompt) + 3 : len(prompt) + 6])
  assert len(experts_of(rest)) == 6
