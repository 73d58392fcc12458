"""What orchestrator and workers say to each other. Metadata only: no token ever travels here.

A dispatch is some 200 bytes and a summary some 300, so one asyncio process carries thousands of
rollouts; token arrays stay in the worker that made them until it writes them to the log.
"""

from collections.abc import Mapping, Sequence

import msgspec

from intellect3 import types


class Dispatch(msgspec.Struct, frozen=True, kw_only=True, tag="dispatch"):
  """Start a rollout.

  `purpose` is `train` or `eval`; an eval rollout is scored and forgotten, never logged. `seed`
  fixes every random choice of the rollout (contract 10). `attempt` grows from one process that has
  the rollout to the next; from 1 on, one before may have left a journal of it.
  """

  rollout_id: int
  group_id: int
  sample: int
  environment: str
  split: str
  index: int
  seed: int
  temperature: float
  purpose: str = "train"
  attempt: int = 0

  @property
  def continued(self) -> bool:
    """Whether another process had it before."""
    return self.attempt > 0


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
  """Stop these rollouts and forget them; no summary is expected."""

  rollout_ids: Sequence[int]


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
  """These finished rollouts will not be batched."""

  rollout_ids: Sequence[int]


class BatchItem(msgspec.Struct, frozen=True, array_like=True):
  """A rollout to be logged, with its advantage."""

  rollout_id: int
  advantage: float


class WriteBatch(msgspec.Struct, frozen=True, kw_only=True, tag="write_batch"):
  """Write your rollouts of a step's batch; keep them until told to forget them.

  Tokens of versions below `oldest_version` lose their loss mask (staleness rule `mask`). A batch
  that is planned again, because a worker died meanwhile, has a higher `attempt`.
  """

  step: int
  attempt: int
  items: Sequence[BatchItem]
  oldest_version: int


class Servers(msgspec.Struct, frozen=True, kw_only=True, tag="servers"):
  """The servers that may be used, and the version of the weights that each has."""

  versions: Mapping[str, int]


class Loads(msgspec.Struct, frozen=True, kw_only=True, tag="loads"):
  """What servers say they have, of all their clients: (running, waiting) by url."""

  loads: Mapping[str, tuple[int, int]]


class Fence(msgspec.Struct, frozen=True, kw_only=True, tag="fence"):
  """Use this server no more, and fail what it made with `version` or newer."""

  url: str
  version: int
  reason: str


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
  """The run is over."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
  """A worker is ready; `sizes` are its environments' task counts by `name/split`."""

  worker: str
  sizes: Mapping[str, int]


class RolloutSummary(msgspec.Struct, frozen=True, kw_only=True, tag="summary"):
  """What the orchestrator needs to know of a finished rollout.

  `reward` is None exactly where `error` is set. Versions are those of sampled tokens.
  `reprefilled_tokens`: tokens of the conversation that a server had to compute again.
  `agent`: the part that the policy played, of `types.Task.agent`.
  """

  rollout_id: int
  group_id: int
  purpose: str
  environment: str
  reward: float | None
  error: str | None
  truncated: bool
  lengths: Sequence[int]
  sampled_tokens: int
  oldest_version: int
  newest_version: int
  servers: Sequence[str]
  metrics: Mapping[str, float]
  seconds: float
  reprefilled_tokens: int = 0
  agent: str = ""


class BatchWritten(msgspec.Struct, frozen=True, kw_only=True, tag="batch_written"):
  """The worker's shard of an attempt at a step is closed and on disk."""

  step: int
  attempt: int
  worker: str
  shard: types.ShardEntry


class WorkerFailed(msgspec.Struct, frozen=True, kw_only=True, tag="worker_failed"):
  """The worker cannot go on (a full disk, a broken environment)."""

  worker: str
  reason: str


ToWorker = Dispatch | Cancel | Forget | WriteBatch | Servers | Loads | Fence | Shutdown
FromWorker = Hello | RolloutSummary | BatchWritten | WorkerFailed

_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
  """MessagePack of any message."""
  return _encoder.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
  """Raises msgspec.DecodeError on anything but a message to a worker."""
  return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
  """Raises msgspec.DecodeError on anything but a message from a worker."""
  return _from_worker.decode(data)
