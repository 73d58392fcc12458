"""How a wrong field is told."""

from typing import Any


def require(field: str, holds: bool, expected: str, given: Any) -> None:
  """Raises ValueError naming field, expected and given, unless it holds."""
  if not holds:
    raise ValueError(f"{field}: expected {expected}, got {given!r}")
