"""RecordedConversation: what is recorded is exactly what was sent and sampled."""

import asyncio

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.environments.base import ConversationFull
from intellect3.rendering.bytes import ByteRenderer
from intellect3.rollouts.conversation import RecordedConversation, derive_seed
from intellect3.types import NOT_SAMPLED, Generation

RENDERER = ByteRenderer()


def user(text):
  return {"role": "user", "content": text}


class ScriptedPool:
  """Samples what it is told; token t of turn n has logprob -(n + 1) - t / 8 and version n."""

  def __init__(self, *turns):
    self.turns = list(turns)
    self.asked = []

  async def generate(self, prompt_ids, **options):
    turn = len(self.asked)
    self.asked.append({"prompt": list(prompt_ids), **options})
    sampled = self.turns[turn]
    if isinstance(sampled, Exception):
      raise sampled
    await asyncio.sleep(0)
    room = options["max_new_tokens"]
    tokens = np.asarray(sampled[:room], np.int32)
    return Generation(
      tokens=tokens,
      inference_logprobs=-(turn + 1) - np.arange(len(tokens), dtype=np.float32) / 8,
      policy_versions=np.full(len(tokens), turn, np.int32),
      finish_reason="stop" if len(sampled) <= room else "length",
      server=f"http://s{turn % 2}",
    )


def converse(pool, renderer=RENDERER, **options):
  settings = {"seed": 5, "rid": "q", "temperature": 0.5, "max_new_tokens": 8, "max_tokens": 64}
  return RecordedConversation(
    renderer, pool, **{**settings, "affinity": "g", "now": lambda: 12.5, **options}
  )


def test_one_turn_by_hand():
  pool = ScriptedPool([98, 97, 256])
  conversation = converse(pool)
  reply = asyncio.run(conversation.send([user("ab")]))
  assert (reply.content, reply.finish_reason, reply.tool_calls) == ("ba", "stop", ())
  (trajectory,) = conversation.trajectories()
  trajectory.check()
  assert trajectory.tokens.tolist() == [258, 97, 98, 259, 98, 97, 256]
  assert trajectory.loss_mask.tolist() == [False] * 4 + [True] * 3
  assert trajectory.inference_logprobs.tolist() == [0.0] * 4 + [-1.0, -1.125, -1.25]
  assert trajectory.policy_versions.tolist() == [NOT_SAMPLED] * 4 + [0] * 3
  assert trajectory.temperature == 0.5
  (asked,) = pool.asked
  assert asked["prompt"] == [258, 97, 98, 259]
  assert asked["stop_token_ids"] == (256, 258, 260)
  assert (asked["rid"], asked["affinity"], asked["prefer"]) == ("q-0", "g", None)
  assert not conversation.truncated
  assert conversation.servers() == ("http://s0",)
  assert conversation.messages == (user("ab"), {"role": "assistant", "content": "ba"})


def test_turns_extend_one_trajectory_and_nothing_is_encoded_again():
  # Invalid UTF-8: decoding and encoding again would give other tokens.
  pool = ScriptedPool([0xC3, 0xFF, 256], [99, 256])

  async def run():
    conversation = converse(pool)
    await conversation.send([user("a")])
    await conversation.send([user("b")])
    return conversation

  conversation = asyncio.run(run())
  (trajectory,) = conversation.trajectories()
  trajectory.check()
  assert trajectory.tokens.tolist() == [258, 97, 259, 0xC3, 0xFF, 256, 258, 98, 259, 99, 256]
  assert np.flatnonzero(trajectory.loss_mask).tolist() == [3, 4, 5, 9, 10]
  assert trajectory.policy_versions.tolist() == [-1] * 3 + [0] * 3 + [-1] * 3 + [1] * 2
  assert pool.asked[1]["prompt"] == trajectory.tokens[:9].tolist()
  assert [asked["rid"] for asked in pool.asked] == ["q-0", "q-1"]
  assert pool.asked[0]["seed"] != pool.asked[1]["seed"]
  assert conversation.servers() == ("http://s0", "http://s1")


def test_a_turn_cut_for_length_is_closed_by_an_unsampled_token():
  pool = ScriptedPool([97] * 9, [98, 256])

  async def run():
    conversation = converse(pool, max_new_tokens=2)
    first = await conversation.send([user("x")])
    await conversation.send([user("y")])
    return first, conversation

  first, conversation = asyncio.run(run())
  assert first.finish_reason == "length" and conversation.truncated
  (trajectory,) = conversation.trajectories()
  assert trajectory.tokens.tolist() == [258, 120, 259, 97, 97, 256, 258, 121, 259, 98, 256]
  assert not trajectory.loss_mask[5] and trajectory.policy_versions[5] == NOT_SAMPLED


class Rewriting(ByteRenderer):
  """A format that drops something of earlier turns, so that they cannot be extended."""

  def extend(self, messages, *, last_token=None):
    return None


@pytest.mark.parametrize("cause", ["format", "tools"])
def test_a_prompt_that_is_no_extension_begins_a_new_trajectory(cause):
  class WithTools(ByteRenderer):
    def render(self, messages, tools=None):
      return super().render([{"role": "system", "content": "T"} for _ in tools or ()] + [*messages])

  renderer = Rewriting() if cause == "format" else WithTools()
  pool = ScriptedPool([97, 256], [98, 256])

  async def run():
    conversation = converse(pool, renderer)
    await conversation.send([user("x")])
    await conversation.send([user("y")], tools=None if cause == "format" else [{"name": "f"}])
    return conversation

  first, second = asyncio.run(run()).trajectories()
  assert first.tokens.tolist() == [258, 120, 259, 97, 256]
  head = [] if cause == "format" else [257, ord("T")]
  history = [258, 120, 259, 97, 256, 258, 121, 259]
  assert second.tokens.tolist() == [*head, *history, 98, 256]
  assert second.loss_mask.sum() == 2  # the first answer is history here, not trained twice
  first.check()
  second.check()


def test_the_context_bounds_a_turn_and_a_full_one_raises():
  pool = ScriptedPool([97] * 9, [97] * 9)

  async def run():
    conversation = converse(pool, max_tokens=10, max_new_tokens=7)
    reply = await conversation.send([user("abc")], max_new_tokens=6)
    assert pool.asked[0]["max_new_tokens"] == 5
    assert reply.finish_reason == "length" and conversation.truncated
    with pytest.raises(ConversationFull, match="context of 10"):
      await conversation.send([user("d")])
    return conversation

  conversation = asyncio.run(run())
  assert len(pool.asked) == 1
  assert [trajectory.tokens.size for trajectory in conversation.trajectories()] == [10]


def test_an_opening_that_does_not_fit_is_full_and_truncated():
  conversation = converse(ScriptedPool(), max_tokens=4)
  with pytest.raises(ConversationFull):
    asyncio.run(conversation.send([user("abcd")]))
  assert conversation.truncated and conversation.trajectories() == ()


def test_a_turn_may_ask_for_less_but_not_for_more():
  pool = ScriptedPool([97, 256], [97, 256])

  async def run():
    conversation = converse(pool)
    await conversation.send([user("x")], max_new_tokens=3)
    await conversation.send([user("x")], max_new_tokens=99)
    with pytest.raises(ValueError, match="max_new_tokens"):
      await conversation.send([user("x")], max_new_tokens=0)

  asyncio.run(run())
  assert [asked["max_new_tokens"] for asked in pool.asked] == [3, 8]


def test_a_failed_turn_leaves_the_conversation_as_it_was():
  pool = ScriptedPool(OSError("gone"), [97, 256])

  async def run():
    conversation = converse(pool)
    with pytest.raises(OSError, match="gone"):
      await conversation.send([user("x")])
    assert conversation.trajectories() == () and conversation.messages == ()
    await conversation.send([user("y")])
    return conversation

  (trajectory,) = asyncio.run(run()).trajectories()
  assert trajectory.tokens.tolist() == [258, 121, 259, 97, 256]


def test_one_turn_at_a_time():
  conversation = converse(ScriptedPool([97, 256], [97, 256]))

  async def run():
    return await asyncio.gather(
      conversation.send([user("x")]), conversation.send([user("y")]), return_exceptions=True
    )

  _, second = asyncio.run(run())
  assert isinstance(second, RuntimeError)
  assert len(conversation.trajectories()) == 1


def test_effects_are_recorded_by_call_path():
  conversation = converse(ScriptedPool())

  async def run():
    async def fails():
      raise OSError("sandbox gone")

    async def works():
      return 7

    with pytest.raises(OSError, match="sandbox"):
      await conversation.effect("run", fails)
    assert await conversation.effect("run", works) == 7
    assert await conversation.effect("judge", works) == 7

  asyncio.run(run())
  assert [(effect.path, effect.result) for effect in conversation.effects] == [
    ("run#1", 7),
    ("judge#0", 7),
  ]


def test_randomness_seeds_and_time_are_given_from_outside():
  def draws(seed):
    pool = ScriptedPool([97, 256])
    conversation = converse(pool, seed=seed)
    asyncio.run(conversation.send([user("x")]))
    return conversation.random.random(), pool.asked[0]["seed"]

  assert draws(5) == draws(5)
  assert all(a != b for a, b in zip(draws(5), draws(6), strict=True))
  assert 0 <= draws(5)[1] < 2**31
  assert converse(ScriptedPool()).now() == 12.5


def test_greedy_sampling_is_recorded_at_the_temperature_of_its_logprobs():
  conversation = converse(ScriptedPool([97, 256]), temperature=0.0)
  asyncio.run(conversation.send([user("x")]))
  assert conversation.trajectories()[0].temperature == 1.0


def test_derived_seeds_tell_their_parts_apart():
  assert derive_seed(1, "turn", 2) == derive_seed(1, "turn", 2)
  assert len({derive_seed(a, b) for a in range(40) for b in range(40)}) == 1600
  assert derive_seed(1, 23) != derive_seed(12, 3) and derive_seed("1") != derive_seed(1)


@pytest.mark.parametrize(
  ("field", "value"), [("max_new_tokens", 0), ("max_tokens", 0), ("temperature", -1.0)]
)
def test_bad_settings_are_named(field, value):
  with pytest.raises(ValueError, match=field):
    converse(ScriptedPool(), **{field: value})


_TOKENS = st.lists(st.integers(0, 263), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), _TOKENS), min_size=1, max_size=5))
def test_what_is_recorded_is_what_was_sent_and_sampled(turns):
  pool = ScriptedPool(*(tokens for _, tokens in turns))

  async def run():
    conversation = converse(pool, max_tokens=1000, max_new_tokens=4)
    for text, _ in turns:
      await conversation.send([user(text)])
    return conversation

  (trajectory,) = asyncio.run(run()).trajectories()
  trajectory.check()
  sampled = [token for _, tokens in turns for token in tokens[:4]]
  assert trajectory.tokens[trajectory.loss_mask].tolist() == sampled
  for asked in pool.asked:  # every prompt is a prefix of the trajectory
    assert trajectory.tokens[: len(asked["prompt"])].tolist() == asked["prompt"]
  assert np.all((trajectory.policy_versions >= 0) == trajectory.loss_mask)


def test_turns_join_their_routed_experts():
  """The second turn brings those of the sampled token that the first left, and what follows."""

  class Telling(ScriptedPool):
    async def generate(self, prompt_ids, **options):
      generation = await super().generate(prompt_ids, **options)
      first = options["known_tokens"]
      positions = np.arange(first, len(prompt_ids) + len(generation.tokens) - 1)
      return msgspec.structs.replace(
        generation, routed_experts=positions.astype(np.uint8).reshape(-1, 1, 1)
      )

  async def run():
    conversation = converse(Telling([98, 256], [99, 256], [97, 256]))
    await conversation.send([user("ab")])
    await conversation.send([user("cd")])
    await conversation.send([user("ef")], tools=[])
    return conversation

  extended, begun_anew = asyncio.run(run()).trajectories()
  for trajectory in (extended, begun_anew):
    trajectory.check()
    length = len(trajectory.tokens)
    assert trajectory.routed_experts[:, 0, 0].tolist() == list(range(length - 1))
