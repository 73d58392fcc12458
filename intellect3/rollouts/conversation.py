"""The token recorder behind an environment's Conversation.

Place in the ring: environment -> RecordedConversation -> server pool; out come Trajectories. Tokens
in, tokens out (contract 1): each prompt is the tokens so far and the rendering of what is new, so
sampled tokens are never encoded again. Where the format cannot extend them, or the tools change, a
new Trajectory begins from the messages.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from intellect3.environments.base import ConversationFull, Reply
from intellect3.rendering.base import Renderer
from intellect3.rollouts import journal as journal_lib
from intellect3.types import NOT_SAMPLED, Generation, Message, Trajectory

T = TypeVar("T")


class Pool(Protocol):
  """The part of `inference.client.ServerPool` that a conversation uses."""

  async def generate(
    self,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    seed: int | None,
    rid: str,
    affinity: str | None = None,
    prefer: str | None = None,
    known_tokens: int = 0,
    so_far: Generation | None = None,
    progress: Callable[[Generation], None] | None = None,
  ) -> Generation: ...


@dataclass(frozen=True)
class Effect:
  """An outside effect as it was recorded.

  Attributes:
    path: the call path: its name and how many of that name came before, `name#0`.
    result: what it gave.
  """

  path: str
  result: Any


@dataclass
class _Branch:
  """A Trajectory that grows."""

  tokens: list[int]
  sampled: list[tuple[int, Generation]] = field(default_factory=list)

  def trajectory(self, temperature: float) -> Trajectory:
    length = len(self.tokens)
    loss_mask = np.zeros(length, np.bool_)
    logprobs = np.zeros(length, np.float32)
    versions = np.full(length, NOT_SAMPLED, np.int32)
    for start, generation in self.sampled:
      span = slice(start, start + generation.tokens.size)
      loss_mask[span] = True
      logprobs[span] = generation.inference_logprobs
      versions[span] = generation.policy_versions
    # Each turn brings the experts of what was computed since the one before: they join up.
    experts = [g.routed_experts for _, g in self.sampled if g.routed_experts is not None]
    return Trajectory(
      tokens=np.asarray(self.tokens, np.int32),
      loss_mask=loss_mask,
      inference_logprobs=logprobs,
      policy_versions=versions,
      temperature=temperature,
      routed_experts=np.concatenate(experts) if experts else None,
    )


class RecordedConversation:
  """Implements environments.base.Conversation and keeps every token. One rollout, one use."""

  def __init__(
    self,
    renderer: Renderer,
    pool: Pool,
    *,
    seed: int,
    rid: str,
    temperature: float,
    max_new_tokens: int,
    max_tokens: int,
    affinity: str | None = None,
    now: Callable[[], float] | None = None,
    journal: journal_lib.Journal | None = None,
  ):
    """Begins a conversation.

    Args:
      renderer: the chat format.
      pool: where turns are sampled.
      seed: of the rollout, from (run seed, task, sample); turns derive theirs from it.
      rid: prefix of the requests' ids, unique in the run.
      temperature: of every turn; 0 is greedy.
      max_new_tokens: at most this many tokens per turn.
      max_tokens: context: prompt and sampled tokens of a branch together.
      affinity: name of the group whose members share the first prompt; they are sent to one server.
      now: seconds; None for the running event loop's clock.
      journal: what the rollout had in other processes, and what keeps what it gets (contract 7);
        None keeps nothing.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("max_tokens", max_tokens)):
      if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if temperature < 0:
      raise ValueError(f"temperature: expected at least 0, got {temperature}")
    self._renderer = renderer
    self._pool = pool
    self._seed = seed
    self._rid = rid
    self._temperature = temperature
    self._max_new_tokens = max_new_tokens
    self._max_tokens = max_tokens
    self._affinity = affinity
    self._now = now
    self._journal = journal or journal_lib.Journal()
    self._random = random.Random(derive_seed(seed, "random"))
    self._messages: list[Message] = []
    self._tools: Sequence[Mapping[str, Any]] | None = None
    self._branches: list[_Branch] = []
    self._servers: dict[str, None] = {}
    self._home: str | None = None
    self._turns = 0
    self._busy = False
    self._effect_counts: dict[str, int] = {}
    self.effects: list[Effect] = []
    self.truncated = False
    self.reprefilled_tokens = 0

  @property
  def random(self) -> random.Random:
    """Randomness of this rollout; the same for the same seed."""
    return self._random

  @property
  def messages(self) -> tuple[Message, ...]:
    """All that was said, replies included; for people and logs."""
    return tuple(self._messages)

  def now(self) -> float:
    """Seconds on the injected clock; after a crash it goes on where it was."""
    return self._journal.now(self._now or asyncio.get_running_loop().time)

  def servers(self) -> tuple[str, ...]:
    """Servers that sampled any of it."""
    return tuple(self._servers)

  def trajectories(self) -> tuple[Trajectory, ...]:
    """The branches, in order.

    Their `temperature` is what the trainer divides its logits by; for greedy sampling that is 1.0,
    since servers then give the logprobs of temperature 1.
    """
    temperature = self._temperature if self._temperature > 0 else 1.0
    return tuple(branch.trajectory(temperature) for branch in self._branches if branch.sampled)

  async def send(
    self,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int | None = None,
  ) -> Reply:
    """See Conversation.send.

    Raises:
      ConversationFull: the prompt leaves no room in the context; `truncated` is then True.
      RuntimeError: another turn of this conversation is being sampled.
      Whatever the pool raises.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
      raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if self._busy:
      raise RuntimeError("a conversation has one turn at a time; this one is still being sampled")
    self._busy = True
    try:
      return await self._turn(messages, tools, max_new_tokens or self._max_new_tokens)
    finally:
      self._busy = False

  async def effect(self, name: str, fn: Callable[[], Awaitable[T]]) -> T:
    """Runs an outside effect, or gives what it gave before a crash; failures are not recorded.

    The result passes through MessagePack, so that it is the same now as when it is read again: a
    tuple comes back as a list.

    Raises:
      TypeError: the result is not plain data.
      Whatever `fn` raises.
    """
    number = self._effect_counts.get(name, 0)
    self._effect_counts[name] = number + 1
    path = f"{name}#{number}"
    kept = self._journal.effect(path)
    if kept is None:
      result = await fn()
      try:
        kept = msgspec.msgpack.encode(result)
      except (TypeError, OverflowError) as error:
        raise TypeError(f"effect {path}: expected plain data as its result: {error}") from error
      await self._journal.keep_effect(path, kept)
    self.effects.append(Effect(path=path, result=msgspec.msgpack.decode(kept)))
    return self.effects[-1].result

  async def _turn(
    self,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    max_new_tokens: int,
  ) -> Reply:
    prompt = self._extended(messages, tools)
    branch = self._branches[-1] if prompt is not None else None
    if prompt is None:
      prompt = self._renderer.render([*self._messages, *messages], tools)
    room = self._max_tokens - len(prompt)
    if room < 1:
      self.truncated = True
      raise ConversationFull(
        f"prompt of {len(prompt)} tokens, context of {self._max_tokens}: no room for a turn"
      )
    turn, journal = self._turns, self._journal
    generation, whole = journal.turn(turn, prompt)
    if generation is None or not whole:
      generation = await self._pool.generate(
        prompt,
        max_new_tokens=min(max_new_tokens, self._max_new_tokens, room),
        temperature=self._temperature,
        stop_token_ids=self._renderer.stop_token_ids,
        seed=derive_seed(self._seed, "turn", turn),
        rid=f"{self._rid}-{turn}",
        affinity=self._affinity,
        prefer=self._home,
        known_tokens=len(branch.tokens) - 1 if branch is not None else 0,
        so_far=generation,
        progress=lambda piece: journal.sampled(turn, prompt, piece),
      )
      journal.turned(turn, generation)
    # Recorded only now, so that a turn that failed leaves the conversation as it was.
    self._turns += 1
    if branch is None:
      branch = _Branch(tokens=[])
      self._branches.append(branch)
    sampled = generation.tokens.tolist()
    branch.tokens = [*prompt, *sampled]
    branch.sampled.append((len(prompt), generation))
    self._tools = tools
    self._home = generation.server
    self._servers |= dict.fromkeys(generation.servers or (generation.server,))
    self.reprefilled_tokens += generation.reprefilled_tokens
    self.truncated |= generation.finish_reason == "length"
    parsed = self._renderer.parse(sampled)
    reply: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.tool_calls:
      reply["tool_calls"] = list(parsed.tool_calls)
    self._messages += [*messages, reply]
    return Reply(
      content=parsed.content,
      tool_calls=parsed.tool_calls,
      finish_reason=generation.finish_reason,
    )

  def _extended(
    self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
  ) -> list[int] | None:
    """The current branch's tokens and what follows them; None where a new branch must begin."""
    if not self._branches or tools != self._tools:
      return None
    tokens = self._branches[-1].tokens
    extension = self._renderer.extend(messages, last_token=tokens[-1])
    return None if extension is None else [*tokens, *extension]


def derive_seed(*parts: int | str) -> int:
  """A seed below 2^31 from whatever it shall depend on; the same on every machine."""
  text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") & 0x7FFFFFFF
