"""A checked generation request, and the error that refuses one.

Place in the ring: `parse` and `openai` make Requests of HTTP bodies; the batcher runs them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


class RequestError(Exception):
  """A request that must be refused; `payload` is the JSON body of the answer."""

  def __init__(self, message: str, *, status: int = 400, payload: Any = None):
    super().__init__(message)
    self.status = status
    self.payload = {"error": {"message": message}} if payload is None else payload


BODY_BASE_BYTES = 1 << 20
BYTES_PER_TOKEN = 16
"""Of a prompt's token in JSON: ids take up to 8, escaped text may take more than ids."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
  """What the served model allows.

  Attributes:
    vocab_size: ids lie below it.
    context_length: tokens of prompt and output together.
    max_top_logprobs: most alternatives per token.
    routed_experts: whether the server was started to return them.
    max_stop_ids: most stop ids of a request that also has min_new_tokens.
    slots: requests that run at once.
  """

  vocab_size: int
  context_length: int
  max_top_logprobs: int = 0
  routed_experts: bool = False
  max_stop_ids: int = 32
  slots: int = 1

  @property
  def max_body_bytes(self) -> int:
    """Of an HTTP body that asks for generations: takes a full prompt for every slot."""
    return BODY_BASE_BYTES + BYTES_PER_TOKEN * self.context_length * self.slots


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """One checked generation.

  Attributes:
    rid: the name by which it can be aborted.
    input_ids: the prompt, at least one id, all inside the vocabulary.
    max_new_tokens: cut to what the context leaves.
    min_new_tokens: before that many, neither the model's end tokens nor `stop_token_ids` can be
      sampled.
    temperature: 0.0 is greedy.
    top_k: only the k likeliest tokens; 0 is all.
    top_p: only the likeliest tokens that together reach this probability.
    min_p: only tokens at least this times as likely as the likeliest.
    frequency_penalty: subtracted from a token's logit for every time it was sampled.
    presence_penalty: subtracted once from the logits of tokens that were sampled.
    repetition_penalty: positive logits of sampled tokens are divided by it, negative multiplied.
    stop_token_ids: end the generation, besides the model's own.
    stop_strings: end the generation where its text holds one.
    ignore_eos: sample on past every stop token (SGLang: also past `stop_token_ids`).
    seed: 64 bits, or None for one of the engine's own.
    return_logprob: whether the reply carries logprobs.
    logprob_start: first prompt position to score, or None for none.
    top_logprobs_num: alternatives per scored token, of prompt and output.
    return_routed_experts: whether the reply carries the experts of every token but the last,
    routed_experts_start: from this one on.
    extra_key: prompts share cache only under equal keys.
    stream: whether progress is reported before the end.
    skip_special_tokens: leave special tokens out of `text`.
    no_stop_trim: keep the stop token or string in `text`.
  """

  rid: str
  input_ids: Sequence[int]
  max_new_tokens: int
  temperature: float
  min_new_tokens: int = 0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  frequency_penalty: float = 0.0
  presence_penalty: float = 0.0
  repetition_penalty: float = 1.0
  stop_token_ids: frozenset[int] = frozenset()
  stop_strings: tuple[str, ...] = ()
  ignore_eos: bool = False
  seed: int | None = None
  return_logprob: bool = False
  logprob_start: int | None = None
  top_logprobs_num: int = 0
  return_routed_experts: bool = False
  routed_experts_start: int = 0
  extra_key: str = ""
  stream: bool = False
  skip_special_tokens: bool = True
  no_stop_trim: bool = False

  @property
  def filters(self) -> bool:
    """Whether some tokens are excluded from sampling."""
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

  @property
  def penalizes(self) -> bool:
    """Whether logits depend on what was sampled."""
    return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)
