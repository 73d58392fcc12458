"""The experts that a server chose, out of its reply: for router replay.

Place in the ring: `/generate` of a server started with `--enable-return-routed-experts` -> this
module -> Generation -> Trajectory -> RolloutLog -> the train step, which takes the same experts.
A server tells them as base64 of int32 [tokens, layers, A], for the prompt from
`routed_experts_start_len` on and the output but its last token, layers without experts as zeros.
"""

import base64
import binascii
import itertools

import msgspec
import numpy as np

from intellect3.inference.protocol import GenerateReply, GenerateRequest, ProtocolError
from intellect3.types import Generation, RouterShape


class RoutedExpertsMissing(ProtocolError):
  """The server did not return the experts it was asked for."""


def add(
  piece: Generation, reply: GenerateReply, request: GenerateRequest, router: RouterShape
) -> Generation:
  """Gives a piece the experts that its reply tells.

  Args:
    piece: what was kept of the reply's output.
    reply: the server's.
    request: what was asked; its `routed_experts_start_len` tokens are known already.
    router: the shape of the model's choices.

  Returns:
    The piece with the experts of all further tokens of prompt and kept output but the last; with
    none where no token was sampled.

  Raises:
    RoutedExpertsMissing: the reply tells none.
    ProtocolError: what it tells cannot be such a choice.
  """
  if not piece.tokens.size:
    return piece
  told = reply.meta_info.routed_experts
  if not told:
    raise RoutedExpertsMissing(
      "routed_experts: expected the experts of each token, got none; the server needs "
      "--enable-return-routed-experts"
    )
  start = request.routed_experts_start_len or 0
  computed = len(request.input_ids) - 1 - start
  experts_TLA = decode(told, tokens=computed + len(reply.output_ids), router=router)
  return msgspec.structs.replace(piece, routed_experts=experts_TLA[: computed + piece.tokens.size])


def decode(told: str, *, tokens: int, router: RouterShape) -> np.ndarray:
  """Reads and checks what a server tells.

  Args:
    told: base64 of int32 [tokens, layers, A].
    tokens: how many it must be of.
    router: the shape of the model's choices.

  Returns:
    uint8 or uint16 [tokens, MoE layers, A]; layers without experts are left out.

  Raises:
    ProtocolError: it is no base64, of another size, names an expert that there is not, names one
      twice for a token, or gives experts to a layer without.
  """
  try:
    data = base64.b64decode(told, validate=True)
  except (binascii.Error, ValueError) as error:
    raise ProtocolError(f"routed_experts: expected base64, got {told[:20]!r}: {error}") from error
  active = router.num_experts_per_token
  shape = (tokens, router.num_layers, active)
  if len(data) != 4 * tokens * router.num_layers * active:
    raise ProtocolError(
      f"routed_experts: expected int32{list(shape)}, {4 * np.prod(shape)} bytes, got {len(data)}"
    )
  whole_TLA = np.frombuffer(data, np.dtype("<i4")).reshape(shape)
  if whole_TLA[:, : router.num_dense_layers].any():
    raise ProtocolError(
      f"routed_experts: expected zeros in the first {router.num_dense_layers} layers, which have "
      "no experts, got others"
    )
  told_TLA = whole_TLA[:, router.num_dense_layers :]
  if told_TLA.size and (told_TLA.min() < 0 or told_TLA.max() >= router.num_experts):
    raise ProtocolError(
      f"routed_experts: expected experts in [0, {router.num_experts}), "
      f"got {told_TLA.min()} to {told_TLA.max()}"
    )
  experts_TLA = told_TLA.astype(router.dtype)
  columns = [np.ascontiguousarray(experts_TLA[..., index]) for index in range(active)]
  if any(np.any(a == b) for a, b in itertools.combinations(columns, 2)):
    raise ProtocolError("routed_experts: expected different experts for each token, got one twice")
  return experts_TLA
