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

import msgspec
import numpy as np

from intellect3.inference import tensor_wire
from intellect3.inference.control import ControlError, Outcome, ServerControl
from intellect3.inference.protocol import UNCHECKED
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
  """The encoded buckets of one version, shared by the servers it is brought to."""

  def __init__(
    self,
    names: Sequence[Sequence[str]],
    read: Callable[[Sequence[str]], Sequence[tuple[str, np.ndarray]]],
  ):
    """Args: names: of each bucket's tensors. read: gives the tensors of these names."""
    self._names = names
    self._read = read
    self._encoded: OrderedDict[tuple, asyncio.Task[bytes]] = OrderedDict()

  def __len__(self) -> int:
    return len(self._names)

  async def get(self, index: int, *, version: int, flush: bool, ranks: int) -> bytes:
    """The body of the call that brings one bucket, encoded in a thread.

    Args:
      index: of the bucket.
      version: is told with the last one. Until then tokens are stamped as unchecked: SGLang changes
        its weights with every bucket.
      flush: drop cached prefixes with the last one.
      ranks: of tensor parallelism; each reads an entry of its own, and all are the same.

    Raises:
      ControlError: it cannot be read.
    """
    key = (index, version, flush, ranks)
    if key not in self._encoded:
      self._encoded[key] = asyncio.ensure_future(asyncio.to_thread(self._encode, *key))
      while len(self._encoded) > KEPT:
        self._encoded.popitem(last=False)
    task = self._encoded[key]
    try:
      # Shielded: one server's end must not take the bucket from the others.
      return await asyncio.shield(task)
    except (OSError, ValueError) as error:
      if self._encoded.get(key) is task:  # the next one tries again
        del self._encoded[key]
      raise ControlError(f"bucket {index} cannot be read: {error}") from error

  def _encode(self, index: int, version: int, flush: bool, ranks: int) -> bytes:
    payload = tensor_wire.write(self._read(self._names[index]))
    last = index == len(self._names) - 1
    return msgspec.json.encode(
      {
        "serialized_named_tensors": [payload] * ranks,
        "flush_cache": flush and last,
        "weight_version": str(version) if last else f"{UNCHECKED}{version}",
      }
    )


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
      body = await buckets.get(index, version=version, flush=flush, ranks=ranks)
      await control.update(url, "/update_weights_from_tensor", body)
    await control.update(url, "/end_weight_update", {})
  except BaseException:
    # Half of a version must not be served; and a session left open would refuse the next one.
    with contextlib.suppress(TransportError):
      await control.discard_update(url)
    raise
