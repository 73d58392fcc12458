"""What goes to the device and comes back: the arrays of one prefill and of one decode call.

The batcher fills them with NumPy; inside the compiled functions of `device` the same records hold
traced arrays. S slots, R rows of a prefill call, T tokens of a row, W pages of a page table, J stop
ids, N steps of a decode call.
"""

from typing import Any, NamedTuple

import numpy as np

MAX_STOP_IDS = 32
"""J: stop ids of a request, the model's own included, that the device knows of. Further ones end a
generation too, but are noticed after the call."""

NO_ID = np.int32(2**31 - 1)
"""Fills the room for stop ids; outside every vocabulary."""

Array = Any
"""NumPy on the host, a traced array inside a compiled step."""


class Sampling(NamedTuple):
  """How each row R samples its next token; `Request` has the meaning of the parameters.

  Attributes:
    seeds_R2: uint32, high and low word of the request's seed.
    positions_R: int32, how many tokens the request has sampled so far.
    temperatures_R: float32, 0 is greedy.
    top_k_R: int32, 0 for all.
    top_p_R, min_p_R: float32, 1 and 0 for all.
    frequency_R, presence_R, repetition_R: float32 penalties, 0, 0 and 1 for none.
    min_new_R: int32.
    stops_RJ: int32, the stop ids, `NO_ID` where there is none.
    filters: bool, whether any row has a top_k, top_p or min_p.
    penalizes: bool, whether any row has a penalty.
    top: bool, whether any row wants alternatives.
  """

  seeds_R2: Array
  positions_R: Array
  temperatures_R: Array
  top_k_R: Array
  top_p_R: Array
  min_p_R: Array
  frequency_R: Array
  presence_R: Array
  repetition_R: Array
  min_new_R: Array
  stops_RJ: Array
  filters: Array
  penalizes: Array
  top: Array


class Decode(NamedTuple):
  """Up to N tokens for every slot S.

  Attributes:
    tokens_S: int32, the token that each slot takes in first.
    positions_S: int32, its position.
    remaining_S: int32, most tokens that the slot may sample; 0 where it does not decode.
    ends_S: bool, whether a stop id ends the slot's generation.
    tables_SW: int32, the pages of each slot's sequence.
    steps: int32, at most N.
    quorum: int32, the call ends early when fewer slots than that go on.
    sampling: of the slots.
  """

  tokens_S: Array
  positions_S: Array
  remaining_S: Array
  ends_S: Array
  tables_SW: Array
  steps: Array
  quorum: Array
  sampling: Sampling


class Prefill(NamedTuple):
  """A chunk of prompt for each of R rows; several rows may be of one sequence.

  Attributes:
    tokens_RT: int32.
    positions_RT: int32.
    valid_RT: bool, whether there is a token.
    targets_RT: int32, the id that follows each token in its prompt, 0 where there is none.
    slots_R: int32, the row's slot.
    tables_RW: int32, the pages of the row's sequence.
    last_R: int32, index of the row's last token in its chunk; the next token is sampled there.
    samples_R: bool, whether the row ends its prompt, so that the sample means something.
    score: bool, whether any row wants the logprobs of its targets.
    sampling: of the rows.
  """

  tokens_RT: Array
  positions_RT: Array
  valid_RT: Array
  targets_RT: Array
  slots_R: Array
  tables_RW: Array
  last_R: Array
  samples_R: Array
  score: Array
  sampling: Sampling


class Top(NamedTuple):
  """The likeliest tokens at a position, likeliest first: logprobs float32 and ids int32 [.., M]."""

  logprobs: Array
  ids: Array


class Prefilled(NamedTuple):
  """What a prefill call hands back.

  Attributes:
    tokens_R: int32, the sampled ids.
    logprobs_R: float32, of the sampled ids under the temperature-scaled full softmax.
    top: alternatives to them, [R, M]; None where no row wants them.
    input_logprobs_RT: float32, of the targets, at temperature 1; None where no row wants them.
    input_top: alternatives to the targets, [R, T, M]; None where no row wants them.
    experts_LRTA: int32, the experts of every token; None where the server does not return them.
  """

  tokens_R: Array
  logprobs_R: Array
  top: Top | None
  input_logprobs_RT: Array | None
  input_top: Top | None
  experts_LRTA: Array | None


class Decoded(NamedTuple):
  """What a decode call hands back: the first `lengths_S` steps of each slot are real.

  Attributes:
    tokens_NS: int32, the sampled ids.
    logprobs_NS: float32.
    lengths_S: int32.
    top: alternatives, [N, S, M], or None.
    experts_NLSA: int32, the experts of the tokens taken in, or None.
  """

  tokens_NS: Array
  logprobs_NS: Array
  lengths_S: Array
  top: Top | None
  experts_NLSA: Array | None


def empty_sampling(rows: int) -> Sampling:
  return Sampling(
    seeds_R2=np.zeros((rows, 2), np.uint32),
    positions_R=np.zeros(rows, np.int32),
    temperatures_R=np.zeros(rows, np.float32),
    top_k_R=np.zeros(rows, np.int32),
    top_p_R=np.ones(rows, np.float32),
    min_p_R=np.zeros(rows, np.float32),
    frequency_R=np.zeros(rows, np.float32),
    presence_R=np.zeros(rows, np.float32),
    repetition_R=np.ones(rows, np.float32),
    min_new_R=np.zeros(rows, np.int32),
    stops_RJ=np.full((rows, MAX_STOP_IDS), NO_ID, np.int32),
    filters=np.bool_(False),
    penalizes=np.bool_(False),
    top=np.bool_(False),
  )
