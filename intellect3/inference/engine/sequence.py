"""A request with its life: what it has sampled so far, where its cache is, when things happened.

Place in the ring: the engine's thread writes it; the HTTP side reads it, up to the length that it
was told of (its lists only ever grow), and whole once it is finished.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from intellect3.inference.engine.pages import Node
from intellect3.inference.engine.request import Request

TopLogprobs = list[tuple[float, int]]
"""(logprob, id) of the likeliest tokens at one position, likeliest first."""


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
  """A request while it waits, runs, and after its end.

  Attributes:
    request: what was asked.
    seed: the request's own or the engine's choice.
    received: wall clock, seconds; likewise `started` (first computed), `first_token`, `finished`.
    slot: its row in decode calls, None while it waits.
    pages: of the cache, in order of its tokens; the first of them are those of `nodes`.
    nodes: those of its pages that others can share.
    found: how many of the nodes were there when it came, so that it need not compute them.
    reused: how many of those it has passed by.
    passed: how many of its tokens it need not compute thanks to them.
    epoch: of the cache, when it got its pages.
    lost: how many of its tokens were in the cache when it was last retracted.
    cached: how many of its tokens (prompt, then output) are in the cache.
    cached_tokens: how many prompt tokens were found in the prefix cache, when it first ran.
    output_ids: sampled so far.
    output_logprobs: of each sampled id.
    output_top: alternatives at each sampled id, where they were asked for.
    input_logprobs: of prompt ids `first_scored`, ... as far as they were scored.
    input_top: alternatives to the same.
    experts: pieces of int32 [tokens, MoE layers, A] in order of the tokens, where the server
      returns experts. Once finished, `np.concatenate` gives those of prompt and output but the
      last token.
    spans: `[version, start, end]` over the output tokens.
    finish: SGLang's finish reason, None while it lives.
    retractions: how often it lost its cache and went back to the queue.
  """

  request: Request
  seed: int
  received: float
  slot: int | None = None
  pages: list[int] = dataclasses.field(default_factory=list)
  nodes: list[Node] = dataclasses.field(default_factory=list)
  found: int = 0
  reused: int = 0
  passed: int = 0
  epoch: int = 0
  lost: int = 0
  cached: int = 0
  cached_tokens: int = 0
  output_ids: list[int] = dataclasses.field(default_factory=list)
  output_logprobs: list[float] = dataclasses.field(default_factory=list)
  output_top: list[TopLogprobs] = dataclasses.field(default_factory=list)
  input_logprobs: list[float] = dataclasses.field(default_factory=list)
  input_top: list[TopLogprobs] = dataclasses.field(default_factory=list)
  experts: list[np.ndarray] = dataclasses.field(default_factory=list)
  spans: list[list[Any]] = dataclasses.field(default_factory=list)
  finish: Mapping[str, Any] | None = None
  retractions: int = 0
  started: float | None = None
  first_token: float | None = None
  finished: float | None = None

  @property
  def length(self) -> int:
    return len(self.request.input_ids) + len(self.output_ids)

  @property
  def tokens(self) -> list[int]:
    """The prompt and what was sampled."""
    return [*self.request.input_ids, *self.output_ids]

  @property
  def first_scored(self) -> int | None:
    """The first prompt position that has a logprob to be computed; None where none is asked for."""
    start = self.request.logprob_start
    return None if start is None else max(start, 1)

  @property
  def wants_scores(self) -> bool:
    """Whether prompt logprobs are still to be computed (they are kept over a retraction)."""
    first = self.first_scored
    return first is not None and first + len(self.input_logprobs) < len(self.request.input_ids)
