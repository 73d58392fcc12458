"""`/generate` as both servers answer it: finish reasons, stops, logprobs, n, batches, streams."""

import itertools
import json

import numpy as np
import pytest

from intellect3.inference.protocol import ProtocolError, parse_version
from tests.real_sglang import checkpoints
from tests.real_sglang.remote import CONTEXT, PROMPT

GREEDY = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


def rows(reply, name="output_token_logprobs"):
  """The logprobs of a reply, and the ids that they are of."""
  listed = reply["meta_info"][name]
  return np.array([row[0] for row in listed], np.float64), [row[1] for row in listed]


def greedy_tokens(params, prompt, count):
  """What the trainer's model says: the likeliest token, again and again."""
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(int(np.argmax(checkpoints.trainer_logits(params, tokens)[-1])))
  return tokens[len(prompt) :]


def test_greedy_tokens_are_the_trainers(server):
  reply = server.generate(PROMPT, sampling=GREEDY, return_logprob=True, rid="greedy")
  assert reply["output_ids"] == greedy_tokens(server.first.params, PROMPT, 12)
  meta = reply["meta_info"]
  assert meta["id"] == "greedy"
  assert meta["finish_reason"] == {"type": "length", "length": 12}
  assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(PROMPT), 12)
  assert meta["weight_version"] == "0"
  assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 12}]
  logprobs, ids = rows(reply)
  assert ids == reply["output_ids"]
  expected = checkpoints.trainer_logprobs(server.first.params, [*PROMPT, *ids])[len(PROMPT) - 1 :]
  np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_a_prompt_alone_is_scored(server):
  ids = list(PROMPT) * 3
  reply = server.generate(
    ids, sampling={"max_new_tokens": 0, "temperature": 0}, return_logprob=True, logprob_start_len=0
  )
  assert reply["output_ids"] == []
  listed = reply["meta_info"]["input_token_logprobs"]
  assert [row[1] for row in listed] == ids and listed[0][0] is None
  scored = np.array([row[0] for row in listed[1:]])
  np.testing.assert_allclose(
    scored, checkpoints.trainer_logprobs(server.first.params, ids), atol=1e-4
  )


def test_top_logprobs_are_the_largest(server):
  reply = server.generate(PROMPT, sampling=GREEDY, return_logprob=True, top_logprobs_num=3)
  logits_TV = checkpoints.trainer_logits(server.first.params, [*PROMPT, *reply["output_ids"]])
  logits_TV = logits_TV[len(PROMPT) - 1 : -1]
  scores_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), axis=1, keepdims=True))
  top = reply["meta_info"]["output_top_logprobs"]
  assert len(top) == 12
  for scores_V, listed in zip(scores_TV, top, strict=True):
    assert [row[1] for row in listed] == np.argsort(-scores_V)[:3].tolist()
    np.testing.assert_allclose([row[0] for row in listed], np.sort(scores_V)[::-1][:3], atol=1e-4)


def test_a_stop_token_ends_and_is_part_of_the_ids(server):
  said = greedy_tokens(server.first.params, PROMPT, 12)
  stop = said[5]
  sampling = {"max_new_tokens": 12, "temperature": 0, "stop_token_ids": [stop]}
  reply = server.generate(PROMPT, sampling=sampling)
  assert reply["output_ids"] == said[: said.index(stop) + 1]
  assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_stop_string_ends_and_is_trimmed_from_the_text(server):
  server.run(lambda opened: opened.restore(server.scripted, 0))
  sampling = {"max_new_tokens": 40, "temperature": 0, "skip_special_tokens": False}
  whole = server.generate([65], sampling=sampling)
  assert whole["text"].startswith("<think>Let me look.</think>")
  cut = server.generate([65], sampling={**sampling, "stop": ["look"]})
  assert cut["text"] == "<think>Let me "
  assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": "look"}
  assert cut["output_ids"] == whole["output_ids"][:2]
  kept = server.generate([65], sampling={**sampling, "stop": "look", "no_stop_trim": True})
  assert kept["text"] == "<think>Let me look"


def test_text_prompts_are_the_ids_of_their_bytes(server):
  text = server.post("/generate", text="Hello wo", sampling_params=GREEDY)
  assert text[0] == 200
  assert text[1]["meta_info"]["prompt_tokens"] == len(PROMPT)
  assert text[1]["output_ids"] == server.generate(PROMPT, sampling=GREEDY)["output_ids"]


def test_several_samples_of_one_prompt(server):
  replies = server.generate(
    PROMPT, sampling={"max_new_tokens": 8, "n": 3, "ignore_eos": True}, return_logprob=True
  )
  assert len(replies) == 3
  assert len({reply["meta_info"]["id"] for reply in replies}) == 3
  assert len({tuple(reply["output_ids"]) for reply in replies}) > 1
  for reply in replies:
    logprobs, ids = rows(reply)
    expected = checkpoints.trainer_logprobs(server.first.params, [*PROMPT, *ids])[-8:]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_several_prompts_answered_in_their_order(server):
  prompts = [list(PROMPT), [65, 66], [90] * 40]
  params = [{**GREEDY, "max_new_tokens": count} for count in (3, 1, 2)]
  status, replies = server.post(
    "/generate", input_ids=prompts, sampling_params=params, rid=["a", "b", "c"]
  )
  assert status == 200
  assert [reply["meta_info"]["id"] for reply in replies] == ["a", "b", "c"]
  assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [8, 2, 40]
  for prompt, reply, sampling in zip(prompts, replies, params, strict=True):
    count = sampling["max_new_tokens"]
    assert reply["output_ids"] == greedy_tokens(server.first.params, prompt, count)


def test_a_stream_grows_to_the_whole_answer(server):
  async def collect(opened):
    body = {"input_ids": list(PROMPT), "sampling_params": GREEDY, "return_logprob": True}
    return [event async for event in opened.stream("/generate", body)]

  events = server.run(collect)
  whole = server.generate(PROMPT, sampling=GREEDY, return_logprob=True)
  assert len(events) > 1
  for before, after in itertools.pairwise(events):
    assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
    assert len(after["output_ids"]) > len(before["output_ids"])
    assert after["text"].startswith(before["text"])
    assert before["meta_info"]["finish_reason"] is None
    assert "weight_versions" not in before["meta_info"]
  last = events[-1]
  assert (last["output_ids"], last["text"]) == (whole["output_ids"], whole["text"])
  assert last["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
  assert last["meta_info"]["weight_versions"] == whole["meta_info"]["weight_versions"]
  np.testing.assert_allclose(rows(last)[0], rows(whole)[0], atol=1e-5)


def test_streams_of_several_samples_tell_them_apart_by_index(server):
  async def collect(opened):
    body = {"input_ids": list(PROMPT), "sampling_params": {**GREEDY, "n": 2, "temperature": 1}}
    return [event async for event in opened.stream("/generate", body)]

  events = server.run(collect)
  for index in (0, 1):
    own = [event for event in events if event["index"] == index]
    assert len({event["meta_info"]["id"] for event in own}) == 1
    assert own[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    assert len(own[-1]["output_ids"]) == 12


@pytest.mark.parametrize(
  ("sampling", "named"),
  [({"bogus": 1}, "bogus"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p")],
)
def test_bad_sampling_parameters_are_refused_by_name(server, sampling, named):
  status, answer = server.post("/generate", input_ids=list(PROMPT), sampling_params=sampling)
  assert status == 400 and named in json.dumps(answer)


def test_an_unknown_field_is_ignored(server):
  reply = server.generate(PROMPT, sampling=GREEDY, bogus=2)
  assert len(reply["output_ids"]) == 12


def test_what_does_not_fit_the_context_is_refused(server):
  status, answer = server.post("/generate", input_ids=[65] * (CONTEXT + 1), sampling_params={})
  assert status == 400 and "error" in answer


def test_penalties_change_the_logits_that_the_logprobs_are_of(server):
  plain = server.generate(PROMPT, sampling=GREEDY)["output_ids"]
  sampling = {**GREEDY, "frequency_penalty": 1.5, "presence_penalty": 0.5}
  reply = server.generate(PROMPT, sampling=sampling, return_logprob=True)
  logprobs, ids = rows(reply)
  tokens = list(PROMPT)
  counts_V = np.zeros(checkpoints.VOCAB_SIZE)
  for position, token in enumerate(ids):
    logits_V = checkpoints.trainer_logits(server.first.params, tokens)[-1].astype(np.float64)
    logits_V -= 1.5 * counts_V + 0.5 * (counts_V > 0)
    assert token == int(np.argmax(logits_V))
    np.testing.assert_allclose(
      logprobs[position], logits_V[token] - np.log(np.sum(np.exp(logits_V))), atol=1e-4
    )
    counts_V[token] += 1
    tokens.append(token)
  assert ids[0] == plain[0]


def held_back(params, stops, least):
  """Greedy ids while stop tokens are banned from the first `least`, with their logprobs.

  Also the id that would have come last among these without the ban.
  """
  banned = [*stops, *checkpoints.STOPS]
  tokens, logprobs, tempting = list(PROMPT), [], None
  while not logprobs or tokens[-1] not in banned:
    logits_V = checkpoints.trainer_logits(params, tokens)[-1].astype(np.float64)
    if len(logprobs) < least:
      tempting = int(np.argmax(logits_V))
      logits_V[banned] = -np.inf
    tokens.append(int(np.argmax(logits_V)))
    logprobs.append(logits_V[tokens[-1]] - np.log(np.sum(np.exp(logits_V))))
    if len(logprobs) == 20:
      break
  return tokens[len(PROMPT) :], logprobs, tempting


def test_minimum_of_new_tokens_holds_stop_tokens_back(server):
  stops = greedy_tokens(server.first.params, PROMPT, 1)
  while (expected := held_back(server.first.params, stops, 6))[2] not in stops:
    stops.append(expected[2])  # until the sixth token, too, is one that had to be held back
  sampling = {"temperature": 0, "max_new_tokens": 20, "stop_token_ids": stops}
  assert server.generate(PROMPT, sampling=sampling)["output_ids"] == stops[:1]
  reply = server.generate(PROMPT, sampling={**sampling, "min_new_tokens": 6}, return_logprob=True)
  logprobs, ids = rows(reply)
  assert ids == expected[0] and len(ids) >= 6
  np.testing.assert_allclose(logprobs, expected[1], atol=1e-4)


def test_what_the_server_says_of_itself(server):
  status, info = server.get("/model_info")
  assert status == 200 and info["weight_version"] == "0"
  assert info["model_path"] == str(server.first.directory)
  status, models = server.get("/v1/models")
  assert status == 200 and models["object"] == "list" and len(models["data"]) == 1
  assert models["data"][0]["max_model_len"] == CONTEXT
  assert server.get("/health")[0] == 200
  status, about = server.get("/server_info")
  assert status == 200 and about["context_length"] == CONTEXT
  with pytest.raises(ProtocolError):
    parse_version("default")


def test_completions_take_and_give_ids(server):
  status, reply = server.post(
    "/v1/completions",
    model="any",
    prompt=list(PROMPT),
    max_tokens=5,
    temperature=0,
    ignore_eos=True,
    return_token_ids=True,
    logprobs=1,
  )
  assert status == 200, reply
  (choice,) = reply["choices"]
  assert choice["prompt_token_ids"] == list(PROMPT)
  assert choice["token_ids"] == greedy_tokens(server.first.params, PROMPT, 5)
  assert choice["finish_reason"] == "length"
  assert reply["usage"]["completion_tokens"] == 5
  expected = checkpoints.trainer_logprobs(server.first.params, [*PROMPT, *choice["token_ids"]])[-5:]
  np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], expected, atol=1e-4)
