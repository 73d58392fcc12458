"""Scores token ids with the trainer's forward pass.

    python -m tools.score --model HF_DIR --ids IDS.json --out OUT.json

IDS.json is a list of lists of token ids. OUT.json is `{"logprobs": [[null, lp, ..], ..],
"routed_experts": [[[[expert, ..] per MoE layer] per token], ..]}`, float32; the first token has no
logprob, and `routed_experts` is null for a dense model. Sequences are packed into rows of one
shape, so the model is compiled once.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from intellect3.losses.logprobs import chunked_logprobs
from intellect3.models import hf, transformer
from intellect3.models.config import ModelConfig
from intellect3.pipeline import packing
from intellect3.sharding import mesh as meshes
from intellect3.sharding import rules, specs
from tools.checkpoints.progress import Progress

TOKENS_PER_CALL = 8192
SHORTEST_ROW = 128
HEAD_CHUNK = 256
"""Tokens whose logits are held together: the head's peak is about three float32[chunk, V]."""

Ids = list[list[int]]
Forward = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class Scored(NamedTuple):
  """Attributes: logprobs, float32[T - 1] of each sequence; experts, int32[T, M, A] of each."""

  logprobs: list[np.ndarray]
  experts: list[np.ndarray]


def main(arguments: list[str] | None = None) -> int:
  """Scores; returns the exit code: 0, or 2 for an error."""
  flags = parse(arguments)
  try:
    out = pathlib.Path(flags.out)
    if not out.absolute().parent.is_dir() or out.is_dir():
      raise ValueError(f"--out: expected a file in a directory that is there, got {flags.out}")
    # The computation is in float32, whatever the file holds.
    config = hf.check(flags.model, dtype="float32", param_dtype="float32", remat_policy="none")
    ids = read_ids(flags.ids, config)
    scored = score(flags.model, config, ids, tokens_per_call=flags.tokens_per_call)
    write(out, scored, config)
  except (ValueError, OSError) as error:
    print(f"score: {error}", file=sys.stderr)
    return 2
  return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m tools.score",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", required=True, help="a directory in Hugging Face's format")
  parser.add_argument("--ids", required=True, help="JSON: a list of lists of token ids")
  parser.add_argument("--out", required=True, help="JSON to write")
  parser.add_argument(
    "--tokens-per-call",
    type=int,
    default=TOKENS_PER_CALL,
    help="most tokens computed at a time, unless a sequence is longer (default: %(default)s)",
  )
  return parser.parse_args(arguments)


def read_ids(path: str, config: ModelConfig) -> Ids:
  """The sequences of a file.

  Raises:
    ValueError: the file holds no list of lists of ids, an id is outside of the vocabulary, or a
      sequence is empty or too long for the model; it names the place.
  """
  try:
    ids = json.loads(pathlib.Path(path).read_text())
  except OSError as error:
    raise ValueError(f"--ids: {path}: cannot be read: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"--ids: {path}: no valid JSON: {error}") from error
  if not isinstance(ids, list) or not ids:
    raise ValueError(f"--ids: expected a list of at least one sequence, got {_short(ids)}")
  for number, sequence in enumerate(ids):
    if not isinstance(sequence, list) or not 1 <= len(sequence) <= config.max_positions:
      raise ValueError(
        f"--ids: sequence {number}: expected a list of 1 to {config.max_positions} ids "
        f"(the model's positions), got {_short(sequence)}"
      )
    for place, token in enumerate(sequence):
      if type(token) is not int or not 0 <= token < config.vocab_size:
        raise ValueError(
          f"--ids: sequence {number}, token {place}: expected an integer of 0 to "
          f"{config.vocab_size - 1} (the vocabulary), got {_short(token)}"
        )
  return ids


def score(model: str, config: ModelConfig, ids: Ids, *, tokens_per_call: int) -> Scored:
  """Scores sequences.

  Args:
    model: the checkpoint directory.
    config: its config, with the dtypes to load and to compute in.
    ids: sequences, checked.
    tokens_per_call: most tokens of a call, unless one row is longer.
  """
  if tokens_per_call < 1:
    raise ValueError(f"--tokens-per-call: expected at least 1, got {tokens_per_call}")
  lengths = [len(sequence) for sequence in ids]
  row_length = SHORTEST_ROW
  while row_length < max(lengths):
    row_length *= 2
  plan = packing.plan_rows(lengths, row_length)
  rows = min(len(plan), max(1, tokens_per_call // row_length))
  mesh = meshes.make_mesh(fsdp=jax.device_count())
  shapes, axes = transformer.abstract(config)
  shardings = specs.tree_shardings(axes, shapes, mesh, rules.TRAIN_FSDP)
  everywhere = NamedSharding(mesh, PartitionSpec())
  forward = jax.jit(_forward(config), out_shardings=everywhere)
  scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
  with jax.set_mesh(mesh), Progress("score", sum(lengths), unit="tokens") as progress:
    params = hf.load_sharded(model, config, shardings, dtype=config.param_dtype)
    for start in range(0, len(plan), rows):
      chosen = plan[start : start + rows]
      batch = jax.device_put(_rows(ids, chosen, rows, row_length), everywhere)
      logprobs_BT, experts_LBTA = jax.device_get(forward(params, *batch))
      for row, numbers in enumerate(chosen):
        first = 0
        for number in numbers:
          last = first + lengths[number]
          # Position t - 1 predicts token t.
          scored[number] = (
            logprobs_BT[row, first : last - 1],
            experts_LBTA[:, row, first:last].swapaxes(0, 1),
          )
          first = last
          progress.add("", lengths[number])
  ordered = [scored[number] for number in range(len(ids))]
  return Scored([logprobs for logprobs, _ in ordered], [experts for _, experts in ordered])


def _forward(config: ModelConfig) -> Forward:
  """Logprobs_BT, of each next token, and experts_LBTA of packed rows."""
  model = transformer.Transformer(config)

  def forward(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> tuple[Any, Any]:
    output: Any = model.apply({"params": params}, tokens, positions, segment_ids)
    hidden_ND = output.hidden_BTD.reshape(-1, config.embed_dim)
    targets = jax.numpy.roll(tokens, -1, axis=1).reshape(-1)
    told = chunked_logprobs(
      hidden_ND,
      transformer.head(params, config),
      targets,
      temperature_N=jax.numpy.ones(targets.shape, jax.numpy.float32),
      chunk_size=min(HEAD_CHUNK, targets.size),
    )
    return told.logprobs_N.reshape(tokens.shape), output.router.experts_LBTA

  return forward


def _rows(
  ids: Ids, plan: Sequence[Sequence[int]], rows: int, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, positions and segment ids int32[rows, row_length] of some rows of the plan."""
  tokens, positions, segments = (np.zeros((rows, row_length), np.int32) for _ in range(3))
  for row, numbers in enumerate(plan):
    first = 0
    for segment, number in enumerate(numbers, start=1):
      place = slice(first, first + len(ids[number]))
      tokens[row, place] = ids[number]
      positions[row, place] = np.arange(len(ids[number]))
      segments[row, place] = segment
      first = place.stop
  return tokens, positions, segments


def write(out: pathlib.Path, scored: Scored, config: ModelConfig) -> None:
  """Writes the result beside, then renames.

  Raises:
    ValueError: a logprob is no number: the weights are broken.
  """
  for number, logprobs in enumerate(scored.logprobs):
    if not np.isfinite(logprobs).all():
      place = int(np.flatnonzero(~np.isfinite(logprobs))[0]) + 1
      raise ValueError(f"sequence {number}, token {place}: expected a finite logprob, got none")
  dense = config.num_moe_layers == 0
  result = {
    "logprobs": [[None, *logprobs.tolist()] for logprobs in scored.logprobs],
    "routed_experts": None if dense else [experts.tolist() for experts in scored.experts],
  }
  beside = out.with_name(f".{out.name}.{os.getpid()}")
  try:
    beside.write_text(json.dumps(result) + "\n")
    beside.rename(out)
  finally:
    beside.unlink(missing_ok=True)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:60]}.."


if __name__ == "__main__":
  sys.exit(main())
