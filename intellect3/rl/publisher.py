"""The trainer's side of publishing: weights leave the devices between steps, and reach the disk
while the next step runs.

    gather   blocks the trainer: the canary's logprobs, then a copy of the weights on the host
    write    in a thread: shards, manifest, rename; then the orchestrator is told

Of several processes each gathers and writes its share of the files; the first does the rest.

One version is written at a time; the next waits for it, and says how long.
"""

import concurrent.futures
import logging
import time
import urllib.error
import urllib.request
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from intellect3.distributed import arrays
from intellect3.distributed.processes import ALONE, Processes
from intellect3.models.config import ModelConfig
from intellect3.rl.roles import Shared
from intellect3.sharding.rules import Rules
from intellect3.training import layout, scoring
from intellect3.training import state as states
from intellect3.weights import gather, publish
from intellect3.weights import manifest as manifests

logger = logging.getLogger(__name__)

_BITS = {"bfloat16": (8, 7), "float16": (5, 10)}
"""Exponent and mantissa bits of the dtypes that weights are rounded to."""


class Publisher:
  """Publishes the weights of a state once, with the trainer's own canary logprobs, and says so."""

  def __init__(
    self,
    shared: Shared,
    config: ModelConfig,
    *,
    mesh: Mesh,
    rules: Rules,
    canary_ids: np.ndarray,
    head_chunk_size: int,
    keep: int,
    dtype: str | None,
    shard_bytes: int,
    threads: int,
    processes: Processes = ALONE,
  ) -> None:
    """Nothing is published yet.

    Args:
      shared: what the roles share.
      config: the model.
      mesh: where the parameters lie.
      rules: the table by which they do.
      canary_ids: int32[T], the prompt that servers are compared on.
      head_chunk_size: tokens per chunk of the vocabulary head.
      keep: published versions kept.
      dtype: of the published weights; None keeps that of the parameters.
      shard_bytes: most bytes of a file.
      threads: files written at a time.
      processes: the trainer's.
    """
    self._shared = shared
    self._config = config
    self._mesh = mesh
    self._keep = keep
    self._dtype = dtype
    self._shard_bytes = shard_bytes
    self._threads = threads
    self._canary_ids = canary_ids
    logprob_fn = scoring.make_logprob_fn(config, head_chunk_size=head_chunk_size)
    self._logprobs = layout.compile_canary(
      lambda params, ids: logprob_fn(as_published(params, dtype), ids), mesh, rules
    )
    self._processes = processes
    self._newest = processes.broadcast("weights/newest", manifests.latest(shared.weights_dir))
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="publisher")
    self._writing: concurrent.futures.Future[dict[str, float]] | None = None
    self._written: dict[str, float] = {}

  def publish(self, state: states.TrainState) -> dict[str, float]:
    """Publishes v(step); returns once the weights are on the host, and may be trained on.

    A resumed run makes some versions again: the servers have those, and they are left alone.

    Returns:
      Metrics: `weights/gather_seconds` of this version and, of the one before,
      `weights/write_seconds` and how long this one had to wait for it; also per GB.

    Raises:
      Whatever writing the version before raised.
    """
    version = int(state.step)
    if self._newest is not None and version <= self._newest:
      return {}
    started = time.perf_counter()
    self._wait()
    waited = time.perf_counter()
    canary_logprobs = arrays.fetch(self._logprobs(state.params, self._canary_ids)).tolist()
    params, nbytes = self._gather(state.params)
    gathered = time.perf_counter()
    self._newest = version
    self._writing = self._pool.submit(self._write, version, params, canary_logprobs)
    gigabytes = max(nbytes, 1) / 1e9
    written, self._written = self._written, {}
    return {
      "weights/wait_seconds": waited - started,
      "weights/gather_seconds": gathered - waited,
      "weights/gather_seconds_per_gb": (gathered - waited) / gigabytes,
      **written,
    }

  def _gather(self, params: Any) -> tuple[Any, int]:
    """The weights, or of several processes' those of its own files, on the host; their bytes."""
    if self._processes.count == 1:
      host = jax.tree.map(_on_host, jax.device_get(params))
      return host, sum(array.nbytes for array in jax.tree.leaves(host))
    own = gather.gather(
      self._config,
      params,
      self._mesh,
      dtype=self._dtype,
      shard_bytes=self._shard_bytes,
      index=self._processes.index,
      count=self._processes.count,
    )
    return own, own.nbytes

  def close(self) -> None:
    """Waits for the version that is being written; raises what that raised."""
    try:
      self._wait()
    finally:
      self._pool.shutdown()

  def _wait(self) -> None:
    if self._writing is not None:
      writing, self._writing = self._writing, None
      self._written = writing.result()

  def _write(self, version: int, params: Any, canary_logprobs: list[float]) -> dict[str, float]:
    started = time.perf_counter()
    directory = publish.publish(
      self._shared.weights_dir,
      version,
      self._config,
      params,
      canary_ids=self._canary_ids.tolist(),
      canary_logprobs=canary_logprobs,
      keep=self._keep,
      dtype=self._dtype,
      tokenizer_from=self._shared.model_path,
      shard_bytes=self._shard_bytes,
      threads=self._threads,
      processes=self._processes,
    )
    if not self._processes.is_first:
      return {}
    seconds = time.perf_counter() - started
    logger.info("published version %d in %.2f s", version, seconds)
    self._tell(version)
    gigabytes = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e9
    return {
      "weights/write_seconds": seconds,
      "weights/write_seconds_per_gb": seconds / gigabytes,
      "weights/gigabytes": gigabytes,
    }

  def _tell(self, version: int) -> None:
    request = urllib.request.Request(
      f"{self._shared.orchestrator_url}/versions/{version}", method="POST"
    )
    try:
      urllib.request.urlopen(request, timeout=2.0).close()
    except (urllib.error.URLError, OSError) as error:  # it looks at the directory as well
      logger.info("the orchestrator was not told of version %d: %s", version, error)


def as_published(params: Any, dtype: str | None) -> Any:
  """The parameters as a server will read them: rounded to the published dtype, in their own.

  The router's correction bias is published as it is.
  """
  if dtype not in _BITS:
    return params
  exponent, mantissa = _BITS[dtype]

  def round_leaf(path: Any, array: jax.Array) -> jax.Array:
    if path[-1].key == "correction_bias":
      return array
    # Not two casts: XLA may leave those out.
    return jax.lax.reduce_precision(array, exponent, mantissa)

  return jax.tree_util.tree_map_with_path(round_leaf, params)


def _on_host(array: np.ndarray) -> np.ndarray:
  """A copy of its own: what a CPU device hands out is its own memory, which the next step uses."""
  return array if array.flags.owndata else array.copy()
