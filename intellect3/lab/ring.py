"""Corrections x staleness in the real loop: a sweep of whole runs of the small model.

    python -m intellect3.lab.ring --out runs/off_policy_ring

Place in the ring: beside it. Every point is a run as a user starts one (`experiments.rl_run`, all
its processes), with a loss's run file and `orchestrator.weights_lag`, which keeps the servers that
many versions behind: with `max_off_policy_steps` equal to it each step after the first trains on
tokens of exactly that staleness. What came out is kept in OUT/results.json, point by point: a sweep
that was broken off goes on where it stopped, and one whose lists grew runs only what is new.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intellect3.lab import ring_results

RUN_FILES = "experiments/configs/runs"
LOSSES = ("reinforce", "masked_importance", "clipped", "cispo")
LAGS = (0, 4, 16)
SEEDS = (0, 1, 2)
STEPS = 100
RUN_COMMAND = (sys.executable, "-m", "experiments.rl_run")
WARM_UP_COMMAND = (
  sys.executable,
  "-m",
  "experiments.sft_run",
  "--gin",
  f"{RUN_FILES}/demo_sft.gin",
)

SETTINGS: Mapping[str, Any] = {
  "rl.run.num_workers": 0,
  "orchestrator.orchestrator.prompts_per_step": 32,
  "orchestrator.orchestrator.rollouts_per_prompt": 8,
  "orchestrator.orchestrator.max_rollouts_in_flight": 256,
  "orchestrator.orchestrator.evaluation_tasks": 256,
  "schedule.constant.learning_rate": 5e-4,
  "schedule.constant.warmup_steps": 10,
  "trainer.trainer.checkpoint_every": 1000,
}
"""Of every run: one batch in flight, and a learning rate at which staleness hurts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """Which runs to make; only `steps` and `settings` must stay the same while a sweep grows.

  Attributes:
    run_files: gin file of each loss, by the name it gets.
    model: Hugging Face directory that every run starts from, named `model`.
    lags: versions that servers are kept behind.
    seeds: of the runs.
    steps: of each run.
    settings: gin bindings of every run, over its file's.
    command: starts a run when `--gin`, `--set` and `--out` follow.
    warm_up: makes the model where it is not there, when `--out` and its parent follow.
  """

  run_files: Mapping[str, str]
  model: pathlib.Path
  lags: Sequence[int] = LAGS
  seeds: Sequence[int] = SEEDS
  steps: int = STEPS
  settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(SETTINGS))
  command: Sequence[str] = RUN_COMMAND
  warm_up: Sequence[str] = WARM_UP_COMMAND

  def __post_init__(self) -> None:
    for field in ("run_files", "lags", "seeds"):
      if not getattr(self, field):
        raise ValueError(f"{field}: expected at least one, got none")
    if self.steps < 1:
      raise ValueError(f"steps: expected at least 1, got {self.steps}")
    if self.model.name != "model":
      raise ValueError(f"model: expected a directory named model, got {self.model}")
    if any(lag < 0 for lag in self.lags):
      raise ValueError(f"lags: expected none below 0, got {list(self.lags)}")

  @property
  def points(self) -> list[tuple[str, int, int]]:
    """(loss, lag, seed) of every run; a seed is finished before the next begins."""
    return [
      (loss, lag, seed)
      for seed, lag, loss in itertools.product(self.seeds, self.lags, self.run_files)
    ]

  def arguments(self, loss: str, lag: int, seed: int, run_dir: pathlib.Path) -> list[str]:
    """The command line of one run."""
    bindings = {
      **self.settings,
      "rl.run.model_path": str(self.model),
      "rl.run.steps": self.steps,
      "rl.run.seed": seed,
      "rl.run.max_off_policy_steps": lag,
      "orchestrator.orchestrator.weights_lag": lag,
    }
    sets = [part for name, value in bindings.items() for part in ("--set", f"{name}={value!r}")]
    return [*self.command, "--gin", self.run_files[loss], *sets, "--out", str(run_dir)]


def standard(out: pathlib.Path, **chosen: Any) -> Sweep:
  """The sweep of the command and of the notebook.

  Args:
    out: where its warmed-up model stands, or will.
    chosen: `losses`, names of files in `experiments/configs/runs/losses/`; and any other field of
      `Sweep`.
  """
  losses = chosen.pop("losses", LOSSES)
  files = {loss: f"{RUN_FILES}/losses/{loss}.gin" for loss in losses}
  return Sweep(run_files=files, model=out / "warm_up" / "model", **chosen)


def sweep(
  todo: Sweep, out: pathlib.Path, *, progress: Callable[[str], None] = print
) -> ring_results.Results:
  """Makes the runs that OUT/results.json does not hold yet.

  A run that fails is a point too, with its reason; it is not tried again unless its entry is taken
  out of the file. A run that was broken off with the sweep is made anew.

  Args:
    todo: which runs.
    out: results go to `results.json`, each run's own directory under `runs/`.
    progress: is told a line per run.

  Raises:
    ValueError: the file there is of other settings, or a run does not even start.
    RuntimeError: the warmed-up model could not be made.
    KeyboardInterrupt: the sweep was broken off; what is finished is kept.
  """
  path = out / "results.json"
  common = json.loads(json.dumps({"steps": todo.steps, **todo.settings}))
  told = (
    ring_results.read(path)
    if path.exists()
    else ring_results.Results(settings=common, made_on=_made_on(), results=[])
  )
  if told.settings != common:
    raise ValueError(f"{path}: settings: expected {common}, got {told.settings}")
  done = {result.key for result in told.results}
  points = todo.points
  missing = [point for point in points if point not in done]
  progress(f"{len(points)} runs of {todo.steps} steps, {len(missing)} to make, in {out}")
  if missing:
    _warm_up(todo)
  for number, (loss, lag, seed) in enumerate(missing, start=1):
    result = _run(todo, out / "runs" / f"{loss}_lag{lag}_seed{seed}", loss, lag, seed)
    told = dataclasses.replace(told, results=[*told.results, result])
    ring_results.write(path, told)
    progress(f"{number}/{len(missing)}  {_line(result)}")
  return told


def _warm_up(todo: Sweep) -> None:
  """Makes the model that every run starts from, as the demo does, where it is not there."""
  if (todo.model / "config.json").exists():
    return
  out = todo.model.parent
  shutil.rmtree(out, ignore_errors=True)
  ended = subprocess.run([*todo.warm_up, "--out", str(out)], capture_output=True, text=True)
  if ended.returncode:
    raise RuntimeError(f"the warm-up ended with {ended.returncode}: {_last(ended.stderr)}")


def _run(todo: Sweep, run_dir: pathlib.Path, loss: str, lag: int, seed: int) -> ring_results.Result:
  shutil.rmtree(run_dir, ignore_errors=True)  # of a sweep that was broken off
  started = time.monotonic()
  ended = subprocess.run(
    todo.arguments(loss, lag, seed, run_dir),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  error = _last(ended.stderr) if ended.returncode else None
  if error is not None and not run_dir.exists():  # a configuration that does not fit fits no run
    raise ValueError(f"{loss}, lag {lag}, seed {seed} did not start: {error}")
  return ring_results.gather(
    run_dir,
    loss=loss,
    lag=lag,
    seed=seed,
    error=error,
    seconds=time.monotonic() - started,
  )


def _last(text: str) -> str:
  lines = text.strip().splitlines()
  return lines[-1] if lines else "no reason told"


def _line(result: ring_results.Result) -> str:
  name = f"{result.loss:<20} lag {result.lag:<3} seed {result.seed:<3} {result.seconds:4.0f} s  "
  if result.error is not None:
    return name + f"failed: {result.error}"
  return name + f"held-out {result.eval_start} -> {result.eval_end}"


def _made_on() -> dict[str, Any]:
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "machine": platform.processor() or platform.machine(),
    "cpus": os.cpu_count(),
    "jax": importlib.metadata.version("jax"),
    "python": platform.python_version(),
  }


def main(argv: Sequence[str] | None = None) -> int:
  """The command; see the module's docstring."""
  parser = argparse.ArgumentParser(prog="python -m intellect3.lab.ring", description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument("--losses", nargs="+", default=list(LOSSES), metavar="NAME")
  parser.add_argument("--lags", nargs="+", type=int, default=list(LAGS), metavar="N")
  parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
  parser.add_argument("--steps", type=int, default=STEPS)
  arguments = parser.parse_args(argv)
  todo = standard(
    arguments.out,
    losses=arguments.losses,
    lags=arguments.lags,
    seeds=arguments.seeds,
    steps=arguments.steps,
  )
  told = sweep(todo, arguments.out, progress=lambda line: print(line, flush=True))
  return 1 if ring_results.failures(told.results) else 0


if __name__ == "__main__":
  sys.exit(main())
