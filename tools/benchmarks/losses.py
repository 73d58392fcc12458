"""Time and temporary memory of every loss with its gradient, as a ratio to plain REINFORCE.

    python -m tools.benchmarks.losses --json build/losses.json

Packed rows as the trainer has them: prompts and padding without loss, some twenty trajectories a
row, the batch's global counts given. Each case is one jitted value-and-gradient with respect to the
logprobs, metrics included. All take turns, in each turn in another order, and a case's ratio is
taken within its turn, so that whatever else the machine does falls on both. Temporaries are what
the compiled program allocates beside its arguments and results.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.losses import aggregation, components, kl, policy_gradient, supervised

BASELINE = "reinforce"
LIMIT = 3.0
"""Ratio of times above which a loss is too dear."""

PROMPT_SHARE = 0.2
DRIFT = 0.1
"""Standard deviation of the log ratios, in nats."""


class Inputs(NamedTuple):
  """A batch, every array [B, T], and its counts."""

  logprobs: jax.Array
  inference_logprobs: jax.Array
  advantages: jax.Array
  loss_mask: jax.Array
  segment_ids: jax.Array
  old_logprobs: jax.Array
  ref_logprobs: jax.Array
  weights: jax.Array
  denominator: jax.Array
  num_sequences: jax.Array
  component_denominators: components.Denominators


Case = Callable[[Inputs], tuple[jax.Array, Mapping[str, jax.Array]]]


def make_inputs(rows: int, length: int, segments: int, seed: int) -> Inputs:
  """Random packed rows; the last segment of each is padding.

  Args:
    rows: B.
    length: T.
    segments: trajectories a row.
    seed: of everything random.
  """
  random = np.random.default_rng(seed)
  segment_ids = np.zeros((rows, length), np.int32)
  mask = np.zeros((rows, length), np.bool_)
  advantages = np.zeros((rows, length), np.float32)
  for row in range(rows):
    ends = np.sort(random.choice(np.arange(1, length), segments, replace=False))
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
      span = (row, slice(start, end))
      segment_ids[span] = number
      mask[row, start + 1 + int(PROMPT_SHARE * (end - start)) : end] = True
      advantages[span] = random.normal()
  counts = [np.unique(segment_ids[row][mask[row]]).size for row in range(rows)]

  def near(logprobs: np.ndarray) -> np.ndarray:
    return np.minimum(logprobs + random.normal(0, DRIFT, logprobs.shape), 0).astype(np.float32)

  logprobs = -random.exponential(0.5, (rows, length)).astype(np.float32)
  weights = random.choice([0.0, 0.1, 1.0], (rows, length)).astype(np.float32)
  in_term = weights != 0
  arrays = (
    logprobs,
    near(logprobs),
    advantages,
    mask,
    segment_ids,
    near(logprobs),
    near(logprobs),
    weights,
    np.float32(mask.sum()),
    np.float32(sum(counts)),
    components.Denominators(
      np.float32((mask & in_term).sum()),
      np.float32(in_term.sum()),
      np.float32((mask & in_term).sum()),
    ),
  )
  return Inputs(*jax.tree.map(jnp.asarray, arrays))


def cases() -> dict[str, Case]:
  """What is measured, by name; a loss with its defaults where nothing else is said."""
  pg = policy_gradient
  constant = functools.partial(aggregation.constant, divisor=1e6)
  every_term = {"rl_coefficient": 1.0, "ce_coefficient": 0.1, "ref_kl_coefficient": 0.1}
  return {
    BASELINE: _loss(pg.reinforce_loss),
    "masked_importance": _loss(pg.masked_importance_loss),
    "truncated_importance": _loss(pg.truncated_importance_loss),
    "truncated_importance, old_logprobs": _loss(pg.truncated_importance_loss, "old_logprobs"),
    "clipped": _loss(pg.clipped_loss),
    "clipped, dual_clip": _loss(pg.clipped_loss, dual_clip=3.0),
    "clipped, old_logprobs": _loss(pg.clipped_loss, "old_logprobs", behaviour_ratio_max=2.0),
    "sequence_ratio": _loss(pg.sequence_ratio_loss),
    "sequence_ratio, token_level": _loss(pg.sequence_ratio_loss, token_level=True),
    "cispo": _loss(pg.cispo_loss),
    "probability_difference": _loss(pg.probability_difference_loss),
    "geometric_masked": _loss(pg.geometric_masked_loss),
    "geometric_masked, ratio_max": _loss(pg.geometric_masked_loss, ratio_max=2.0),
    "reverse_kl": _loss(kl.reverse_kl_loss, "ref_logprobs"),
    "penalty": _loss(kl.penalty_loss, "ref_logprobs"),
    "negative_log_likelihood": _nll,
    "reinforce, sequence_mean": _loss(pg.reinforce_loss, aggregate=aggregation.sequence_mean),
    "reinforce, constant": _loss(pg.reinforce_loss, aggregate=constant),
    "weighted_sum: rl alone": _loss(components.weighted_sum_loss),
    "weighted_sum: rl + ce + ref_kl": _loss(
      components.weighted_sum_loss, "ref_logprobs", **every_term
    ),
    "weighted_sum: the same, weights": _loss(
      components.weighted_sum_loss, "ref_logprobs", "weights", **every_term
    ),
  }


def _loss(function: Callable[..., Any], *needs: str, **hyperparameters: Any) -> Case:
  def case(inputs: Inputs) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    given = {name: getattr(inputs, name) for name in needs if name != "weights"}
    if "weights" in needs:
      given |= dict.fromkeys(("rl_weights", "ce_weights", "ref_kl_weights"), inputs.weights)
      given["component_denominators"] = inputs.component_denominators
    return function(
      inputs.logprobs,
      inputs.inference_logprobs,
      inputs.advantages,
      inputs.loss_mask,
      segment_ids=inputs.segment_ids,
      denominator=inputs.denominator,
      num_sequences=inputs.num_sequences,
      **given,
      **hyperparameters,
    )

  return case


def _nll(inputs: Inputs) -> tuple[jax.Array, Mapping[str, jax.Array]]:
  return supervised.negative_log_likelihood(
    inputs.logprobs,
    inputs.loss_mask,
    segment_ids=inputs.segment_ids,
    denominator=inputs.denominator,
  )


def compiled(case: Case, inputs: Inputs) -> Any:
  """The compiled value-and-gradient of a case with respect to the logprobs."""

  def both(logprobs: jax.Array, rest: Inputs) -> Any:
    return jax.value_and_grad(lambda x: case(rest._replace(logprobs=x)), has_aux=True)(logprobs)

  return jax.jit(both).lower(inputs.logprobs, inputs).compile()


def measure(todo: Mapping[str, Case], inputs: Inputs, turns: int) -> dict[str, dict[str, float]]:
  """Seconds and temporaries of each case, and their ratios to the baseline's.

  Args:
    todo: cases by name, `BASELINE` among them.
    inputs: of all of them.
    turns: timed calls of each.

  Returns:
    By name: `seconds` (median of the turns), `ratio` (median over turns of the ratio within a
    turn), `ratio_low` and `ratio_high` (its quartiles), `fastest_ratio` (of the fastest turns,
    which a busy machine disturbs least), `temporaries_bytes`, `temporaries_ratio`.

  Raises:
    ValueError: the baseline is missing, or there are less than two turns.
    RuntimeError: a loss or gradient is not finite.
  """
  if BASELINE not in todo:
    raise ValueError(f"todo: expected {BASELINE!r} among the cases, got {list(todo)}")
  if turns < 2:
    raise ValueError(f"turns: expected at least 2, got {turns}")
  programs = {name: compiled(case, inputs) for name, case in todo.items()}
  for name, program in programs.items():
    (value, _), gradient = program(inputs.logprobs, inputs)
    if not (np.isfinite(value) and np.isfinite(gradient).all()):
      raise RuntimeError(f"{name}: expected a finite loss and gradient, got {float(value)}")
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  names = list(programs)
  for turn in range(turns):
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
      started = time.perf_counter()
      jax.block_until_ready(programs[name](inputs.logprobs, inputs))
      seconds[name].append(time.perf_counter() - started)
  temporaries = {
    name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
  }
  return {
    name: {
      "seconds": statistics.median(seconds[name]),
      **_ratio(seconds[name], seconds[BASELINE]),
      "fastest_ratio": min(seconds[name]) / min(seconds[BASELINE]),
      "temporaries_bytes": float(temporaries[name]),
      "temporaries_ratio": temporaries[name] / max(temporaries[BASELINE], 1),
    }
    for name in programs
  }


def _ratio(seconds: list[float], baseline: list[float]) -> dict[str, float]:
  ratios = [mine / theirs for mine, theirs in zip(seconds, baseline, strict=True)]
  low, middle, high = statistics.quantiles(ratios, n=4)
  return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
  """The figures as Markdown, the baseline first."""
  names = ("ms", f"/ {BASELINE}", "quartiles", "fastest turns", "temporaries MiB", f"/ {BASELINE}")
  lines = [
    f"| loss with its gradient | {' | '.join(names)} |",
    f"|---{'|---:' * len(names)}|",
  ]
  for name, f in figures.items():
    numbers = [
      f"{f['seconds'] * 1e3:.1f}",
      f"{f['ratio']:.2f}",
      f"{f['ratio_low']:.2f} to {f['ratio_high']:.2f}",
      f"{f['fastest_ratio']:.2f}",
      f"{f['temporaries_bytes'] / 2**20:.1f}",
      f"{f['temporaries_ratio']:.2f}",
    ]
    lines.append(f"| {' | '.join([name, *numbers])} |")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  """The command: 1 where a loss takes more than `LIMIT` times as long as the baseline."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=65_536)
  parser.add_argument("--segments", type=int, default=20, help="trajectories a row")
  parser.add_argument("--turns", type=int, default=21)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
  arguments = parser.parse_args(argv)
  inputs = make_inputs(arguments.rows, arguments.length, arguments.segments, arguments.seed)
  figures = measure(cases(), inputs, arguments.turns)
  print(table(figures))
  if arguments.json is not None:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    said = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "machine": platform.processor() or platform.machine(),
      "device": jax.devices()[0].device_kind,
      "jax": importlib.metadata.version("jax"),
      "baseline": BASELINE,
      "limit": LIMIT,
      **{name: getattr(arguments, name) for name in ("rows", "length", "segments", "turns")},
      "seed": arguments.seed,
      "figures": figures,
    }
    arguments.json.write_text(json.dumps(said, indent=1) + "\n")
  dear = [name for name, f in figures.items() if f["ratio"] > LIMIT]
  if dear:
    print(f"above {LIMIT:g} times {BASELINE}: {', '.join(dear)}", file=sys.stderr)
  return 1 if dear else 0


if __name__ == "__main__":
  sys.exit(main())
