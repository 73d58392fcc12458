"""Checkpoints: the train state, the position in the data, and what they were made on (Orbax).

Saving is asynchronous: the arrays are copied, then written while training goes on. A checkpoint
that was not finished is not there, so a resumed run goes on from the last whole one.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp

from intellect3.training.state import TrainState

CHUNK_BYTES = 64 << 20
"""Most bytes of a stored chunk of an array, cut between layers and experts: who reads a checkpoint
part by part (`tools.convert_checkpoint`) holds one."""


class Data(Protocol):
  """The iterator of the batches, as far as a checkpoint is concerned."""

  def get_state(self) -> dict[str, Any]:
    """Its position, of what JSON holds; the same on every process."""
    ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a position."""
    ...


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held; the data iterator was moved in place."""

  step: int
  state: TrainState
  meta: dict[str, Any]


def machine() -> dict[str, Any]:
  """What bit-for-bit repetition depends on: devices, their number, processes and threads."""
  return {
    "device_kind": jax.devices()[0].device_kind,
    "device_count": jax.device_count(),
    "process_count": jax.process_count(),
    "cpu_threads": len(os.sched_getaffinity(0)),
    "jax": jax.__version__,
  }


class Checkpointer:
  """Writes and reads the checkpoints of one run; close it."""

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
    """Opens a directory of checkpoints, making it where it is missing.

    Args:
      directory: e.g. `RUN/checkpoints`.
      keep: how many to keep, at least 1.
    """
    if keep < 1:
      raise ValueError(f"keep: expected at least 1, got {keep}")
    self._manager = ocp.CheckpointManager(
      pathlib.Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
      ),
    )

  def latest_step(self) -> int | None:
    """The step of the last whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(
    self,
    state: TrainState,
    data: Data,
    meta: Mapping[str, Any] | None = None,
  ) -> None:
    """Begins to save; returns as soon as `state` may be changed or donated again.

    Args:
      state: after its step.
      data: the iterator, about to give the next step's batch.
      meta: anything JSON holds, returned by `restore`.
    """
    step = int(state.step)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state, save_args=jax.tree.map(_chunks, state)),
        # Not Grain's own format, which keeps a file per process: the position is one for all, and
        # a run may go on with another number of processes.
        data=ocp.args.JsonSave(data.get_state()),
        meta=ocp.args.JsonSave({"machine": machine(), "meta": dict(meta or {})}),
      ),
    )

  def restore(self, target: TrainState, data: Data, *, step: int | None = None) -> Restored:
    """Reads the last whole checkpoint.

    Args:
      target: shapes, dtypes and shardings to restore to (`state.abstract`, or a state); they may
        lie otherwise on the devices than when saved.
      data: moved to the checkpoint's position.
      step: which checkpoint; None takes the last.

    Returns:
      The state and the meta data. Warns where the machine differs from the one that saved: the run
      then goes on soundly, but not bit for bit.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f"{self._manager.directory}: there is no checkpoint")
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        data=ocp.args.JsonRestore(),
        meta=ocp.args.JsonRestore(),
      ),
    )
    data.set_state(restored["data"])
    before, now = restored["meta"]["machine"], machine()
    changed = [
      f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
      warnings.warn(
        f"checkpoint {step}: resumed on another machine ({', '.join(changed)}): "
        "the run does not repeat bit for bit",
        stacklevel=2,
      )
    return Restored(step=step, state=restored["state"], meta=restored["meta"]["meta"])

  def wait(self) -> None:
    """Waits until what was begun is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for what was begun and frees the threads."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _chunks(leaf: jax.Array) -> ocp.SaveArgs:
  # Stacks of matrices: [layers, ..] and [layers, experts, ..].
  stacked = max(leaf.ndim - 2, 0)
  return ocp.SaveArgs(shard_axes=tuple(range(stacked)), chunk_byte_size=CHUNK_BYTES)
