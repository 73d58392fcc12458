"""What a finished run amounts to: `summary.json` and `curves.png`, made from its metrics files.

Run by the supervisor at the end; `python -m intellect3.summary RUN` does it for a run whose roles
were started one by one, that goes on, or that was broken off (`wall_seconds` is the trainer's).
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intellect3 import telemetry

REWARD_WINDOW = 20
"""Steps over which `reward_end` is averaged."""

MISMATCH_FLOOR = 1e-6
"""Least mismatch KL drawn: what is below, as on an on-policy step, is rounding."""

Rows = Sequence[Mapping[str, Any]]


def summarize(run_dir: pathlib.Path, wall_seconds: float) -> dict[str, Any]:
  """The run in figures.

  Args:
    run_dir: the run directory.
    wall_seconds: from the command's start, process starts and compilation included.

  Returns:
    The keys of `summary.json`. `reward_*` is the mean over all rollouts of a step, sampled at the
    training temperature on fresh tasks; `eval_*` is greedy on held-out tasks; `trainer_idle_share`
    is the share of the trainer's loop spent waiting for a batch, the first one not counted;
    `reprefilled_tokens_retracted` is None where no server tells it.
  """
  orchestrator = _rows(run_dir, "orchestrator")
  trainer = _rows(run_dir, "trainer")
  evaluation = _rows(run_dir, "evaluation")
  rewards = _column(orchestrator, "reward")
  collect = _column(orchestrator, "collect_seconds")
  steady = trainer[1:]
  waited = sum(_column(steady, "wait_seconds"))
  loop_seconds = sum(_column(steady, "loop_seconds"))
  trained_tokens = sum(_column(steady, "loss_tokens"))
  counts = _final_counts(run_dir, orchestrator)
  return {
    "steps": int(trainer[-1]["step"]) if trainer else 0,
    "reward_start": rewards[0] if rewards else None,
    "reward_end": _mean(rewards[-REWARD_WINDOW:]),
    "eval_start": evaluation[0].get("reward") if evaluation else None,
    "eval_end": evaluation[-1].get("reward") if evaluation else None,
    "eval_tasks": int(evaluation[-1]["tasks"]) if evaluation else 0,
    "wall_seconds": wall_seconds,
    "rl_seconds": sum(collect),
    **counts,
    "max_staleness": max(_column(orchestrator, "staleness_max"), default=None),
    "mean_staleness": _mean(_column(orchestrator, "staleness_mean")),
    "mean_mismatch_kl": _mean(_column(trainer, "mismatch_kl")),
    "mean_masked_share": _mean(_column(trainer, "masked_share")),
    "generated_tokens_per_second": _ratio(
      sum(_column(orchestrator, "sampled_tokens")), sum(collect)
    ),
    "trained_tokens_per_second": _ratio(trained_tokens, loop_seconds),
    "trainer_idle_share": _ratio(waited, loop_seconds),
    "mfu": _mean(_column(steady, "mfu")),
    "weight_sync_seconds_median": _median(_column(orchestrator, "weight_sync_seconds")),
    "weight_gather_seconds_per_gb": _median(_column(trainer, "weights/gather_seconds_per_gb")),
    "weight_write_seconds_per_gb": _median(_column(trainer, "weights/write_seconds_per_gb")),
    **{
      f"weight_{part}_seconds_per_gb": _median(
        _column(orchestrator, f"weight_sync/{part}_seconds_per_gb")
      )
      for part in ("load", "first_token")
    },
    "reprefilled_tokens_continued": int(sum(_column(orchestrator, "reprefilled_tokens/continued"))),
    "reprefilled_tokens_retracted": _sum(_column(orchestrator, "reprefilled_tokens/retracted")),
    "rollouts_spanning_versions": int(sum(_column(orchestrator, "rollouts_spanning_versions"))),
  }


def write(run_dir: pathlib.Path, wall_seconds: float) -> dict[str, Any]:
  """Writes `summary.json` and `curves.png` into the run directory; returns the summary."""
  summary = summarize(run_dir, wall_seconds)
  (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  draw_curves(run_dir, run_dir / "curves.png")
  return summary


def one_line(summary: Mapping[str, Any]) -> str:
  """The summary for the last line of a terminal."""
  return (
    f"{summary['steps']} steps in {summary['wall_seconds']:.0f} s: "
    f"reward {_show(summary['reward_start'])} -> {_show(summary['reward_end'])}, "
    f"held-out {_show(summary['eval_start'])} -> {_show(summary['eval_end'])}, "
    f"staleness {_show(summary['mean_staleness'])} (max {_show(summary['max_staleness'])}), "
    f"{_show(summary['generated_tokens_per_second'], 0)} tokens/s generated, "
    f"trainer idle {_show(summary['trainer_idle_share'])}"
  )


def draw_curves(run_dir: pathlib.Path, path: pathlib.Path) -> None:
  """Draws reward, mismatch KL and staleness over the steps of a run."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  orchestrator, trainer = _rows(run_dir, "orchestrator"), _rows(run_dir, "trainer")
  evaluation = _rows(run_dir, "evaluation")
  figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, constrained_layout=True)
  reward, mismatch, staleness = axes

  _line(reward, orchestrator, "reward", color="tab:blue", alpha=0.3, linewidth=1)
  steps, values = _series(orchestrator, "reward")
  if values:
    reward.plot(steps, _smooth(values), color="tab:blue", label="sampled, mean of 10 steps")
  points = [row for row in evaluation if "reward" in row]
  if points:
    reward.plot(
      [row["step"] for row in points],
      [row["reward"] for row in points],
      "o",
      color="tab:orange",
      clip_on=False,
      label="greedy, held-out tasks",
    )
  reward.set_ylabel("reward")
  reward.set_ylim(-0.02, 1.05)
  if values or points:
    reward.legend(loc="lower right")
  reward.set_title("Reward, and how far the policy that sampled was from the one that learned")

  steps, values = _series(trainer, "mismatch_kl")
  mismatch.plot(steps, [max(v, MISMATCH_FLOOR) for v in values], color="tab:red", linewidth=1)
  if values:
    mismatch.set_yscale("log")
    mismatch.set_ylim(bottom=MISMATCH_FLOOR / 2)
  mismatch.set_ylabel("mismatch KL (nats)")

  steps, values = _series(orchestrator, "staleness_mean")
  staleness.plot(steps, values, color="tab:green", alpha=0.25, linewidth=1, label="mean of a step")
  staleness.plot(steps, _smooth(values), color="tab:green", label="mean of 10 steps")
  steps, values = _series(orchestrator, "staleness_max")
  staleness.plot(steps, _smooth(values, reduce=max), color="0.4", ls=":", label="max of 10 steps")
  staleness.set_ylabel("staleness (steps)")
  staleness.set_ylim(bottom=-0.1)
  staleness.set_xlabel("training step")
  if orchestrator:
    staleness.legend(loc="lower right", ncols=3)
  for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _rows(run_dir: pathlib.Path, name: str) -> Rows:
  return telemetry.read_metrics(telemetry.metrics_path(run_dir, name))


def _final_counts(run_dir: pathlib.Path, orchestrator: Rows) -> dict[str, int]:
  keys = ("dispatched", "trained", "filtered", "stale", "cancelled", "errored", "in_flight")
  status = read_status(run_dir)
  if status.get("phase") == "done":
    source: Mapping[str, Any] = status["detail"]
  else:
    source = orchestrator[-1] if orchestrator else {}
  return {key: int(source.get(key, 0)) for key in keys}


def read_status(run_dir: pathlib.Path) -> Mapping[str, Any]:
  """The phase that the run is in, as the orchestrator last told; {} before it told any."""
  try:
    return json.loads((run_dir / "status.json").read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return {}


def write_status(run_dir: pathlib.Path, phase: str, detail: Mapping[str, Any]) -> None:
  """Tells the phase; the file appears whole."""
  temporary = run_dir / "status.json.tmp"
  temporary.write_text(json.dumps({"phase": phase, "detail": dict(detail)}))
  temporary.rename(run_dir / "status.json")


def _column(rows: Rows, key: str) -> list[float]:
  return [row[key] for row in rows if row.get(key) is not None]


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
  rows = [row for row in rows if row.get(key) is not None]
  return [row["step"] for row in rows], [row[key] for row in rows]


def _line(axis: Any, rows: Rows, key: str, **style: Any) -> None:
  axis.plot(*_series(rows, key), **style)


def _smooth(
  values: Sequence[float],
  window: int = 10,
  reduce: Callable[[Sequence[float]], float] = statistics.fmean,
) -> list[float]:
  """`reduce` over the last `window` values, at each."""
  return [reduce(values[max(0, index - window + 1) : index + 1]) for index in range(len(values))]


def _mean(values: Sequence[float]) -> float | None:
  return statistics.fmean(values) if values else None


def _sum(values: Sequence[float]) -> int | None:
  return int(sum(values)) if values else None


def _median(values: Sequence[float]) -> float | None:
  return statistics.median(values) if values else None


def _ratio(numerator: float, denominator: float) -> float | None:
  return numerator / denominator if denominator else None


def _show(value: float | None, digits: int = 2) -> str:
  return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
  """Writes the summary of a run whose roles were started one by one."""
  run_dir = pathlib.Path(sys.argv[1])
  loop_seconds = sum(_column(_rows(run_dir, "trainer"), "loop_seconds"))
  print(one_line(write(run_dir, loop_seconds)))


if __name__ == "__main__":
  main()
