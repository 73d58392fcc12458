"""The functions that the composition roots jit, lowered for a mesh that need not exist.

    rl_step    what `rl.trainer` compiles: (state, batch) -> (state, metrics)
    sft_step   what `sft` compiles
    logprobs   what `rl.reference` compiles: (params, batch) -> logprobs

Place in the ring: beside it. Every function comes from where the run takes it (`training.step`,
`training.scoring`, `training.layout`); tests/planning/test_programs.py holds them to the run's own,
text for text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from intellect3.models import kernel_choice, transformer
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing, placement
from intellect3.planning.job import Job
from intellect3.training import layout, scoring, step
from intellect3.training import state as states

NAMES = ("rl_step", "sft_step", "logprobs")


class Program(NamedTuple):
  """One function of a run and what it is called with.

  Attributes:
    name: one of `NAMES`.
    config: the model, with its kernels.
    function: jitted, with the run's shardings and donation.
    first: the train state or the parameters, a tree of `jax.ShapeDtypeStruct` on the mesh.
    batch: the batch, likewise.
    mesh: the mesh.
  """

  name: str
  config: ModelConfig
  function: Any
  first: Any
  batch: packing.Batch
  mesh: Mesh

  def lower(self) -> jax.stages.Lowered:
    """Traces the function and lowers it for the mesh's devices."""
    with jax.default_device(self.mesh.devices.flat[0]), jax.set_mesh(self.mesh):
      return self.function.lower(self.first, self.batch)


def names_of(job: Job) -> tuple[str, ...]:
  """The programs that a job has."""
  missing = {"rl_step": job.rl_loss is None, "sft_step": job.sft_loss is None}
  return tuple(name for name in NAMES if not missing.get(name))


def check(job: Job, names: Sequence[str], mesh: Mesh) -> None:
  """Raises ValueError for a program that the job does not have, or rows that do not divide."""
  for name in names:
    if name not in names_of(job):
      raise ValueError(f"program: expected one of {names_of(job)}, got {name!r}")
  placement.check_rows(mesh, micro_rows=job.micro_rows, row_length=job.row_length)


def make(job: Job, name: str, mesh: Mesh) -> Program:
  """One of a job's programs.

  Args:
    job: the run's parameters.
    name: one of `names_of(job)`.
    mesh: of `sharding.mesh.make_mesh`; its devices need not exist.

  Raises:
    ValueError: an unknown name, or a job that does not fit the mesh.
  """
  check(job, [name], mesh)
  scores = job.reference if name == "logprobs" else None
  with jax.set_mesh(mesh):
    config = kernel_choice.resolve(scores or job.model)
  # Shapes do not depend on the kernels, and one for a GPU refuses to be traced without it.
  shaped = dataclasses.replace(config, attention="plain", grouped_matmul="dense")
  batch = abstract_batch(job, mesh, config, reference=name == "rl_step")
  if name == "logprobs":
    function = layout.compile_scoring(
      scoring.make_batch_logprob_fn(
        config, micro_rows=job.micro_rows, head_chunk_size=job.head_chunk_size
      ),
      placement.row_sharding(mesh),
      mesh,
      job.rules,
    )
    shardings = layout.param_shardings(shaped, mesh, job.rules)
    params = _placed(transformer.abstract(shaped)[0], shardings)
    return Program(name, config, function.jitted, params, batch, mesh)
  shardings = layout.state_shardings(shaped, job.optimizer, mesh, job.rules)
  train_step = step.make_train_step(
    config,
    job.rl_loss if name == "rl_step" else step.supervised(job.sft_loss),
    job.optimizer,
    micro_rows=job.micro_rows,
    head_chunk_size=job.head_chunk_size,
    router_bias_rate=job.router_bias_rate,
    decoupled=job.decoupled and name == "rl_step",
  )
  function = layout.compile_step(train_step, shardings, mesh, job.rules)
  state = states.abstract(
    lambda: transformer.init(shaped, jax.random.key(0)), job.optimizer, shardings
  )
  return Program(name, config, function.jitted, state, batch, mesh)


def abstract_batch(
  job: Job, mesh: Mesh, config: ModelConfig, *, reference: bool = True
) -> packing.Batch:
  """A step's batch as `pipeline.placement.place` lays it on the mesh, without its data.

  Args:
    job: the run's parameters.
    mesh: the mesh.
    config: the model.
    reference: whether the run's reference model, if there is one, has scored it.
  """

  def rows(dtype: Any, *trailing: int) -> Any:
    return jax.ShapeDtypeStruct((job.rows, job.row_length, *trailing), dtype)

  count: Any = jax.ShapeDtypeStruct((), np.int32)
  batch: Any = packing.Batch(
    tokens=rows(np.int32),
    loss_mask=rows(np.bool_),
    inference_logprobs=rows(np.float32),
    advantages=rows(np.float32),
    temperature=rows(np.float32),
    policy_versions=rows(np.int32),
    segment_ids=rows(np.int32),
    positions=rows(np.int32),
    step=count,
    loss_tokens=count,
    loss_sequences=count,
  )
  if job.replay_routed_experts and reference:
    small = config.num_experts <= 256
    experts = (config.num_moe_layers, config.num_experts_per_token)
    batch = batch._replace(
      routed_experts=rows(np.uint8 if small else np.uint16, *experts),
      experts_recorded=rows(np.bool_),
    )
  if job.reference is not None and reference:
    batch = batch._replace(ref_logprobs=rows(np.float32))
  return _placed(batch, placement.batch_shardings(mesh, batch))


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )
