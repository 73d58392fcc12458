"""Pauses, aborts and continuations amid a generation, and what is left of it afterwards."""

import asyncio

import numpy as np
import pytest

from tests.real_sglang import checkpoints
from tests.real_sglang.remote import LONG, PROMPT


def agree(server, reply, *, count=300):
  """The first tokens' logprobs are those of the trainer's forward over prompt and output."""
  tokens = [*PROMPT, *reply["output_ids"]][: len(PROMPT) + count]
  expected = checkpoints.trainer_logprobs(server.first.params, tokens)[len(PROMPT) - 1 :]
  listed = reply["meta_info"]["output_token_logprobs"][: len(expected)]
  assert [row[1] for row in listed] == tokens[len(PROMPT) :]
  np.testing.assert_allclose([row[0] for row in listed], expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_stops_and_continue_goes_on(server, mode):
  async def scenario(opened):
    other = opened.later(
      PROMPT, sampling={"max_new_tokens": LONG, "ignore_eos": True}, return_logprob=True
    )

    async def pause():
      assert (await opened.control.pause(mode))[opened.url].ok
      late = opened.later(PROMPT, sampling={"max_new_tokens": 2, "ignore_eos": True})
      await asyncio.sleep(0.3)
      waiting = not late.done() and not other.done()
      assert (await opened.control.model_info())[opened.url].ok  # answers while paused
      assert (await opened.control.resume())[opened.url].ok
      return waiting, await late

    last, (waiting, late) = await opened.amid(pause)
    return last, waiting, late, await other

  last, waiting, late, other = server.run(scenario)
  assert waiting
  assert len(late["output_ids"]) == 2
  for reply in (last, other):
    assert len(reply["output_ids"]) == LONG
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": LONG}
    assert reply["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": LONG}]
    agree(server, reply)


def test_a_pause_that_aborts_gives_what_there_is(server):
  async def scenario(opened):
    other = opened.later(
      PROMPT, sampling={"max_new_tokens": LONG, "ignore_eos": True}, return_logprob=True
    )

    async def pause():
      assert (await opened.control.pause("abort"))[opened.url].ok
      assert (await opened.control.resume())[opened.url].ok

    last, _ = await opened.amid(pause)
    return last, await other

  last, other = server.run(scenario)
  for reply in (last, other):
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(reply["output_ids"]) < LONG
  assert 3 <= len(last["output_ids"]) == last["meta_info"]["completion_tokens"]
  agree(server, last)


def test_an_abort_by_id_ends_that_request_alone(server):
  async def scenario(opened):
    other = opened.later(
      PROMPT,
      rid="spared",
      sampling={"max_new_tokens": LONG, "ignore_eos": True},
      return_logprob=True,
    )

    async def abort():
      return await opened.post("/abort_request", rid="chosen")

    last, answer = await opened.amid(abort, rid="chosen")
    return last, answer, await other

  last, (status, _), other = server.run(scenario)
  assert status == 200
  assert last["meta_info"]["finish_reason"]["type"] == "abort"
  assert 3 <= len(last["output_ids"]) < LONG
  assert len(last["meta_info"]["output_token_logprobs"]) == len(last["output_ids"])
  assert len(other["output_ids"]) == LONG
  agree(server, last)
  agree(server, other)


def test_an_abort_of_all_ends_all(server):
  async def scenario(opened):
    others = [
      opened.later(PROMPT, sampling={"max_new_tokens": LONG, "ignore_eos": True}) for _ in range(3)
    ]

    async def abort():
      return await opened.post("/abort_request", abort_all=True)

    last, _ = await opened.amid(abort)
    return [last, *await asyncio.gather(*others)]

  for reply in server.run(scenario):
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(reply["output_ids"]) < LONG


def test_an_abort_of_nobody_is_fine(server):
  assert server.post("/abort_request", rid="nobody")[0] == 200


def test_the_pool_goes_on_from_the_tokens_of_an_aborted_generation(server):
  async def scenario(opened):
    task = asyncio.create_task(
      opened.pool.generate(
        PROMPT,
        max_new_tokens=LONG,
        temperature=1.0,
        stop_token_ids=[],
        seed=5,
        rid="cut",
      )
    )

    async def abort():
      return await opened.post("/abort_request", abort_all=True)

    await opened.amid(abort)
    return await task, opened.pool.continued

  generation, continued = server.run(scenario)
  assert continued == 1
  assert generation.finish_reason in ("length", "stop")
  assert generation.policy_versions.tolist() == [0] * len(generation.tokens)
  tokens = [*PROMPT, *generation.tokens.tolist()][: checkpoints.LENGTH]
  expected = checkpoints.trainer_logprobs(server.first.params, tokens)[len(PROMPT) - 1 :]
  np.testing.assert_allclose(
    generation.inference_logprobs[: len(expected)], expected, rtol=0, atol=1e-4
  )


def test_generations_aborted_in_the_queue_are_asked_for_again(server):
  """More at once than either server runs: some were never begun when the abort came."""
  count = 100

  async def scenario(opened):
    tasks = [
      asyncio.create_task(
        opened.pool.generate(
          PROMPT,
          max_new_tokens=40,
          temperature=1.0,
          stop_token_ids=[],
          seed=number,
          rid=f"queued-{number}",
        )
      )
      for number in range(count)
    ]

    async def abort():
      return await opened.post("/abort_request", abort_all=True)

    await opened.amid(abort, tokens=1)
    return await asyncio.gather(*tasks), opened.pool.continued

  generations, continued = server.run(scenario)
  assert continued > 0
  for generation in generations:
    assert generation.finish_reason == "stop" or len(generation.tokens) == 40
