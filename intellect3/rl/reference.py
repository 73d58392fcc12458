"""The reference model of the trainer: frozen weights that score each batch before the step.

    batch on the mesh  ->  logprobs of the reference  ->  Batch.ref_logprobs  ->  the loss

It may be of another family or size than the policy; its vocabulary is the policy's. It lies on the
trainer's mesh, beside the policy, without gradients or an optimizer.
"""

import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from intellect3.models import hf, kernel_choice
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing, placement
from intellect3.rl import checks
from intellect3.rl.checks import NotStarted
from intellect3.sharding.rules import Rules
from intellect3.training import layout, scoring

logger = logging.getLogger(__name__)

Scorer = Callable[[packing.Batch], tuple[packing.Batch, float]]
"""Fills a placed batch's `ref_logprobs`; also says how many seconds that took."""


def check(
  path: str | os.PathLike[str],
  policy: ModelConfig,
  policy_path: pathlib.Path,
  *,
  dtype: str | None,
  options: Mapping[str, Any],
) -> ModelConfig:
  """Checks a reference's directory against the policy; no tensor is read.

  Args:
    path: Hugging Face directory of the reference.
    policy: the policy's config.
    policy_path: its directory, whose tokenizer the reference must share.
    dtype: of the reference's parameters and computation; None: those of `options`.
    options: run options of the policy's ModelConfig, the reference's too.

  Returns:
    The reference's config, unresolved kernels and all.

  Raises:
    NotStarted, ValueError: the directory is not whole, or its vocabulary is not the policy's.
  """
  checks.path("trainer.reference_path", path)
  if dtype not in (None, "float32", "bfloat16", "float16"):
    raise NotStarted(f"trainer.reference_dtype: expected float32 or bfloat16, got {dtype!r}")
  chosen = {"dtype": dtype, "param_dtype": dtype} if dtype is not None else {}
  float32 = {"dtype": "float32", "param_dtype": "float32"}
  try:
    config = hf.check(path, **{**float32, **options, **chosen})
  except (ValueError, OSError) as error:
    raise NotStarted(f"trainer.reference_path: {error}") from error
  if config.vocab_size != policy.vocab_size:
    raise NotStarted(
      f"trainer.reference_path: expected the policy's {policy.vocab_size} ids, "
      f"got {config.vocab_size} ({path})"
    )
  ours, theirs = _vocabulary(policy_path), _vocabulary(pathlib.Path(path))
  differ = sorted(
    number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number]
  )
  if differ:
    first = differ[0]
    raise NotStarted(
      f"trainer.reference_path: expected the policy's tokens, got others for {len(differ)} ids of "
      f"{path}/tokenizer.json: {first} is {ours[first]!r} to the policy, {theirs[first]!r} there"
    )
  return dataclasses.replace(config, remat_policy="none")


def make_scorer(
  path: str | os.PathLike[str],
  checked: ModelConfig,
  mesh: Mesh,
  rules: Rules,
  *,
  micro_rows: int,
  head_chunk_size: int,
) -> Scorer:
  """Loads a reference onto the mesh and compiles what scores batches with it.

  Args:
    path: its directory.
    checked: of `check`.
    mesh: the trainer's.
    rules: the trainer's.
    micro_rows: rows per micro-batch.
    head_chunk_size: tokens per chunk of the vocabulary head.

  Returns:
    What fills `ref_logprobs` of a batch on the mesh, and waits for it.
  """
  config = kernel_choice.resolve(checked)
  started = time.perf_counter()
  shardings = layout.param_shardings(config, mesh, rules)
  params = hf.load_sharded(path, config, shardings, dtype=config.param_dtype)
  score = layout.compile_scoring(
    scoring.make_batch_logprob_fn(config, micro_rows=micro_rows, head_chunk_size=head_chunk_size),
    placement.row_sharding(mesh),
    mesh,
    rules,
  )
  seconds = time.perf_counter() - started
  logger.info("reference %s (%s) loaded in %.1f s", path, config.param_dtype, seconds)

  def scorer(batch: packing.Batch) -> tuple[packing.Batch, float]:
    began = time.perf_counter()
    logprobs = jax.block_until_ready(score(params, batch))
    filled: Any = batch._replace(ref_logprobs=logprobs)
    return filled, time.perf_counter() - began

  return scorer


def _vocabulary(directory: pathlib.Path) -> dict[int, str]:
  """Id -> token of a `tokenizer.json`; nothing where there is none, or no such table in it."""
  file = directory / "tokenizer.json"
  if not file.is_file():
    return {}
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
    table = content["model"]["vocab"]
    tokens = {number: token for token, number in table.items()} if isinstance(table, dict) else {}
    return tokens | {token["id"]: token["content"] for token in content.get("added_tokens", ())}
  except (ValueError, KeyError, TypeError) as error:
    raise NotStarted(f"{file}: expected a tokenizer, got {error!r}") from error
