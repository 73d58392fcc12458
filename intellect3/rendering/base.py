"""The Renderer protocol: chat messages to token ids, sampled ids back to messages.

Place in the ring: between a Task's messages and the prompt ids that a server gets (`render`), and
between the sampled ids and the Reply that an environment sees (`parse`). Tokens in, tokens out
(contract 1): sampled tokens are decoded for the environment to read, never encoded again; a further
turn is appended to them with `extend`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from intellect3.types import Message


@dataclass(frozen=True)
class Parsed:
  """What an assistant's sampled tokens say.

  Attributes:
    content: the text, without the stop token; invalid UTF-8 is shown as U+FFFD.
    tool_calls: tool calls in the OpenAI form, in the order in which they were made.
  """

  content: str
  tool_calls: tuple[Mapping[str, Any], ...] = ()


class Renderer(Protocol):
  """A chat format over a vocabulary. Stateless; one instance serves every conversation."""

  @property
  def vocab_size(self) -> int:
    """Number of ids; a server's vocabulary must be at least this large."""
    ...

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    """Ids that end an assistant's turn."""
    ...

  def render(
    self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
  ) -> list[int]:
    """Ids of a whole conversation, with the opening of the assistant's next turn.

    Raises:
      ValueError: a role, content or tools that the format has no tokens for.
    """
    ...

  def extend(
    self, messages: Sequence[Message], *, last_token: int | None = None
  ) -> list[int] | None:
    """Ids that follow an assistant's sampled tokens, up to and with the opening of its next turn.

    Args:
      messages: what was said since: user messages, tool results.
      last_token: the last id of the turn before. Where it does not end a turn (the generation ended
        for length) the ids begin by ending it; where it opens the next turn already (some formats
        stop at the next role's token) the ids do not open it twice. None: the turn ended properly.

    Returns:
      The ids, or None where the format rewrites earlier turns, so that a new branch must begin.
    """
    ...

  def completion(self, content: str) -> list[int]:
    """Ids of an assistant's turn as a model should sample it, with the stop token; for SFT."""
    ...

  def parse(self, tokens: Sequence[int]) -> Parsed:
    """Reads an assistant's sampled tokens."""
    ...

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of any ids, special tokens by name; for people to read."""
    ...
