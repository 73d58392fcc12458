"""What goes to the device and comes back: the arrays of one prefill and of one decode call.

The batcher fills them with NumPy; inside the compiled functions of `device` the same records hold
traced arrays. S slots, R rows of a prefill call, T tokens of a row.
"""

from typing import Any, NamedTuple

import numpy as np

PADDING_SEGMENT = 0
REAL_SEGMENT = 1

Array = Any
"""NumPy on the host, a traced array inside a compiled step."""


class Sampled(NamedTuple):
  """What a device call hands back for each of its rows R.

  Attributes:
    tokens_R: int32, the sampled ids.
    logprobs_R: float32, of the sampled ids under the temperature-scaled full softmax.
    input_logprobs_RT: float32, of the ids that follow each input token, at temperature 1; None
      where the call was not asked for them.
  """

  tokens_R: Array
  logprobs_R: Array
  input_logprobs_RT: Array | None = None


class Sampling(NamedTuple):
  """How each row R samples its next token.

  Attributes:
    seeds_R2: uint32, high and low word of the request's seed.
    positions_R: int32, how many tokens the request has sampled so far.
    temperatures_R: float32, 0 is greedy.
  """

  seeds_R2: Array
  positions_R: Array
  temperatures_R: Array


class Decode(NamedTuple):
  """One token for every slot S; a slot that does not decode has segment `PADDING_SEGMENT`."""

  tokens_S: Array
  positions_S: Array
  segments_S: Array
  sampling: Sampling


class Prefill(NamedTuple):
  """A chunk of prompt for each of R rows, [R, T].

  Attributes:
    tokens_RT: int32.
    positions_RT: int32.
    segments_RT: int32, `PADDING_SEGMENT` where there is no token.
    targets_RT: int32, the id that follows each token in its prompt, 0 where there is none.
    slots_R: int32, the slot whose cache the row writes.
    last_R: int32, index of the row's last token in its chunk; the next token is sampled there.
    sampling: how the next token is sampled; meaningful only where the chunk ends its prompt.
  """

  tokens_RT: Array
  positions_RT: Array
  segments_RT: Array
  targets_RT: Array
  slots_R: Array
  last_R: Array
  sampling: Sampling


def empty_sampling(rows: int) -> Sampling:
  return Sampling(
    np.zeros((rows, 2), np.uint32), np.zeros(rows, np.int32), np.zeros(rows, np.float32)
  )
