"""The protocols between an environment and whatever runs it.

Place in the ring: Task -> (environment x policy) -> Rollout. An environment is plain async code.
All that it does to the world goes through a Conversation (contract 7): generations by `send`,
outside effects by `effect`, randomness by `random`, time by `now`; so a rollout is journaled, and
after a crash it is run again to where it was. A failure inside an environment raises and is counted
as an error; it is never a reward of zero (contract 4).
"""

import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from intellect3.types import Message, Task

T = TypeVar("T")


class ConversationFull(Exception):
  """The next prompt leaves no room in the context.

  An environment may catch it and score what there is, a truncated rollout; otherwise the attempt
  has no reward and counts as errored.
  """


@dataclass(frozen=True)
class Reply:
  """An assistant's turn as the environment sees it.

  Attributes:
    content: its text.
    tool_calls: its tool calls in the OpenAI form.
    finish_reason: `stop`, or `length` where it was cut.
  """

  content: str
  tool_calls: tuple[Mapping[str, Any], ...] = ()
  finish_reason: str = "stop"


@dataclass(frozen=True)
class Score:
  """How an attempt did.

  Attributes:
    reward: what the policy is trained on; finite.
    metrics: further scores by name, for the logs only.
  """

  reward: float
  metrics: Mapping[str, float] = field(default_factory=dict)

  def __post_init__(self) -> None:
    if not math.isfinite(self.reward):
      raise ValueError(f"reward: expected a finite number, got {self.reward}")


class Conversation(Protocol):
  """What an environment talks to."""

  @property
  def random(self) -> random.Random:
    """Randomness of this rollout, from (run seed, task, sample)."""
    ...

  async def send(
    self,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int | None = None,
  ) -> Reply:
    """Says what is new since the last reply and returns the assistant's next turn.

    Args:
      messages: the opening messages at first, later only what follows the reply before.
      tools: tools that the assistant may call, in the OpenAI form.
      max_new_tokens: a bound on this turn, where lower than the conversation's own.

    Raises:
      ConversationFull: no room is left for a turn.
    """
    ...

  async def effect(self, name: str, fn: Callable[[], Awaitable[T]]) -> T:
    """Runs an outside effect (a tool, a sandbox, a judge) and returns its result.

    After a crash the rollout is run again, and what `fn` gave is given again without calling it. So
    its result is plain data (None, numbers, text, bytes, lists, dicts), and whatever it draws from
    `random` or asks of `now` is drawn and asked before.
    """
    ...

  def now(self) -> float:
    """Seconds on the rollout's clock; only differences mean something."""
    ...


class Environment(Protocol):
  """A source of tasks and the code that attempts and scores them."""

  @property
  def name(self) -> str:
    """Name in the run's mix."""
    ...

  def size(self, split: str) -> int:
    """Number of tasks in a split."""
    ...

  def task(self, split: str, index: int) -> Task:
    """The task at an index, 0 <= index < size(split); always the same one."""
    ...

  async def run(self, task: Task, conversation: Conversation) -> Score:
    """Attempts a task. Any exception makes the rollout an error, not a zero."""
    ...
