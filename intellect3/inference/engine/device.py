"""The two compiled functions of the engine, prefill and decode, over the trainer's own model.

Each is compiled once, before the server says it is healthy: one decode shape [slots, 1] and one
prefill shape [prefill_rows, prefill_chunk], the latter also in a variant that scores its inputs.
The cache is donated to every call and comes back updated. Weights are arguments, so that a swap
compiles nothing. Sampling happens inside the calls; only ids and logprobs come back to the host.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.inference.engine.batcher import Plan
from intellect3.inference.engine.steps import Decode, Prefill, Sampled, Sampling
from intellect3.losses.logprobs import chunked_logprobs
from intellect3.models import cache as kv_cache
from intellect3.models import hf, transformer
from intellect3.models.config import ModelConfig

SCORE_CHUNK_SIZE = 512

Params = Any


def sample(logits_RV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """Samples one id per row from `softmax(logits / temperature)`; temperature 0 is greedy.

  The key of a row is `fold_in(seed, position)`: it depends on nothing but the request and how many
  tokens it has sampled, so neither on its slot nor on its neighbours.

  Args:
    logits_RV: float32 [R, V].
    sampling: seeds [R, 2], positions [R], temperatures [R].

  Returns:
    ids int32 [R] and their logprobs float32 [R] under the temperature-scaled full softmax (greedy
    rows: temperature 1).
  """
  greedy_R = sampling.temperatures_R == 0
  scaled_RV = logits_RV / jnp.where(greedy_R, 1, sampling.temperatures_R)[:, None]
  keys_R = jax.vmap(jax.random.fold_in)(
    jax.random.wrap_key_data(sampling.seeds_R2, impl="threefry2x32"), sampling.positions_R
  )
  noise_RV = jax.vmap(lambda key: jax.random.gumbel(key, scaled_RV.shape[1:]))(keys_R)
  ids_R = jnp.argmax(scaled_RV + jnp.where(greedy_R[:, None], 0, noise_RV), axis=1)
  chosen_R = jnp.take_along_axis(scaled_RV, ids_R[:, None], axis=1)[:, 0]
  return ids_R.astype(jnp.int32), chosen_R - jax.nn.logsumexp(scaled_RV, axis=1)


def _logits(hidden_RD: jax.Array, head_DV: jax.Array) -> jax.Array:
  return jnp.dot(hidden_RD, head_DV.astype(hidden_RD.dtype), preferred_element_type=jnp.float32)


def decode_step(
  config: ModelConfig, params: Params, cache: kv_cache.KVCache, step: Decode
) -> tuple[kv_cache.KVCache, Sampled]:
  """One token for every slot. Pure; the cache is to be donated."""
  output: Any = transformer.Transformer(config).apply(
    {"params": params},
    step.tokens_S[:, None],
    step.positions_S[:, None],
    step.segments_S[:, None],
    cache=cache,
  )
  logits_SV = _logits(output.hidden_BTD[:, 0], transformer.head(params, config))
  return output.cache, Sampled(*sample(logits_SV, step.sampling))


def prefill_step(
  config: ModelConfig, score: bool, params: Params, cache: kv_cache.KVCache, step: Prefill
) -> tuple[kv_cache.KVCache, Sampled]:
  """A chunk of prompt for every row, and a sample after each chunk's last token. Pure."""
  output: Any = transformer.Transformer(config).apply(
    {"params": params},
    step.tokens_RT,
    step.positions_RT,
    step.segments_RT,
    cache=cache,
    slots_B=step.slots_R,
  )
  head_DV = transformer.head(params, config)
  hidden_RTD = output.hidden_BTD
  last_RD = jnp.take_along_axis(hidden_RTD, step.last_R[:, None, None], axis=1)[:, 0]
  ids_R, logprobs_R = sample(_logits(last_RD, head_DV), step.sampling)
  scores_RT = None
  if score:
    scores_N, _ = chunked_logprobs(
      hidden_RTD.reshape(-1, hidden_RTD.shape[-1]),
      head_DV,
      step.targets_RT.reshape(-1),
      temperature_N=jnp.ones(step.targets_RT.size, jnp.float32),
      chunk_size=SCORE_CHUNK_SIZE,
    )
    scores_RT = scores_N.reshape(step.targets_RT.shape)
  return output.cache, Sampled(ids_R, logprobs_R, scores_RT)


class Device:
  """The weights and the cache where they live, and the compiled functions over them."""

  def __init__(self, config: ModelConfig, params: Params, *, slots: int, context_length: int):
    """Places weights and an empty cache.

    Raises:
      ValueError: where the context is longer than the model's positions.
    """
    if not 1 < context_length <= config.max_positions:
      raise ValueError(
        f"context_length: expected 2 to {config.max_positions} (the model's max_positions), "
        f"got {context_length}"
      )
    self.config = config
    self._params = jax.device_put(params)
    self._cache = kv_cache.init(config, slots, context_length)
    self._decode: Any = jax.jit(functools.partial(decode_step, config), donate_argnums=(1,))
    self._prefill: dict[bool, Any] = {
      score: jax.jit(functools.partial(prefill_step, config, score), donate_argnums=(1,))
      for score in (False, True)
    }

  @property
  def compiled(self) -> int:
    """How many executables exist; constant after the warm-up."""
    return sum(fn._cache_size() for fn in (self._decode, *self._prefill.values()))

  def warm_up(self, decode: Decode, prefill: Prefill) -> float:
    """Compiles everything by running it on steps that write nothing; returns the seconds."""
    began = time.perf_counter()
    for score in (False, True):
      self.run(Plan(prefill, score, (), decode, ()))
    return time.perf_counter() - began

  def run(self, plan: Plan) -> tuple[Sampled | None, Sampled | None]:
    """Computes a step: both halves are dispatched, then one transfer brings both results."""
    prefilled = decoded = None
    if plan.prefill is not None:
      prefill = self._prefill[plan.score]
      self._cache, prefilled = prefill(self._params, self._cache, plan.prefill)
    if plan.decode is not None:
      self._cache, decoded = self._decode(self._params, self._cache, plan.decode)
    return jax.device_get((prefilled, decoded))

  def prepare(self, params: Params) -> Params:
    """Checks new weights against the served ones and places them beside them.

    Raises:
      ValueError: naming the first tensor that differs in name, shape or dtype.
    """
    served = dict(jax.tree_util.tree_leaves_with_path(self._params))
    given = dict(jax.tree_util.tree_leaves_with_path(params))
    for path in [*served, *(path for path in given if path not in served)]:
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      expected, got = (_describe(tree.get(path)) for tree in (served, given))
      if expected != got:
        raise ValueError(f"{name}: expected {expected} as served, got {got}")
    return jax.block_until_ready(jax.device_put(params))

  def swap(self, params: Params) -> None:
    """Serves what `prepare` returned from the next step on."""
    self._params = params


def _describe(leaf: Any) -> str:
  return "nothing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def platform() -> str:
  """Where the engine computes: `cpu`, `gpu` or `tpu`."""
  return jax.default_backend()


def load(
  directory: str | os.PathLike[str], *, dtype: str | None, param_dtype: str | None = None
) -> tuple[ModelConfig, Params]:
  """Reads a model directory in Hugging Face's format.

  Args:
    directory: `config.json` and safetensors.
    dtype: what to compute in; None keeps the configuration's own.
    param_dtype: what to hold the weights in; None keeps them as stored.

  Raises:
    ValueError: where the directory holds no model that this engine can serve.
  """
  path = pathlib.Path(directory)
  if not (path / "config.json").is_file():
    raise ValueError(f"Cannot find a config.json in `{path}`.")
  if not any(path.glob("*.safetensors")):
    raise ValueError(f"Cannot find any model weights with `{path}`.")
  config, params = hf.load(path, dtype=param_dtype)
  return (config if dtype is None else dataclasses.replace(config, dtype=dtype)), params


def eos_token_ids(directory: str | os.PathLike[str]) -> frozenset[int]:
  """The ids that end a generation: of `config.json` and `generation_config.json` together."""
  ids: set[int] = set()
  for name in ("config.json", "generation_config.json"):
    path = pathlib.Path(directory) / name
    if path.is_file():
      eos = json.loads(path.read_text()).get("eos_token_id")
      ids.update([eos] if isinstance(eos, int) else eos or [])
  return frozenset(ids)
