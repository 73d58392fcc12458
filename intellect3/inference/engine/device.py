"""The weights and the cache where they live, and the compiled functions over them.

Everything is compiled once, before the server says it is healthy: one decode shape and one prefill
shape. Weights are arguments, so that a swap compiles nothing.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import pathlib
import time
from collections.abc import Collection, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intellect3.inference.engine import programs
from intellect3.inference.engine.batcher import Plan
from intellect3.inference.engine.programs import Shape, State
from intellect3.inference.engine.steps import Decode, Decoded, Prefill, Prefilled
from intellect3.models import cache as kv_cache
from intellect3.models import hf, kernel_choice, transformer
from intellect3.models.config import ModelConfig
from intellect3.sharding import mesh as meshes
from intellect3.sharding import rules, specs

Params = Any


class Device:
  """Owns weights and cache; the engine's thread calls it, but `prepare` may run beside it."""

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    slots: int,
    pages: int,
    page_size: int,
    context_length: int,
    shape: Shape,
    tensor_parallel: int = 1,
  ):
    """Places weights and an empty cache.

    Args:
      config: of the model.
      params: its weights.
      slots: sequences that decode at once.
      pages: of the cache.
      page_size: tokens of each.
      context_length: most tokens of a sequence.
      shape: what is compiled in.
      tensor_parallel: devices over which weights and cache are split by the `SERVE` rules.

    Raises:
      ValueError: where the context is longer than the model's positions, or the model does not
        divide by the devices, or there are too few.
    """
    if not 1 < context_length <= config.max_positions:
      raise ValueError(
        f"context_length: expected 2 to {config.max_positions} (the model's max_positions), "
        f"got {context_length}"
      )
    self.config, self.shape = config, shape
    self._mesh, self._shardings = _layout(config, tensor_parallel)
    self._params = jax.device_put(params, self._shardings)
    self._slots, self._pages, self._page_size = slots, pages, page_size
    kv_axis = dict(rules.SERVE)["kv_heads"]
    by_heads: Any
    everywhere: Any
    by_heads, everywhere = (
      NamedSharding(self._mesh, PartitionSpec(*axes)) for axes in ((None, None, kv_axis), ())
    )
    self._state_shardings: Any = State(kv_cache.KVCache(by_heads, by_heads), everywhere)
    self._state: State | None = self._empty_state()
    self._host_params: Params | None = None
    # The state leaves every call as it came: donated, hence updated in place.
    jit = functools.partial(
      jax.jit, donate_argnums=(1,), out_shardings=(self._state_shardings, everywhere)
    )
    self._functions: dict[str, Any] = {
      "decode": jit(functools.partial(programs.decode, config, shape)),
      "prefill": jit(functools.partial(programs.prefill, config, shape)),
      "reset_counts": jax.jit(
        programs.reset_counts, donate_argnums=(0,), out_shardings=self._state_shardings
      ),
    }
    self._executables: dict[str, Any] = {}

  @property
  def tensor_parallel(self) -> int:
    """Devices over which weights and cache are split."""
    return self._mesh.size

  @property
  def compiled(self) -> tuple[str, ...]:
    """The executables. There are never others: a call of another shape would raise."""
    return tuple(self._executables)

  def warm_up(self, decode: Decode, prefill: Prefill) -> float:
    """Compiles everything for calls of these shapes, side by side, and runs it once on calls that
    must write nothing; returns the seconds."""
    began = time.perf_counter()
    counts_V = np.zeros(self.config.vocab_size, np.int32)
    arguments = {
      "decode": (self._params, self._state, decode),
      "prefill": (self._params, self._state, prefill),
      "reset_counts": (self._state, np.int32(0), counts_V),
    }
    # Tracing holds the interpreter, compiling does not.
    with self._on_mesh():
      lowered = {name: self._functions[name].lower(*arguments[name]) for name in arguments}
    with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
      compiled = pool.map(lambda one: one.compile(), lowered.values())
      self._executables = dict(zip(lowered, compiled, strict=True))
    self.run(Plan(prefill, (), decode, (), ((0, ()),)))
    return time.perf_counter() - began

  def run(self, plan: Plan) -> tuple[Prefilled | None, Decoded | None]:
    """Computes a step: both halves are dispatched, then one transfer brings both results."""
    assert self._state is not None and self._params is not None
    prefilled = decoded = None
    for slot, sampled in plan.resets:
      counts_V = np.bincount(np.asarray(sampled, np.int64), minlength=self.config.vocab_size)
      reset = self._executables["reset_counts"]
      self._state = reset(self._state, np.int32(slot), counts_V.astype(np.int32))
    if plan.prefill is not None:
      call = plan.prefill
      self._state, prefilled = self._executables["prefill"](self._params, self._state, call)
      if not call.sampling.top:
        prefilled = prefilled._replace(top=None, input_top=None)
      if not call.score:
        prefilled = prefilled._replace(input_logprobs_RT=None, input_top=None)
    if plan.decode is not None:
      self._state, decoded = self._executables["decode"](self._params, self._state, plan.decode)
      if not plan.decode.sampling.top:
        decoded = decoded._replace(top=None)
    return jax.device_get((prefilled, decoded))

  def prepare(self, params: Params) -> Params:
    """Checks new weights against the served ones and places them beside them.

    Raises:
      ValueError: naming the first tensor that differs in name, shape or dtype.
    """
    shapes, _ = transformer.abstract(self.config)
    served = dict(jax.tree_util.tree_leaves_with_path(shapes))
    given = dict(jax.tree_util.tree_leaves_with_path(params))
    for path in [*served, *(path for path in given if path not in served)]:
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      expected, got = (_describe(tree.get(path)) for tree in (served, given))
      if expected != got:
        raise ValueError(f"{name}: expected {expected} as served, got {got}")
    return jax.block_until_ready(jax.device_put(params, self._shardings))

  def swap(self, params: Params) -> None:
    """Serves what `prepare` returned from the next step on."""
    self._params, self._host_params = params, None

  def host_params(self) -> Params:
    """The served weights as NumPy arrays, for an update that brings only some of them."""
    if self._host_params is not None:
      return self._host_params
    return jax.device_get(self._params)

  def release(self, tags: Collection[str]) -> None:
    """Frees the device's memory of the cache, of the weights, or of both. The cache's content is
    lost; the weights wait in the host's memory. Nothing may run until `resume`."""
    if "kv_cache" in tags:
      self._state = None
    if "weights" in tags and self._params is not None:
      self._host_params, self._params = jax.device_get(self._params), None

  def resume(self, tags: Collection[str]) -> None:
    """Takes back what was released: an empty cache, and the weights as they were."""
    if "kv_cache" in tags and self._state is None:
      self._state = self._empty_state()
    if "weights" in tags and self._host_params is not None:
      self.swap(jax.device_put(self._host_params, self._shardings))

  @property
  def released(self) -> frozenset[str]:
    """What is not there at the moment."""
    missing = {"kv_cache": self._state is None, "weights": self._params is None}
    return frozenset(tag for tag, gone in missing.items() if gone)

  def _empty_state(self) -> State:
    @functools.partial(jax.jit, out_shardings=self._state_shardings)
    def make() -> State:
      cache = kv_cache.init(self.config, self._pages, self._page_size)
      return State(cache, jnp.zeros((self._slots, self.config.vocab_size), jnp.int32))

    return make()

  @contextlib.contextmanager
  def _on_mesh(self) -> Iterator[None]:
    table = rules.SERVE if self._mesh.size > 1 else ()
    with jax.set_mesh(self._mesh), nn.logical_axis_rules(table):
      yield


def _describe(leaf: Any) -> str:
  return "nothing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def platform() -> str:
  """Where the engine computes: `cpu`, `gpu` or `tpu`."""
  return jax.default_backend()


def _layout(config: ModelConfig, tensor_parallel: int) -> tuple[Mesh, Any]:
  """The mesh, and where the weights lie on it."""
  devices = jax.devices()
  if not 1 <= tensor_parallel <= len(devices):
    raise ValueError(f"tp_size: expected 1 to {len(devices)} (devices), got {tensor_parallel}")
  mesh = meshes.make_mesh(tensor=tensor_parallel, devices=devices[:tensor_parallel])
  shapes, axes = transformer.abstract(config)
  return mesh, specs.tree_shardings(axes, shapes, mesh, rules.SERVE)


def load(
  directory: str | os.PathLike[str],
  *,
  dtype: str | None,
  param_dtype: str | None = None,
  tensor_parallel: int = 1,
) -> tuple[ModelConfig, Params]:
  """Reads a model directory in Hugging Face's format, straight to the devices.

  Args:
    directory: `config.json` and safetensors.
    dtype: what to compute in; None keeps the configuration's own.
    param_dtype: what to hold the weights in; None keeps them as stored.
    tensor_parallel: devices over which the weights are split, as in `Device`.

  Raises:
    ValueError: where the directory holds no model that this engine can serve.
  """
  path = pathlib.Path(directory)
  if not (path / "config.json").is_file():
    raise ValueError(f"Cannot find a config.json in `{path}`.")
  if not any(path.glob("*.safetensors")):
    raise ValueError(f"Cannot find any model weights with `{path}`.")
  dtypes = {"dtype": dtype or param_dtype, "param_dtype": param_dtype}
  config = hf.check(path, **{key: value for key, value in dtypes.items() if value is not None})
  # Said at a low level: the server says it, once it is up.
  config = kernel_choice.resolve(config, compiler_splits=tensor_parallel > 1, level=logging.DEBUG)
  _, shardings = _layout(config, tensor_parallel)
  return config, hf.load_sharded(path, config, shardings, dtype=param_dtype)


def eos_token_ids(directory: str | os.PathLike[str]) -> frozenset[int]:
  """The ids that end a generation: of `config.json` and `generation_config.json` together."""
  ids: set[int] = set()
  for name in ("config.json", "generation_config.json"):
    path = pathlib.Path(directory) / name
    if path.is_file():
      eos = json.loads(path.read_text()).get("eos_token_id")
      ids.update([eos] if isinstance(eos, int) else eos or [])
  return frozenset(ids)
