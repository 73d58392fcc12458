"""How a generation goes on where it was cut: what it has so far, and the seed of what follows.

A generation is one or more requests, on one or more servers, under one or more versions of the
weights; each token keeps the logprob and the version that it was sampled with.
"""

from dataclasses import dataclass, field

import numpy as np

from intellect3.types import Generation


@dataclass
class Progress:
  """What a generation has so far.

  Attributes:
    pieces: what was sampled, in order.
    known: tokens whose cache some server has held: the prompt's prefix, then all of it.
    tokens: the sampled ids.
    keys: the cache key it uses on each server: its first one there, so that a generation keeps the
      cache it began with over an update in flight, in segments or not.
    reprefilled: tokens known before that a server said it had to compute again.
  """

  known: int
  pieces: list[Generation] = field(default_factory=list)
  tokens: list[int] = field(default_factory=list)
  keys: dict[str, str] = field(default_factory=dict)
  reprefilled: int = 0

  def add(self, piece: Generation) -> None:
    self.pieces.append(piece)
    self.tokens.extend(piece.tokens.tolist())

  def whole(self, finish_reason: str) -> Generation:
    """The pieces as one Generation, in order."""
    made = [piece for piece in self.pieces if piece.tokens.size] or self.pieces[-1:]
    servers = dict.fromkeys(url for piece in made for url in piece.servers or (piece.server,))
    return Generation(
      tokens=np.concatenate([piece.tokens for piece in self.pieces]),
      inference_logprobs=np.concatenate([piece.inference_logprobs for piece in self.pieces]),
      policy_versions=np.concatenate([piece.policy_versions for piece in self.pieces]),
      finish_reason=finish_reason,
      server=made[-1].server,
      servers=tuple(servers),
      reprefilled_tokens=self.reprefilled,
    )


def continued_seed(seed: int, tokens: int) -> int:
  """Seed of a request that goes on after `tokens` tokens; `seed` itself for 0. Below 2^31."""
  if tokens == 0:
    return seed
  # A Weyl step and a multiply-xorshift: different for nearby seeds and lengths, the same anywhere.
  mixed = (seed + tokens * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
  mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
  return (mixed ^ (mixed >> 31)) & 0x7FFFFFFF
