"""The records that travel round the ring, and the schema of the RolloutLog.

    Task -> Rollout -> RolloutLog (TrajectoryRecord, Manifest) -> Batch -> train step -> weights

Everything here is plain data: standard library, NumPy and msgspec only. Every process of a run
(trainer, orchestrator, worker, server) may import this module; it imports nothing of ours.

Conventions that hold everywhere (contract 1 and 2 of the design):

- A `Trajectory` is one flat branch of tokens. `inference_logprobs[t]` scores `tokens[t]` under the
  policy that sampled it, after temperature. A token that was not sampled (prompt, tool result) has
  logprob 0.0, loss mask False and policy version `NOT_SAMPLED`.
- Weights v0 are the initial ones; step n starts from v(n-1) and makes v(n). The staleness of a
  token trained in step n is (n-1) - its version; of a rollout, that of its oldest sampled token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")

NOT_SAMPLED = -1
"""Policy version of a token that no policy sampled."""

LOG_SCHEMA = 1
"""Version of the RolloutLog's record schema, written into every manifest."""

COMPONENTS = ("rl", "ce", "ref_kl")
"""The loss components that a token's weight may be given for."""


class RouterShape(msgspec.Struct, frozen=True, kw_only=True):
  """What a model's routers choose of: the shape of recorded and replayed choices.

  Attributes:
    num_layers: layers of the model.
    num_dense_layers: the first so many choose nothing.
    num_experts: E, experts of each other layer; at most 65,536.
    num_experts_per_token: A, how many of them a token uses.
  """

  num_layers: int
  num_dense_layers: int
  num_experts: int
  num_experts_per_token: int

  @property
  def num_moe_layers(self) -> int:
    """Layers that choose."""
    return self.num_layers - self.num_dense_layers

  @property
  def dtype(self) -> type[np.unsignedinteger]:
    """The smallest dtype that holds every expert's id."""
    return np.uint8 if self.num_experts <= 256 else np.uint16


Message = Mapping[str, Any]
"""One chat message in the OpenAI form: `role`, `content`, also `tool_calls`, `tool_call_id`."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
  """A prompt and what its verifier needs.

  Attributes:
    task_id: unique and stable over runs, e.g. `reverse_text/train/17`.
    environment: name of the environment in the run's mix.
    prompt: the opening messages.
    info: what the verifier needs (answer, tests, ...); never shown to the model.
    agent: the part that the policy plays in it, where an environment has several; baselines that
      are kept by agent tell parts apart. Empty: there is one.
  """

  task_id: str
  environment: str
  prompt: Sequence[Message]
  info: Mapping[str, Any] = {}
  agent: str = ""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
  """What a server sampled for one request.

  Attributes:
    tokens: int32[T], the sampled ids (a stop token included).
    inference_logprobs: float32[T], natural log, of the temperature-scaled full softmax.
    policy_versions: int32[T], the weights each token was sampled with.
    finish_reason: `stop`, `length` or `abort`.
    server: address of the server that made the last token.
    servers: every server that made tokens of it, in order; empty where only the last is known.
    reprefilled_tokens: tokens known to a server before that one had to compute again.
    routed_experts: optional uint8 or uint16[R, MoE layers, A]: the experts of the R tokens before
      the last one, in order, whose experts the caller did not have yet.
  """

  tokens: np.ndarray
  inference_logprobs: np.ndarray
  policy_versions: np.ndarray
  finish_reason: str
  server: str
  servers: Sequence[str] = ()
  reprefilled_tokens: int = 0
  routed_experts: np.ndarray | None = None


def joined(pieces: Sequence[Generation], finish_reason: str, reprefilled_tokens: int) -> Generation:
  """Pieces of one generation, at least one and in order, as one."""
  made = [piece for piece in pieces if piece.tokens.size] or pieces[-1:]
  servers = dict.fromkeys(url for piece in made for url in piece.servers or (piece.server,))
  experts = [piece.routed_experts for piece in pieces if piece.routed_experts is not None]
  return Generation(
    tokens=np.concatenate([piece.tokens for piece in pieces]),
    inference_logprobs=np.concatenate([piece.inference_logprobs for piece in pieces]),
    policy_versions=np.concatenate([piece.policy_versions for piece in pieces]),
    finish_reason=finish_reason,
    server=made[-1].server,
    servers=tuple(servers),
    reprefilled_tokens=reprefilled_tokens,
    routed_experts=np.concatenate(experts) if experts else None,
  )


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
  """One flat token branch of a rollout (contract 1).

  Attributes:
    tokens: int32[T].
    loss_mask: bool[T], True where the token was sampled and is trained on.
    inference_logprobs: float32[T]; 0.0 where not sampled.
    policy_versions: int32[T]; `NOT_SAMPLED` where not sampled.
    temperature: the sampling temperature of the branch; the trainer divides its logits by it.
    routed_experts: optional uint8 or uint16[R, MoE layers, A], R <= T: the server's choice of
      experts for the first R tokens. Of the last token there is none: nobody computed it.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  inference_logprobs: np.ndarray
  policy_versions: np.ndarray
  temperature: float
  routed_experts: np.ndarray | None = None

  def check(self) -> None:
    """Raises ValueError where the arrays break contract 1 (lengths, dtypes, unsampled tokens)."""
    length = self.tokens.shape
    for field, dtype in (
      ("tokens", np.int32),
      ("loss_mask", np.bool_),
      ("inference_logprobs", np.float32),
      ("policy_versions", np.int32),
    ):
      array = getattr(self, field)
      if array.shape != length or array.ndim != 1 or array.dtype != dtype:
        raise ValueError(
          f"Trajectory.{field}: expected {np.dtype(dtype)}{list(length)}, "
          f"got {array.dtype}{list(array.shape)}"
        )
    unsampled = self.policy_versions == NOT_SAMPLED
    if np.any(self.loss_mask & unsampled) or np.any(self.inference_logprobs[unsampled] != 0.0):
      raise ValueError("Trajectory: a token that was not sampled has mask False and logprob 0.0")
    if not np.all(np.isfinite(self.inference_logprobs)):
      raise ValueError("Trajectory.inference_logprobs: expected finite values, got NaN or inf")
    experts = self.routed_experts
    if experts is not None and (
      experts.ndim != 3 or experts.dtype not in (np.uint8, np.uint16) or len(experts) > length[0]
    ):
      raise ValueError(
        f"Trajectory.routed_experts: expected uint8 or uint16[at most {length[0]}, layers, experts "
        f"per token], got {experts.dtype}{list(experts.shape)}"
      )


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
  """One attempt at a task, complete, as its worker holds it until it is batched.

  Attributes:
    rollout_id: unique in the run, in dispatch order.
    group_id: the group (G rollouts of one task) it belongs to.
    sample: its index in the group, 0 <= sample < G.
    task_id: the task attempted.
    environment: its environment's name.
    trajectories: its token branches, in order.
    reward: the score; None where the attempt failed (contract 4: never 0 instead).
    metrics: further scores by name, for the logs only.
    error: why it failed, or None.
    truncated: whether a generation of it ended for length.
    agent: the part that the policy played; see `Task`.
  """

  rollout_id: int
  group_id: int
  sample: int
  task_id: str
  environment: str
  trajectories: Sequence[Trajectory]
  reward: float | None
  metrics: Mapping[str, float] = {}
  error: str | None = None
  truncated: bool = False
  agent: str = ""


class Group(msgspec.Struct, frozen=True, kw_only=True):
  """The rollouts of one task that share a baseline."""

  group_id: int
  task_id: str
  rollouts: Sequence[Rollout]


class TrajectoryRecord(msgspec.Struct, frozen=True, kw_only=True):
  """One record of a RolloutLog shard: a trajectory with what the trainer needs to learn from it.

  Attributes:
    step: the training step that it is for.
    rollout_id: its rollout.
    group_id: its rollout's group.
    branch: its number among the rollout's trajectories.
    task_id: the task attempted.
    environment: its environment's name.
    reward: of the rollout, as the environment gave it.
    advantage: of the rollout.
    trajectory: the tokens.
    token_weights: by loss component, one of `COMPONENTS`, float32[T]: what the token's loss in that
      component is multiplied by; 0 leaves it out of the component and of its denominator. A
      component that is not named has weight 1 on every loss-masked token.
  """

  step: int
  rollout_id: int
  group_id: int
  branch: int
  task_id: str
  environment: str
  reward: float
  advantage: float
  trajectory: Trajectory
  token_weights: Mapping[str, np.ndarray] = {}

  def check(self) -> None:
    """Raises ValueError where the trajectory or the token weights are not what they should be."""
    self.trajectory.check()
    shape = self.trajectory.tokens.shape
    for key, weights in self.token_weights.items():
      if key not in COMPONENTS:
        raise ValueError(f"token_weights: expected components of {COMPONENTS}, got {key!r}")
      if not isinstance(weights, np.ndarray):
        raise ValueError(f"token_weights[{key!r}]: expected a NumPy array, got {weights!r}")
      if weights.shape != shape or weights.dtype != np.float32:
        raise ValueError(
          f"token_weights[{key!r}]: expected float32{list(shape)}, "
          f"got {weights.dtype}{list(weights.shape)}"
        )
      if not np.all(np.isfinite(weights)):
        raise ValueError(f"token_weights[{key!r}]: expected finite values, got NaN or inf")

  def component_tokens(self) -> dict[str, int]:
    """How many tokens each weighted component counts: those whose weight is not 0.

    `rl` and `ref_kl` live within the loss mask; `ce` on any token but the first, which nothing
    predicts.
    """
    counts = {}
    for key, weights in self.token_weights.items():
      counted = weights[1:] != 0
      if key != "ce":
        counted = (weights != 0) & self.trajectory.loss_mask
      counts[key] = int(counted.sum())
    return counts


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
  """What the manifest knows of one shard; enough to plan packing without opening it.

  Attributes:
    file: name inside the step's directory.
    bytes: size of the file.
    crc32: checksum of the whole file.
    lengths: tokens of each record, in record order.
    loss_tokens: loss-masked tokens of each record.
    component_tokens: by loss component that the run weights by token, the tokens of each record
      whose weight is not 0 (`TrajectoryRecord.component_tokens`).
  """

  file: str
  bytes: int
  crc32: int
  lengths: Sequence[int]
  loss_tokens: Sequence[int]
  component_tokens: Mapping[str, Sequence[int]] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
  """The commit record of one step's batch: its rename into place publishes the batch.

  Attributes:
    step: the training step that this batch is for (1-based).
    shards: the step's files, in the order in which their records are numbered.
    num_rollouts: trained rollouts in the batch.
    num_groups: groups they come from.
    loss_tokens: global denominator of the loss (contract 5).
    oldest_version: smallest policy version among the trained tokens.
    newest_version: largest.
    metrics: orchestrator metrics of the step (rewards, counts, staleness, ...).
    scheduler_state: what the scheduler needs to go on from here after a restart.
    schema: version of the record schema.
  """

  step: int
  shards: Sequence[ShardEntry]
  num_rollouts: int
  num_groups: int
  loss_tokens: int
  oldest_version: int
  newest_version: int
  metrics: Mapping[str, float]
  scheduler_state: Mapping[str, Any]
  schema: int = LOG_SCHEMA


def _encode_array(value: Any) -> Any:
  if isinstance(value, np.ndarray):
    return [value.dtype.str, list(value.shape), value.tobytes()]
  if isinstance(value, np.generic):
    return value.item()
  raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
  if kind is np.ndarray:
    dtype, shape, data = value
    return np.frombuffer(data, dtype=dtype).reshape(shape)
  raise NotImplementedError(f"cannot decode {kind.__name__}")


def encode(record: msgspec.Struct) -> bytes:
  """Encodes any record of this module as MessagePack; arrays keep dtype and shape."""
  return msgspec.msgpack.encode(record, enc_hook=_encode_array)


def decode(data: bytes, kind: type[T]) -> T:
  """Decodes what `encode` wrote; raises msgspec.ValidationError on data of another shape."""
  return msgspec.msgpack.decode(data, type=kind, dec_hook=_decode_array)
