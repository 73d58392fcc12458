"""Hostile replies over real HTTP: each is an error of its rollout, none reaches a trajectory."""

import asyncio
import copy
import json

import numpy as np
import pytest
from fake_servers import VOCAB
from fault_proxy import FaultProxy, answer
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.environments.reverse_text import ReverseText
from intellect3.inference.client import ServerPool
from intellect3.inference.transport import HttpTransport
from intellect3.rendering.bytes import ByteRenderer
from intellect3.rollouts import messages
from intellect3.rollouts.conversation import RecordedConversation
from intellect3.rollouts.worker import Worker

NEW_TOKENS = 6


class Bench:
  """A worker whose only server is behind the proxy; one loop for the module."""

  def __init__(self, tmp_path):
    self.loop = asyncio.new_event_loop()
    self.proxy = FaultProxy()
    self.loop.run_until_complete(self.proxy.__aenter__())
    self.transport = HttpTransport(max_answer_bytes=100_000)
    self.pool = ServerPool(
      self.transport,
      [self.proxy.url],
      vocab_size=VOCAB,
      retries=1,
      backoff_seconds=0.0,
      timeout_seconds=0.3,
      grace_seconds=0.1,
    )
    self.sent = asyncio.Queue()
    self.numbers = iter(range(1, 1_000_000))
    self.worker = Worker(
      "worker",
      environments={"reverse_text": ReverseText()},
      make_conversation=self._conversation,
      pool=self.pool,
      send=self.sent.put_nowait,
      log_dir=tmp_path,
      release=self.transport.close,
    )

  def _conversation(self, dispatch, journal):
    return RecordedConversation(
      ByteRenderer(),
      self.pool,
      seed=dispatch.seed,
      rid=f"r{dispatch.rollout_id}",
      temperature=1.0,
      max_new_tokens=NEW_TOKENS,
      max_tokens=64,
    )

  def rollout(self, spoil):
    """One rollout against what `spoil` makes of the honest replies: its summary and its rollout."""
    self.proxy.spoil = spoil
    number = next(self.numbers)
    dispatch = messages.Dispatch(
      rollout_id=number,
      group_id=number,
      sample=0,
      environment="reverse_text",
      split="train",
      index=number % 50,
      seed=number,
      temperature=1.0,
    )

    async def run():
      self.worker.handle(dispatch)
      async with asyncio.timeout(10.0):
        return await self.sent.get()

    summary = self.loop.run_until_complete(run())
    assert set(self.pool.in_flight.values()) == {0}
    return summary, self.worker._finished.pop(number, None)

  def close(self):
    self.loop.run_until_complete(self.worker.close())
    self.loop.run_until_complete(self.proxy.__aexit__())
    self.loop.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  made = Bench(tmp_path_factory.mktemp("log"))
  yield made
  made.close()


def edited(edit):
  """Spoils by changing the reply in place."""

  def spoil(reply):
    edit(reply, reply["meta_info"])
    return reply

  return spoil


def raw(make):
  """Spoils by writing bytes of its own: `make(honest body) -> coroutine function of a writer`."""
  return lambda reply: make(json.dumps(reply).encode())


def writes(data):
  async def write(writer):
    writer.write(data)

  return write


def drips(body):
  async def write(writer):
    writer.write(answer(b"", length=len(body)))
    for position in range(len(body)):
      writer.write(body[position : position + 1])
      await writer.drain()
      await asyncio.sleep(0.01)

  return write


def floods(body):
  async def write(writer):
    writer.write(answer(b"", length=10**12))
    while True:
      writer.write(b" " * 65536)
      await writer.drain()

  return write


def number_in_text(reply, text):
  """The reply as text, with its first logprob replaced by something JSON has no value for."""
  mark = 12345.5
  reply["meta_info"]["output_token_logprobs"][0][0] = mark
  return json.dumps(reply).replace(str(mark), text).encode()


def both_ids(reply, meta, token):
  reply["output_ids"][2] = meta["output_token_logprobs"][2][1] = token


HOSTILE = {
  "fewer ids": edited(lambda reply, meta: reply["output_ids"].pop()),
  "more ids": edited(lambda reply, meta: reply["output_ids"].append(7)),
  "fewer logprobs": edited(lambda reply, meta: meta["output_token_logprobs"].pop()),
  "another count": edited(lambda reply, meta: meta.update(completion_tokens=5)),
  "another prompt": edited(lambda reply, meta: meta.update(prompt_tokens=1)),
  "another request": edited(lambda reply, meta: meta.update(id="r0")),
  "id outside": edited(lambda reply, meta: both_ids(reply, meta, VOCAB)),
  "negative id": edited(lambda reply, meta: both_ids(reply, meta, -1)),
  "id of float": edited(lambda reply, meta: reply["output_ids"].__setitem__(2, 1.5)),
  "ids and logprobs differ": edited(
    lambda reply, meta: meta["output_token_logprobs"][2].__setitem__(1, 250)
  ),
  "positive logprob": edited(
    lambda reply, meta: meta["output_token_logprobs"][2].__setitem__(0, 0.5)
  ),
  "no logprob": edited(lambda reply, meta: meta["output_token_logprobs"][2].__setitem__(0, None)),
  "enormous logprob": edited(
    lambda reply, meta: meta["output_token_logprobs"][2].__setitem__(0, -1e300)
  ),
  "NaN": lambda reply: number_in_text(reply, "NaN"),
  "infinity": lambda reply: number_in_text(reply, "-Infinity"),
  "overflow": lambda reply: number_in_text(reply, "-1e999"),
  "no versions": edited(lambda reply, meta: meta.update(weight_versions=[])),
  "gap in versions": edited(lambda reply, meta: meta["weight_versions"][0].update(start=1)),
  "version of text": edited(lambda reply, meta: meta["weight_versions"][0].update(version="x")),
  "stop without a token": edited(
    lambda reply, meta: (
      reply.update(output_ids=[]),
      meta.update(
        completion_tokens=0,
        output_token_logprobs=[],
        weight_versions=[],
        finish_reason={"type": "stop"},
      ),
    )
  ),
  "unknown end": edited(lambda reply, meta: meta.update(finish_reason={"type": "tired"})),
  "no meta": edited(lambda reply, meta: reply.pop("meta_info")),
  "a list": lambda reply: [reply],
  "nothing": lambda reply: b"",
  "truncated JSON": lambda reply: json.dumps(reply).encode()[:-40],
  "not UTF-8": lambda reply: b'{"output_ids": "\xff\xfe"}',
  "deeply nested": lambda reply: b"[" * 50_000,
  "cut connection": raw(lambda body: writes(answer(body[:-30], length=len(body)))),
  "no HTTP": raw(lambda body: writes(b"\x00\xff" * 20)),
  "closed": raw(lambda body: writes(b"")),
  "redirected": raw(
    lambda body: writes(
      answer(b"", status=b"302 Found", headers=b"Location: http://127.0.0.1:9/generate\r\n")
    )
  ),
  "500": raw(lambda body: writes(answer(body, status=b"500 Oops"))),
  "204": raw(lambda body: writes(answer(b"", status=b"204 No Content"))),
  "slow drip": raw(drips),
  "huge": raw(floods),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_an_error_of_its_rollout(bench, name):
  summary, held = bench.rollout(HOSTILE[name])
  assert summary.error is not None and summary.reward is None and held is None
  # And of no other.
  summary, held = bench.rollout(lambda reply: reply)
  assert summary.error is None and held is not None


def check_sound(rollout):
  for trajectory in rollout.trajectories:
    trajectory.check()
    assert np.all((trajectory.tokens >= 0) & (trajectory.tokens < VOCAB))
    assert np.all(trajectory.inference_logprobs <= 1e-3)
    assert trajectory.loss_mask.sum() <= NEW_TOKENS


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=6,
)


def places(value, path=()):
  """Every place in a JSON value."""
  yield path
  if isinstance(value, dict):
    items = list(value.items())
  else:
    items = list(enumerate(value)) if isinstance(value, list) else []
  for key, item in items:
    yield from places(item, (*path, key))


def put(value, path, new):
  value = copy.deepcopy(value)
  if not path:
    return new
  node = value
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = new
  return value


@settings(max_examples=150, deadline=None)
@given(where=st.integers(0, 200), new=JSON)
def test_whatever_is_put_anywhere_is_an_error_or_sound(bench, where, new):
  def spoil(reply):
    paths = list(places(reply))
    return put(reply, paths[where % len(paths)], new)

  summary, held = bench.rollout(spoil)
  assert (summary.error is None) == (summary.reward is not None) == (held is not None)
  if held is not None:
    check_sound(held)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=8), declared=st.booleans())
def test_a_body_cut_or_spoiled_anywhere_is_an_error_or_sound(bench, cut, noise, declared):
  def spoil(reply):
    body = json.dumps(reply).encode()
    spoiled = body[:cut] + noise + body[cut + len(noise) :]
    return raw(lambda _: writes(answer(spoiled[: cut + 200], length=len(body))))(reply)

  def spoil_inside(reply):
    body = json.dumps(reply).encode()
    return body[:cut] + noise + body[cut + len(noise) :]

  summary, held = bench.rollout(spoil if declared else spoil_inside)
  assert (summary.error is None) == (held is not None)
  if held is not None:
    check_sound(held)
