"""A run's gin file -> `simulation.settings.RunSettings`: what its orchestrator and workers decide.

Used by `tools.simulate_run`. Nothing of the run is started: no server, worker or trainer is made,
and no weights are needed. Its environments are built, for the number of their tasks. `cluster`
reads what the same file says of trainer and servers, for a scenario where none is given.
"""

import inspect
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import gin

from experiments import gin_config
from intellect3.models.config import ModelConfig
from intellect3.rl import checks, orchestrator, roles, worker
from intellect3.rollouts import credit, difficulty, filters, scheduler
from intellect3.simulation import assumed, settings

DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""A model's dtype -> its rate's name in hardware.toml."""


def read(text: str, *, without_jax: bool = True) -> settings.RunSettings:
  """The settings of a configuration.

  Args:
    text: of `gin_config.read`.
    without_jax: whether this process is to run without jax from now on, as the orchestrator does;
      False in one that has it already.

  Raises:
    gin_config.ConfigError: a binding is missing or wrong; one line.
  """
  gin_config.parse(text, without_jax=without_jax)
  try:
    return _settings()
  except (ValueError, TypeError, OSError) as error:
    raise gin_config.ConfigError(str(error).splitlines()[0]) from error


def _settings() -> settings.RunSettings:
  environments = checks.by_name(_value(roles.run, "environments"))
  weights = _value(roles.run, "environment_weights") or dict.fromkeys(environments, 1.0)
  checks.environment_weights(weights, environments)
  chosen = {
    name: _value(orchestrator.orchestrator, name)
    for name in (
      *("weights_lag", "evaluation_tasks", "sync_mode", "sync_patience_seconds"),
      *("server_poll_seconds", "server_patience_seconds", "worker_patience_seconds"),
    )
  }
  clients = {
    name: _value(worker.worker, name)
    for name in (
      *("max_new_tokens", "max_tokens", "max_concurrency", "segment_tokens", "spill_requests"),
      *("wait_seconds", "timeout_seconds"),
    )
  }
  group_credit = credit.Credit(
    advantage_fn=_value(orchestrator.orchestrator, "advantage_fn"),
    reward_fn=_value(orchestrator.orchestrator, "reward_fn"),
  )
  group_credit.check()
  return settings.RunSettings(
    scheduler=_scheduler(),
    sizes={
      f"{name}/{split}": environment.size(split)
      for name, environment in environments.items()
      for split in ("train", "eval")
    },
    environment_weights=weights,
    pools=_value(orchestrator.orchestrator, "pools") or difficulty.Pools(),
    group_filters=_value(orchestrator.orchestrator, "group_filters") or filters.Filters(),
    credit=group_credit,
    num_workers=_value(roles.run, "num_workers"),
    **chosen,
    **clients,
  )


def _scheduler() -> scheduler.Settings:
  bound = {
    name: _value(orchestrator.orchestrator, name)
    for name in (
      *("prompts_per_step", "rollouts_per_prompt", "max_rollouts_in_flight"),
      *("staleness_rule", "temperature", "max_groups_in_vain"),
    )
  }
  return scheduler.Settings(
    steps=_value(roles.run, "steps"),
    max_off_policy_steps=_value(roles.run, "max_off_policy_steps"),
    batch_order="dispatch" if _value(orchestrator.orchestrator, "deterministic") else "completion",
    seed=_value(roles.run, "seed"),
    **bound,
  )


def progress(what: str, steps: int) -> Callable[[int, float], None]:
  """Tells of a simulation's batches on stderr, at most a few times a second.

  Args:
    what: is simulated.
    steps: of it.
  """
  started = time.perf_counter()
  told = [started - 1.0]

  def tell(step: int, seconds: float) -> None:
    now = time.perf_counter()
    if step == steps or now - told[0] > 0.5:
      told[0] = now
      spent = now - started
      print(
        f"{what}: batch {step} of {steps}, {seconds:,.0f} virtual s; {spent:.0f} s, "
        f"{spent / step * (steps - step):.0f} s to go",
        file=sys.stderr,
        flush=True,
      )

  return tell


def cluster() -> assumed.Said:
  """What the configuration that `read` has parsed says of the run's model, trainer and servers.

  Raises:
    gin_config.ConfigError: it does not say what nobody can assume; one line that names it.
  """
  try:
    options = _bound("trainer.trainer.model_options") or {}
    mesh = _bound("trainer.trainer.mesh")
    if not isinstance(mesh, Mapping) or not all(isinstance(size, int) for size in mesh.values()):
      raise ValueError(
        "trainer.trainer.mesh: expected the trainer's devices, such as {'fsdp': 8} (without a "
        f"--scenario nothing else tells them), got {mesh!r}"
      )
    dtype = options.get("dtype", "float32")
    if dtype not in DTYPES:
      raise ValueError(
        f"trainer.trainer.model_options.dtype: expected one of {list(DTYPES)}, got {dtype!r}"
      )
    return assumed.Said(
      model=_model(_value(roles.run, "model_path")),
      train_dtype=DTYPES[dtype],
      trainer_devices=math.prod(mesh.values()),
      **_servers(),
    )
  except (ValueError, TypeError, OSError) as error:
    raise gin_config.ConfigError(str(error).splitlines()[0]) from error


def _model(path: Any) -> ModelConfig:
  file = pathlib.Path(str(path)) / "config.json"
  if file.is_file():
    return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
  model = _bound("MODEL/macro.value")
  if not isinstance(model, ModelConfig):
    raise ValueError(
      "rl.run.model_path: expected a directory with config.json, or the macro MODEL "
      f"(= @presets.NAME()) for a model that is not on this machine, got {path!r}"
    )
  return model


def _servers() -> dict[str, Any]:
  """Number and size of the servers, of what the file binds itself."""
  urls, count = _bound("rl.run.server_urls"), _bound("rl.run.num_servers")
  server = _value(roles.run, "inference").__name__
  options: Mapping[str, Any] = _bound(f"inference.{server}.options") or {}
  running = options.get("slots", options.get("max_running_requests"))
  return {
    "servers": len(urls) if urls else count or None,  # none of its own: they are elsewhere
    "server_devices": options.get("tp_size"),
    "max_running": running,
    "memory_share": options.get("mem_fraction_static"),
  }


def _bound(name: str) -> Any:
  """What the file itself binds, references followed; None where it does not."""
  try:
    return _called(gin.query_parameter(name))
  except ValueError:
    return None


def _value(function: Callable[..., Any], name: str) -> Any:
  """What the file binds a parameter to, references followed; else the parameter's default."""
  try:
    bound = gin.get_bindings(function, resolve_references=False)
  except ValueError:  # the file names nothing of it
    bound = {}
  if name in bound:
    return _called(bound[name])
  default = inspect.signature(function).parameters[name].default
  if default is inspect.Parameter.empty:
    raise ValueError(f"{function.__name__}.{name}: expected a binding, got none")
  return default


def _called(value: Any) -> Any:
  """What references stand for: a configured function, or what that returns."""
  if isinstance(value, list | tuple):
    return [_called(part) for part in value]
  if isinstance(value, Mapping):
    return {name: _called(part) for name, part in value.items()}
  if not hasattr(value, "scoped_configurable_fn"):
    return value
  function = value.scoped_configurable_fn
  return function() if value.evaluate else function
