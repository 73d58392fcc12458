"""The journal: a rollout that is killed anywhere, any number of times, ends as if it never was."""

import asyncio
import dataclasses
import errno
import os
import pathlib
import tempfile

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3 import types
from intellect3.rendering.bytes import ByteRenderer
from intellect3.rollouts import journal, messages
from intellect3.rollouts.conversation import RecordedConversation, derive_seed
from intellect3.simulation import clock

RENDERER = ByteRenderer()
SEGMENT = 3
DISPATCH = messages.Dispatch(
  rollout_id=7,
  group_id=3,
  sample=1,
  environment="words",
  split="train",
  index=2,
  seed=11,
  temperature=1.0,
)


async def at_once(act, *arguments):
  return act(*arguments)


def store(directory, *, seconds=0.0, act=at_once, told=None):
  failed = (told if told is not None else []).append
  return journal.Store(directory, seconds=seconds, failed=failed, act=act)


def again(attempt=1, **changes):
  return msgspec.structs.replace(DISPATCH, attempt=attempt, **changes)


@dataclasses.dataclass
class Policy:
  """Samples a second a segment; a token follows from the turn's seed and its place alone."""

  segments: int = 0
  version: int = 0

  async def generate(self, prompt_ids, *, max_new_tokens, seed, so_far, progress, **options):
    pieces = [] if so_far is None else [so_far]
    made = sum(piece.tokens.size for piece in pieces)
    while made < max_new_tokens:
      await asyncio.sleep(1.0)
      self.segments += 1
      places = np.arange(made, min(made + SEGMENT, max_new_tokens))
      tokens = np.array([derive_seed(seed, int(place)) % 26 + 97 for place in places], np.int32)
      reason = "length"
      if (stops := np.flatnonzero(tokens % 9 == 0)).size:
        tokens, reason = tokens[: stops[0] + 1], "stop"
        tokens[-1] = 256
      pieces.append(piece := self._piece(tokens, reason, seed))
      progress(piece)
      made += tokens.size
      if reason == "stop":
        return types.joined(pieces, "stop", 2)
    return types.joined(pieces, "length", 2)

  def _piece(self, tokens, reason, seed):
    experts = np.broadcast_to((tokens % 8).astype(np.uint8)[:, None, None], (tokens.size, 2, 1))
    return types.Generation(
      tokens=tokens,
      inference_logprobs=-(tokens.astype(np.float32)) / 7,
      policy_versions=np.full(tokens.size, self.version, np.int32),
      finish_reason=reason,
      server=f"http://s{seed % 2}",
      routed_experts=experts,
    )


class Attempt:
  """An environment's coroutine: turns, effects one by one and at once, randomness and time."""

  def __init__(self):
    self.done = []

  async def run(self, talk):
    began = talk.now()
    said = [await talk.send([{"role": "user", "content": "ab"}])]
    for _ in range(talk.random.randrange(1, 3)):
      found = await talk.effect("search", lambda: self._effect("search", 0.5, {"hits": [1, 2.5]}))
      both = await asyncio.gather(
        talk.effect("tool", lambda: self._effect("tool", 0.7, "x")),
        talk.effect("tool", lambda: self._effect("tool", 0.2, b"y")),
      )
      said.append(await talk.send([{"role": "user", "content": f"{found['hits']}{both[0]}"}]))
    lasted = talk.now() - began
    return [reply.content for reply in said], talk.random.random(), both, lasted > 0

  async def _effect(self, name, seconds, result):
    await asyncio.sleep(seconds)
    self.done.append(name)
    return result


def talk_to(policy, kept):
  return RecordedConversation(
    RENDERER,
    policy,
    seed=DISPATCH.seed,
    rid="train-7",
    temperature=1.0,
    max_new_tokens=12,
    max_tokens=100,
    journal=kept,
  )


def lives(directory, deaths, seconds=0.0):
  """Runs the attempt, killed after each of these seconds of its lives; what came of it."""
  policy, attempt, told = Policy(), Attempt(), []

  async def live(number, death):
    policy.version = number
    here = store(directory, seconds=seconds, told=told)
    talk = talk_to(policy, await here.open(again(number)))
    task = asyncio.ensure_future(attempt.run(talk))
    await asyncio.wait([task], timeout=death)
    if task.done():
      here.drop(DISPATCH.rollout_id)
      await asyncio.sleep(0.1)
      return task.result(), talk
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await here.close()
    return None

  for number, death in enumerate([*deaths, None]):
    if (ended := clock.run(live(number, death))) is not None:  # each has a clock of its own
      break
  assert told == []
  return *ended, policy, attempt


def same_tokens(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right, strict=True):
    for field in ("tokens", "loss_mask", "inference_logprobs", "routed_experts"):
      np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 14.0), max_size=5))
def test_a_rollout_that_is_killed_at_any_moments_ends_as_one_that_was_not(deaths):
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    whole, plain, unbroken, once = lives(directory / "plain", [])
    broken, talk, policy, attempt = lives(directory / "broken", deaths)
    assert broken == whole
    same_tokens(talk.trajectories(), plain.trajectories())
    assert talk.reprefilled_tokens == plain.reprefilled_tokens
    versions = np.concatenate([one.policy_versions for one in talk.trajectories()])
    sampled = versions[versions >= 0]
    assert np.all(np.diff(sampled) >= 0)  # each token kept the version that it was sampled with
    # A death costs at most the segment and the effects that were under way.
    assert policy.segments <= unbroken.segments + len(deaths)
    assert len(attempt.done) <= len(once.done) + 2 * len(deaths)
    assert talk.servers() == plain.servers()
    assert not any((directory / "broken").glob("*"))  # nothing is left of what is over


def test_a_rollout_that_is_over_soon_never_touches_the_disk(tmp_path):
  def never(act, *arguments):
    raise AssertionError(f"{act.__name__} {arguments}")

  async def main():
    here = store(tmp_path / "none", seconds=100.0, act=never)
    talk = talk_to(Policy(), await here.open(DISPATCH))
    await talk.send([{"role": "user", "content": "ab"}])
    here.drop(DISPATCH.rollout_id)
    await asyncio.sleep(1000.0)

  clock.run(main())
  assert not (tmp_path / "none").exists()


def test_an_effect_is_on_disk_before_its_rollout_goes_on_and_tokens_soon_after(tmp_path):
  async def main():
    here = store(tmp_path, seconds=5.0)
    talk = talk_to(Policy(), await here.open(DISPATCH))
    await talk.send([{"role": "user", "content": "ab"}])
    assert not list(tmp_path.iterdir())
    await talk.effect("buy", lambda: asyncio.sleep(0, "done"))
    (path,) = tmp_path.glob("*/*")
    before = path.stat().st_size
    await talk.send([{"role": "user", "content": "cd"}])
    assert path.stat().st_size == before
    await asyncio.sleep(5.0)
    assert path.stat().st_size > before

  clock.run(main())


def test_an_effects_result_is_the_same_now_and_when_it_is_read_again(tmp_path):
  async def main():
    talk = talk_to(Policy(), await store(tmp_path).open(DISPATCH))
    assert await talk.effect("pair", lambda: asyncio.sleep(0, (1, "a"))) == [1, "a"]
    with pytest.raises(TypeError, match="effect thing#0: expected plain data"):
      await talk.effect("thing", lambda: asyncio.sleep(0, object()))

  clock.run(main())


def test_time_goes_on_where_it_was(tmp_path):
  async def first():
    await asyncio.sleep(50.0)
    talk = talk_to(Policy(), await store(tmp_path).open(DISPATCH))
    assert talk.now() == 50.0
    await asyncio.sleep(1.0)
    assert talk.now() == 51.0
    await asyncio.sleep(1.0)

  async def second():
    talk = talk_to(Policy(), await store(tmp_path).open(again()))
    began, then = talk.now(), talk.now()
    await asyncio.sleep(2.0)
    return began, then, talk.now()

  clock.run(first())
  assert clock.run(second()) == (50.0, 51.0, 53.0)


def written(tmp_path):
  """A journal's file and how many records it has, each of which could be the last."""

  async def main():
    here = store(tmp_path)
    talk = talk_to(Policy(), await here.open(DISPATCH))
    await Attempt().run(talk)
    await asyncio.sleep(1.0)

  clock.run(main())
  (path,) = tmp_path.glob("*/*")
  return path, journal.read(path.with_name("1"))


def test_a_journal_cut_anywhere_or_damaged_is_read_up_to_there(tmp_path):
  path, records = written(tmp_path)
  data = path.read_bytes()
  assert len(records) > 8
  seen = set()
  for length in range(len(data)):
    path.write_bytes(data[:length])
    got = journal.read(path.with_name("1"))
    assert got == records[: len(got)]
    seen.add(len(got))
  assert seen == set(range(len(records)))
  for place in range(0, len(data), 7):
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    got = journal.read(path.with_name("1"))
    assert got == records[: len(got)] and len(got) < len(records)


def test_a_turn_whose_last_token_was_kept_and_its_end_was_not_is_whole(tmp_path):
  path, records = written(tmp_path)
  kept = [types.decode(record, journal._Record) for record in records]
  stop = next(
    n
    for n, one in enumerate(kept)
    if getattr(one, "piece", None) is not None and one.piece.finish_reason == "stop"
  )
  path.write_bytes(b"".join(journal._frame(record) for record in records[: stop + 1]))
  policy = Policy()

  async def main():
    talk = talk_to(policy, await store(tmp_path).open(again()))
    return await talk.send([{"role": "user", "content": "ab"}])

  assert clock.run(main()).finish_reason == "stop" and policy.segments == 0


def test_a_process_that_was_thought_dead_cannot_spoil_what_another_one_keeps(tmp_path):
  async def main():
    first, second = store(tmp_path, seconds=5.0), store(tmp_path)
    idle, busy = store(tmp_path, seconds=5.0), await first.open(DISPATCH)
    await busy.keep_effect("a#0", b"1")
    late = await idle.open(again(1))  # takes it over, and is cut off before it writes
    new = await second.open(again(2))
    assert new.effect("a#0") == b"1"
    await new.keep_effect("b#0", b"2")
    await busy.keep_effect("b#0", b"9")
    late.now(lambda: 3.0)
    await asyncio.sleep(6.0)  # its timer rings
    first.drop(DISPATCH.rollout_id)
    idle.drop(DISPATCH.rollout_id)
    await asyncio.sleep(1.0)
    await new.keep_effect("c#0", b"3")
    third = await store(tmp_path).open(again(3))
    second.drop(DISPATCH.rollout_id)
    await asyncio.sleep(1.0)
    return [third.effect(path) for path in ("a#0", "b#0", "c#0")]

  assert clock.run(main()) == [b"1", b"2", b"3"]
  assert not list(tmp_path.iterdir())  # the last removed what the others had left


@pytest.mark.parametrize("field", ["seed", "index", "group_id", "environment", "temperature"])
def test_the_journal_of_another_attempt_is_not_taken(tmp_path, field):
  written(tmp_path)
  values = {"seed": 12, "index": 5, "group_id": 4, "environment": "other", "temperature": 0.5}
  other = again(**{field: values[field]})

  async def main():
    return (await store(tmp_path).open(other)).effect("search#0")

  assert clock.run(main()) is None


def test_an_environment_that_takes_another_path_is_an_error(tmp_path):
  written(tmp_path)

  async def main():
    talk = talk_to(Policy(), await store(tmp_path).open(again()))
    with pytest.raises(journal.JournalMismatch, match="turn 0: the prompt is not the one"):
      await talk.send([{"role": "user", "content": "another"}])

  clock.run(main())


def test_a_journal_of_another_program_is_begun_anew(tmp_path):
  path, _ = written(tmp_path)
  path.write_bytes(journal._frame(b"\x93\xa5begun\xc0\xc0"))

  async def main():
    return (await store(tmp_path).open(again())).effect("search#0")

  assert clock.run(main()) is None


def test_a_full_disk_is_told_and_the_effect_fails(tmp_path):
  told = []

  async def full(act, *arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  async def main():
    here = store(tmp_path, act=full, told=told)
    talk = talk_to(Policy(), await here.open(DISPATCH))
    with pytest.raises(journal.JournalFailed):
      await talk.effect("buy", lambda: asyncio.sleep(0, "done"))
    await talk.send([{"role": "user", "content": "ab"}])
    await asyncio.sleep(1.0)
    await here.close()

  clock.run(main())
  assert len(told) >= 2
  assert set(told) == {"journal: rollout_000000007/0: [Errno 28] No space left on device"}


def test_a_run_that_is_complete_keeps_no_journal(tmp_path):
  path, _ = written(tmp_path / "journal")
  journal.clear(tmp_path / "journal")
  assert not path.parent.parent.exists()
  journal.clear(tmp_path / "journal")
