"""A byte-level vocabulary and chat format that needs no tokenizer file.

Ids 0 to 255 are the bytes of UTF-8 text. The special tokens follow, and their ids never change,
since checkpoints are trained on them:

    256 <|endoftext|>   257 <|system|>        258 <|user|>         259 <|assistant|>
    260 <|observation|> 261 <|pad|>           262 <|reserved_0|>   263 <|reserved_1|>

A message is its role's token and its bytes; an assistant's message ends with <|endoftext|>. The
names are GLM-4.5's, the layout is simpler. Text that spells the name of a special token stays
bytes, so a prompt cannot forge a turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intellect3.rendering.base import Parsed
from intellect3.types import Message

NUM_BYTES = 256

SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|system|>",
  "<|user|>",
  "<|assistant|>",
  "<|observation|>",
  "<|pad|>",
  "<|reserved_0|>",
  "<|reserved_1|>",
)
"""Names of ids 256 and up, in order."""

ENDOFTEXT, SYSTEM, USER, ASSISTANT, OBSERVATION, PAD = range(NUM_BYTES, NUM_BYTES + 6)

VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)

_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": OBSERVATION}


@dataclass(frozen=True)
class ByteRenderer:
  """The Renderer of byte-level models; see the module's docstring for ids and format."""

  vocab_size: int = VOCAB_SIZE
  stop_token_ids: tuple[int, ...] = (ENDOFTEXT, USER, OBSERVATION)

  def __post_init__(self) -> None:
    if self.vocab_size < VOCAB_SIZE:
      raise ValueError(f"vocab_size: expected at least {VOCAB_SIZE}, got {self.vocab_size}")
    outside = [i for i in self.stop_token_ids if not 0 <= i < VOCAB_SIZE]
    if outside or not self.stop_token_ids:
      raise ValueError(
        f"stop_token_ids: expected ids below {VOCAB_SIZE}, at least one, got {self.stop_token_ids}"
      )

  def render(
    self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
  ) -> list[int]:
    """See Renderer.render. Tools raise ValueError: bytes have no format for them."""
    if tools:
      raise ValueError(f"tools: expected none, the byte format has no tool calls, got {len(tools)}")
    if not messages:
      raise ValueError("messages: expected at least one, got none")
    return [*_encode_messages(messages), ASSISTANT]

  def extend(self, messages: Sequence[Message], *, last_token: int | None = None) -> list[int]:
    """See Renderer.extend. Never None: this format leaves earlier turns as they are."""
    if not messages:
      raise ValueError("messages: expected at least one, got none")
    tokens = [*_encode_messages(messages), ASSISTANT]
    if last_token is None or last_token == ENDOFTEXT:
      return tokens
    if last_token not in self.stop_token_ids:
      return [ENDOFTEXT, *tokens]
    return tokens[1:] if tokens[0] == last_token else tokens

  def completion(self, content: str) -> list[int]:
    """See Renderer.completion."""
    return [*content.encode(), ENDOFTEXT]

  def parse(self, tokens: Sequence[int]) -> Parsed:
    """See Renderer.parse; `tool_calls` is always empty."""
    ended = len(tokens) > 0 and tokens[-1] in self.stop_token_ids
    return Parsed(content=self.decode(tokens[:-1] if ended else tokens))

  def decode(self, tokens: Sequence[int]) -> str:
    """See Renderer.decode. An id without a meaning raises ValueError.

    Ids from 264 up to a larger `vocab_size` (rows that pad an embedding) read as `<|id|>`.
    """
    parts: list[bytes] = []
    for token in tokens:
      if 0 <= token < NUM_BYTES:
        parts.append(bytes((token,)))
      elif NUM_BYTES <= token < VOCAB_SIZE:
        parts.append(SPECIAL_TOKENS[token - NUM_BYTES].encode())
      elif VOCAB_SIZE <= token < self.vocab_size:
        parts.append(f"<|{token}|>".encode())
      else:
        raise ValueError(f"tokens: expected ids in [0, {self.vocab_size}), got {token}")
    return b"".join(parts).decode(errors="replace")


def _encode_messages(messages: Sequence[Message]) -> list[int]:
  tokens: list[int] = []
  for position, message in enumerate(messages):
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
      raise ValueError(f"messages[{position}].role: expected one of {[*_ROLES]}, got {role!r}")
    if not isinstance(content, str):
      raise ValueError(f"messages[{position}].content: expected text, got {type(content).__name__}")
    if message.get("tool_calls"):
      raise ValueError(f"messages[{position}].tool_calls: the byte format has none")
    tokens.append(_ROLES[role])
    tokens.extend(content.encode())
    if role == "assistant":
      tokens.append(ENDOFTEXT)
  return tokens
