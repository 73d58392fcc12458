"""How a generation goes on where it was cut: what it has so far, and the seed of what follows.

A generation is one or more requests, on one or more servers, under one or more versions of the
weights; each token keeps the logprob and the version that it was sampled with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from intellect3.inference.protocol import GenerateRequest, SamplingParams
from intellect3.types import Generation, RouterShape, joined


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
    recorded: tokens whose experts are known: those that `known` began with, and the pieces'.
  """

  known: int
  pieces: list[Generation] = field(default_factory=list)
  tokens: list[int] = field(default_factory=list)
  keys: dict[str, str] = field(default_factory=dict)
  reprefilled: int = 0
  recorded: int = field(init=False)

  def __post_init__(self) -> None:
    self.recorded = self.known

  def add(self, piece: Generation) -> None:
    self.pieces.append(piece)
    self.tokens.extend(piece.tokens.tolist())
    if piece.routed_experts is not None:
      self.recorded += len(piece.routed_experts)

  def resume(self, so_far: Generation, router: RouterShape | None) -> None:
    """Takes what an earlier call had; raises ValueError where its experts are missing."""
    if router is not None and so_far.tokens.size and so_far.routed_experts is None:
      raise ValueError("so_far.routed_experts: expected those of its tokens, got none")
    self.add(so_far)

  def next_request(
    self,
    prompt: Sequence[int],
    *,
    rid: str,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    seed: int | None,
    router: RouterShape | None,
  ) -> GenerateRequest:
    """The request for what follows. Each token's experts are asked for once: what the call that
    sampled with them used counts, also where a later one computes the token again."""
    return GenerateRequest(
      input_ids=[*prompt, *self.tokens],
      rid=rid,
      sampling_params=SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=[int(token) for token in stop_token_ids],
        sampling_seed=seed if seed is None else continued_seed(seed, len(self.tokens)),
      ),
      return_routed_experts=None if router is None else True,
      routed_experts_start_len=None if router is None else self.recorded,
    )

  def whole(self, finish_reason: str) -> Generation:
    """The pieces as one Generation, in order."""
    return joined(self.pieces, finish_reason, self.reprefilled)


def continued_seed(seed: int, tokens: int) -> int:
  """Seed of a request that goes on after `tokens` tokens; `seed` itself for 0. Below 2^31."""
  if tokens == 0:
    return seed
  # A Weyl step and a multiply-xorshift: different for nearby seeds and lengths, the same anywhere.
  mixed = (seed + tokens * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
  mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
  return (mixed ^ (mixed >> 31)) & 0x7FFFFFFF
