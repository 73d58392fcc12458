"""Markers in a text that arrives in pieces: what is sure is given out, what may be half one waits.

Place in the ring: streams of sampled text, where a tag or a stop string may be cut anywhere.
"""

from collections.abc import Iterable


def longest_beginning(text: str, markers: Iterable[str]) -> int:
  """Length of the longest end of the text that some marker, not yet whole, begins with."""
  longest = 0
  for marker in markers:
    for length in range(min(len(marker) - 1, len(text)), longest, -1):
      if text.endswith(marker[:length]):
        longest = length
        break
  return longest


class Scanner:
  """Reads a growing text from marker to marker."""

  def __init__(self) -> None:
    self._text = ""

  def feed(self, text: str) -> None:
    self._text += text

  def until(self, *markers: str) -> tuple[str, str | None]:
    """Reads on to the first of the markers.

    Returns:
      The text before it, and it; or what surely stands before one, and None: feed and ask again.
    """
    text = self._text
    starts = {marker: text.find(marker) for marker in markers}
    found = [marker for marker, start in starts.items() if start >= 0]
    if found:
      first = min(found, key=lambda marker: starts[marker])
      self._text = text[starts[first] + len(first) :]
      return text[: starts[first]], first
    sure = len(text) - longest_beginning(text, markers)
    self._text = text[sure:]
    return text[:sure], None

  def rest(self) -> str:
    """Whatever waits, for there will be no more."""
    text, self._text = self._text, ""
    return text
