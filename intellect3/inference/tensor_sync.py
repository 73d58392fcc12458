"""Pushes weights to servers over HTTP, for servers that share no disk with the trainer.

Between `/begin_weight_update` and `/end_weight_update`, in buckets of tensors
(`/update_weights_from_tensor`, `tensor_wire`). Every server takes the buckets at its own pace; each
bucket is encoded once while the servers keep near each other, and again for one that falls far
behind, so a slow or hanging server neither holds the others up nor makes memory grow.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from intellect3.inference import tensor_wire
from intellect3.inference.control import ControlError, Outcome, ServerControl
from intellect3.inference.protocol import ProtocolError
from intellect3.inference.transport import TransportError
from intellect3.inference.weight_sync import Load

KEPT = 4
"""Encoded buckets that are kept for servers that are a little behind."""


def plan_buckets(sizes: Sequence[tuple[str, int]], bucket_bytes: int) -> list[list[str]]:
  """Which tensors travel together: in order, each bucket full but for a tensor that is larger.

  Args:
    sizes: (name, bytes) of every tensor.
    bucket_bytes: most bytes of a bucket of more than one tensor.

  Returns:
    The names of each bucket.
  """
  if bucket_bytes < 1:
    raise ValueError(f"bucket_bytes: expected at least 1, got {bucket_bytes}")
  buckets: list[list[str]] = []
  room = 0
  for name, size in sizes:
    if not buckets or size > room:
      buckets.append([])
      room = bucket_bytes
    buckets[-1].append(name)
    room -= size
  return buckets


class Buckets:
  """The encoded buckets of one version."""

  def __init__(
    self,
    names: Sequence[Sequence[str]],
    read: Callable[[Sequence[str]], Sequence[tuple[str, np.ndarray]]],
  ):
    """Args: names: of each bucket's tensors. read: gives the tensors of these names."""
    self._names = names
    self._read = read
    self._encoded: OrderedDict[int, asyncio.Task[str]] = OrderedDict()

  def __len__(self) -> int:
    return len(self._names)

  async def get(self, index: int) -> str:
    """One bucket's payload, encoded in a thread; ControlError where it cannot be read."""
    if index not in self._encoded:
      self._encoded[index] = asyncio.ensure_future(asyncio.to_thread(self._encode, index))
      while len(self._encoded) > KEPT:
        self._encoded.popitem(last=False)
    try:
      # Shielded: one server's end must not take the bucket from the others.
      return await asyncio.shield(self._encoded[index])
    except (OSError, ValueError) as error:
      raise ControlError(f"bucket {index} cannot be read: {error}") from error

  def _encode(self, index: int) -> str:
    return tensor_wire.write(self._read(self._names[index]))


def from_tensors(buckets: Buckets, version: int) -> Load:
  """Loads by pushing tensors; the version is told with the last bucket."""

  async def load(control: ServerControl, url: str, flush: bool) -> Outcome[None]:
    clock = asyncio.get_running_loop().time
    started = clock()
    told = (await control.server_info(urls=[url]))[url]
    info = told.value
    if info is None:
      return Outcome(None, told.error, clock() - started, told.answered)
    outcome = await control.on_each(
      lambda each: _push(control, each, buckets, version, flush, ranks=info.tp_size), [url]
    )
    return outcome[url]

  return load


async def _push(
  control: ServerControl, url: str, buckets: Buckets, version: int, flush: bool, *, ranks: int
) -> None:
  await control.update(url, "/begin_weight_update", {})
  try:
    for index in range(len(buckets)):
      last = index == len(buckets) - 1
      # Every tensor-parallel rank reads an entry of its own; here all are the same.
      body = {
        "serialized_named_tensors": [await buckets.get(index)] * ranks,
        "flush_cache": flush and last,
        **({"weight_version": str(version)} if last else {}),
      }
      await control.update(url, "/update_weights_from_tensor", body)
  except BaseException:
    # A session left open would refuse the next one; the server is fenced for what it holds now.
    with contextlib.suppress(TransportError, ControlError, ProtocolError):
      await control.update(url, "/end_weight_update", {})
    raise
  await control.update(url, "/end_weight_update", {})
