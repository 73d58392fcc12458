"""Text of token ids and ids of text: whole, piece by piece, and while a stop string is looked for.

Place in the ring: the HTTP side uses it for every answer, the engine's thread for stop strings.
Byte-level vocabularies only, those of every model family here: an id is a string of bytes, so that
text is a lookup and a join, and half a character at the end of a stream waits for its other half.
"""

import codecs
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers

from intellect3.rendering.markers import longest_beginning

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
  """The tokenizer of a model directory. Immutable; may be used on any thread."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int):
    """Tabulates a tokenizer.

    Args:
      tokenizer: with a ByteLevel decoder.
      vocab_size: of the model, at least the tokenizer's; ids without a token have no text.

    Raises:
      ValueError: another decoder, or a larger vocabulary than the model's.
    """
    decoder = (json.loads(tokenizer.to_str()).get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
      raise ValueError(f"tokenizer.json: decoder: expected ByteLevel, got {decoder}")
    self._tokenizer = tokenizer
    self._bytes = [b""] * vocab_size
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
      if index >= vocab_size:
        raise ValueError(
          f"tokenizer.json: expected ids below the model's {vocab_size}, got {token!r} = {index}"
        )
      self._bytes[index] = _bytes_of(token)
    self._plain_bytes = list(self._bytes)
    for index, added in tokenizer.get_added_tokens_decoder().items():
      if added.special:
        self._plain_bytes[index] = b""
    self._names: list[str | None] = [None] * vocab_size

  def encode(self, text: str, *, special: bool) -> list[int]:
    """Ids of a text; `special`: with what the tokenizer puts before and after a text."""
    return self._tokenizer.encode(text, add_special_tokens=special).ids

  def table(self, skip_special_tokens: bool) -> Sequence[bytes]:
    """Bytes of each id; of special tokens none where they are skipped."""
    return self._plain_bytes if skip_special_tokens else self._bytes

  def decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
    """The text of ids; what is no UTF-8 reads as U+FFFD."""
    table = self.table(skip_special_tokens)
    return b"".join([table[index] for index in ids]).decode("utf-8", "replace")

  def name(self, index: int) -> str:
    """The text of one id by itself, special tokens by name."""
    name = self._names[index]
    if name is None:
      name = self._names[index] = self._bytes[index].decode("utf-8", "replace")
    return name

  def bytes_of(self, index: int) -> bytes:
    return self._bytes[index]

  def match_stop(self, output_ids: Sequence[int], stop_strings: tuple[str, ...]) -> str | None:
    """The first of the stop strings that the last id completes, or None.

    Args:
      output_ids: sampled so far; it was asked before for every shorter output.
      stop_strings: in the request's order; special tokens match by name.
    """
    wanted, longest = _encoded(stop_strings)
    tail = self._bytes[output_ids[-1]]
    end = longest - 1 + len(tail)
    for index in range(len(output_ids) - 2, -1, -1):
      if len(tail) >= end:
        break
      tail = self._bytes[output_ids[index]] + tail
    for string, sought in zip(stop_strings, wanted, strict=True):
      if sought in tail:
        return string
    return None


def load(directory: str | os.PathLike[str], vocab_size: int) -> Text | None:
  """The Text of a model directory; None where there is no `tokenizer.json`.

  Raises:
    ValueError: a tokenizer that is not byte-level or does not fit the model.
  """
  path = pathlib.Path(directory) / "tokenizer.json"
  if not path.is_file():
    return None
  return Text(tokenizers.Tokenizer.from_file(str(path)), vocab_size)


def trim(text: str, matched: str, *, keep: bool) -> str:
  """Cuts a text at the stop string that ended it, which stays where `keep` is set."""
  start = text.find(matched)
  if start < 0:
    return text
  return text[: start + len(matched)] if keep else text[:start]


class Unfolding:
  """The text of a growing output. Text that was given out is never taken back: half a character,
  bytes that are none, and what may be the beginning of a stop string wait for what comes next."""

  def __init__(self, text: Text, *, skip_special_tokens: bool, stop_strings: tuple[str, ...]):
    self._table = text.table(skip_special_tokens)
    self._stop_strings = stop_strings
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._held = ""

  def feed(self, ids: Iterable[int]) -> str:
    """Takes further ids; returns the further text that is sure."""
    table = self._table
    text = self._held + self._decoder.decode(b"".join([table[index] for index in ids]))
    sure = min(
      len(text.rstrip(REPLACEMENT)), len(text) - longest_beginning(text, self._stop_strings)
    )
    self._held = text[sure:]
    return text[:sure]


@functools.lru_cache(maxsize=1024)
def _encoded(strings: tuple[str, ...]) -> tuple[tuple[bytes, ...], int]:
  encoded = tuple(string.encode() for string in strings)
  return encoded, max(map(len, encoded))


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """The byte that each character of byte-level BPE's alphabet stands for.

  Latin-1's printable characters stand for themselves; the other bytes, in order, are written as
  U+0100 and on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  table = {chr(byte): byte for byte in printable}
  hidden = [byte for byte in range(256) if byte not in printable]
  return table | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


def _bytes_of(token: str) -> bytes:
  alphabet = _byte_of_character()
  try:
    return bytes([alphabet[character] for character in token])
  except KeyError:
    return token.encode()  # an added token outside the alphabet is text
