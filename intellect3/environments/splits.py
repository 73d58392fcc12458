"""Disjoint splits for procedural tasks: a task belongs where the hash of its text says."""

import hashlib
import random
from collections.abc import Callable

SPLITS = ("train", "eval")
HELD_OUT = 0.1
"""Share of all texts that belongs to `eval`."""

_MAX_DRAWS = 10_000


def split_of(text: str) -> str:
  """The split that a task's text belongs to; the same in every process and every run."""
  digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest()
  return "eval" if int.from_bytes(digest, "big") < HELD_OUT * 2**64 else "train"


def draw(
  split: str, index: int, *, size: int, key: str, text: Callable[[random.Random], str]
) -> str:
  """The pseudo-random text at an index of a split.

  Args:
    split: `train` or `eval`.
    index: 0 <= index < size.
    size: number of indices in the split.
    key: whatever else the draw depends on (name and settings of the environment).
    text: makes a text from a seeded generator.

  Returns:
    The first text, of those drawn for this index, that belongs to the split. Two indices may hold
    the same text; two splits never do.

  Raises:
    ValueError: an unknown split, an index out of range, or no text of that split found.
  """
  check_split(split)
  if not 0 <= index < size:
    raise ValueError(f"index: expected 0 <= index < {size}, got {index}")
  rng = random.Random(f"{key}/{split}/{index}")
  for _ in range(_MAX_DRAWS):
    candidate = text(rng)
    if split_of(candidate) == split:
      return candidate
  raise ValueError(f"split: expected texts that belong to {split!r}, found none ({key})")


def check_split(split: str) -> None:
  """Raises ValueError for an unknown split."""
  if split not in SPLITS:
    raise ValueError(f"split: expected one of {list(SPLITS)}, got {split!r}")
