"""A run's gin file -> `planning.job.Job`: the bindings of its trainer, nothing of it started.

Used by `tools.plan_run`. No renderer, environment or server is made, and no weights are needed: the
model is that of `model_path` where it holds a `config.json`, else of the file's macro `MODEL`
(`MODEL = @presets.qwen3_0_6b()`).
"""

import dataclasses
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import gin

from experiments import gin_config
from intellect3 import sft
from intellect3.losses.supervised import negative_log_likelihood
from intellect3.models.config import ModelConfig
from intellect3.planning import job as jobs
from intellect3.rl import checks, orchestrator, roles, trainer, worker
from intellect3.sharding import mesh as mesh_lib

MACRO = "MODEL"


def read(
  text: str, *, rows: int | None = None, trajectory_tokens: int | None = None
) -> tuple[str, jobs.Job]:
  """Makes the job of a configuration.

  Args:
    text: of `gin_config.read`.
    rows: of a step's batch; None: as many as the run's rollouts can fill, or `row_counts` allows.
    trajectory_tokens: length of the trajectories; None: the longest that the run allows.

  Returns:
    `rl` or `sft`, and the job.

  Raises:
    gin_config.ConfigError: a binding is missing or wrong; one line.
  """
  gin_config.parse(text, without_jax=False)
  try:
    if _bound(roles.run):
      return "rl", _rl(rows, trajectory_tokens)
    if _bound(sft.run):
      return "sft", _sft(rows, trajectory_tokens)
  except (ValueError, TypeError, OSError) as error:
    raise gin_config.ConfigError(str(error).splitlines()[0]) from error
  raise gin_config.ConfigError("expected a file that binds rl.run or sft.run, got neither")


def _rl(rows: int | None, trajectory_tokens: int | None) -> jobs.Job:
  run, train = _bound(roles.run), _resolved(trainer.trainer)
  options = {**jobs.FLOAT32, **(train.get("model_options") or {})}
  model = _model(run.get("model_path"), options)
  rollouts, produce = _resolved(orchestrator.orchestrator), _resolved(worker.worker)
  longest = min(produce["max_tokens"], train["row_length"])
  needed = rollouts["prompts_per_step"] * rollouts["rollouts_per_prompt"] * longest
  reference = None
  if train.get("reference_path") is not None:
    dtype = train.get("reference_dtype")
    changed = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    same = train["reference_path"] == run.get("model_path")
    reference = (
      dataclasses.replace(model, **changed)
      if same
      else _model(train["reference_path"], {**options, **changed}, macro=None)
    )
    reference = dataclasses.replace(reference, remat_policy="none")
  return jobs.Job(
    model=model,
    optimizer=train["optimizer"],
    rl_loss=train["loss_fn"],
    sft_loss=negative_log_likelihood,
    mesh=train.get("mesh"),
    **_rules(train),
    decoupled=train.get("decoupled", False),
    replay_routed_experts=run.get("replay_routed_experts", False),
    reference=reference,
    trajectory_tokens=trajectory_tokens or longest,
    **_common(trainer.trainer, train, rows, needed),
  )


def _sft(rows: int | None, trajectory_tokens: int | None) -> jobs.Job:
  run = _bound(sft.run)
  train = _resolved(sft.run, without=("example", "write_tokenizer", "mesh"))
  options = train.get("model_options") or {}
  if "model_config" in run:
    model = dataclasses.replace(train["model_config"], **options)
  else:
    model = _model(run.get("model_path"), {**jobs.FLOAT32, **options})
  return jobs.Job(
    model=model,
    optimizer=train["optimizer"],
    sft_loss=train.get("loss_fn", negative_log_likelihood),
    mesh=_sizes(run.get("mesh")),
    **_rules(train),
    trajectory_tokens=trajectory_tokens or train["row_length"],
    **_common(sft.run, train, rows, train["examples_per_step"] * train["row_length"]),
  )


def _rules(train: Mapping[str, Any]) -> dict[str, Any]:
  if "rules" not in train:
    return {}
  checks.rules("rules", train["rules"])
  return {"rules": train["rules"]}


def _sizes(mesh: Any) -> dict[str, int] | None:
  """The axes that a file's `@mesh.make_mesh()` has; its devices are not here."""
  if mesh is None:
    return None
  if getattr(mesh, "scoped_configurable_fn", None) is None:
    raise ValueError(f"mesh: expected @mesh.make_mesh(), got {mesh!r}")
  bound = _bound(mesh_lib.make_mesh)
  return {axis: _call(bound.get(axis, 1)) for axis in mesh_lib.AXES}


def _common(
  function: Callable[..., Any], train: Mapping[str, Any], rows: int | None, tokens: int
) -> dict[str, Any]:
  defaults = inspect.signature(function).parameters
  sizes = {"row_length": train["row_length"], "micro_rows": train["micro_rows"]}
  return {
    **sizes,
    "rows": rows or jobs.rows_of(tokens, **sizes, row_counts=train.get("row_counts")),
    **{
      name: train.get(name, defaults[name].default)
      for name in ("head_chunk_size", "router_bias_rate")
    },
  }


def _model(path: Any, options: Mapping[str, Any], macro: str | None = MACRO) -> ModelConfig:
  file = pathlib.Path(str(path)) / "config.json"
  if file.is_file():
    return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")), **options)
  if macro is not None:
    try:
      found = gin.query_parameter(f"{macro}/macro.value")
    except ValueError:
      found = None
    if found is not None:
      model = found.scoped_configurable_fn() if hasattr(found, "scoped_configurable_fn") else found
      return dataclasses.replace(model, **options)
  raise ValueError(
    f"model_path: expected a directory with config.json, or the macro {MACRO} (= @presets.NAME()) "
    f"for a model that is not on this machine, got {path!r}"
  )


def _bound(function: Callable[..., Any]) -> dict[str, Any]:
  """A function's bindings as the file has them, references unresolved."""
  try:
    return gin.get_bindings(function, resolve_references=False)
  except ValueError:  # the file names nothing of it
    return {}


def _resolved(function: Callable[..., Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
  """A function's bindings, references called; those in `without` are left out."""
  required = [
    name
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.default is inspect.Parameter.empty and name not in ("shared", "run_dir", *without)
  ]
  bound = {name: value for name, value in _bound(function).items() if name not in without}
  needed = [name for name in required if name not in bound and name in _NEEDED]
  if needed:
    raise ValueError(f"{function.__name__}: expected a binding for {', '.join(needed)}, got none")
  return {name: _call(value) for name, value in bound.items()}


_NEEDED = (
  *("optimizer", "loss_fn", "row_length", "micro_rows", "examples_per_step"),
  *("prompts_per_step", "rollouts_per_prompt", "max_tokens"),
)


def _call(value: Any) -> Any:
  """What a reference stands for: its configured function, or what that returns."""
  if not hasattr(value, "scoped_configurable_fn"):
    return value
  function = value.scoped_configurable_fn
  return function() if value.evaluate else function
