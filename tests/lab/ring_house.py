"""What the tests of the ring's sweep share: a stand-in for a run, and sweeps of it."""

import dataclasses
import json
import pathlib
import sys

from intellect3.lab import ring

FAILS = "stand_in.fails"
"""A binding of the stand-in: the name of the run that breaks after its first evaluation."""

STAND_IN = """
import json, pathlib, sys
arguments = sys.argv[1:]
out = pathlib.Path(arguments[-1])
sets = dict(a.split("=", 1) for flag, a in zip(arguments, arguments[1:]) if flag == "--set")
steps, lag = int(sets["rl.run.steps"]), int(sets["orchestrator.orchestrator.weights_lag"])
loss, seed = pathlib.Path(arguments[1]).stem, int(sets["rl.run.seed"])
(out / "metrics").mkdir(parents=True)
(out / "arguments.json").write_text(json.dumps(arguments))

def write(name, rows):
  text = "".join(json.dumps(row) + "\\n" for row in rows)
  (out / "metrics" / f"{name}.jsonl").write_text(text)

write("evaluation", [{"step": 0, "reward": 0.25}])
if sets.get("stand_in.fails", "").strip("'") == out.name:
  sys.exit("Traceback ..\\nerror: it broke")
write("orchestrator", [{"step": n, "reward": n / steps} for n in range(1, steps + 1)])
write("trainer", [
  {"step": n, "token_staleness_mean": min(n - 1, lag), "mismatch_kl": 0.01 * lag,
   "masked_share": 0.02 * lag * (loss == "careful"), "sequence_masked_share": 0.0,
   "effective_sample_share": 1 / (1 + lag), "grad_norm": 1.0}
  for n in range(1, steps + 1)
])
final = 0.9 - 0.1 * lag / (2 if loss == "careful" else 1) + 0.02 * seed
write("evaluation", [{"step": 0, "reward": 0.25}, {"step": steps, "reward": final}])
"""


def final(loss: str, lag: int, seed: int) -> float:
  """What the stand-in reaches."""
  return 0.9 - 0.1 * lag / (2 if loss == "careful" else 1) + 0.02 * seed


def sweep(directory: pathlib.Path, *, losses, lags, seeds, steps) -> ring.Sweep:
  """A sweep whose runs are the stand-in's."""
  script = directory / "stand_in.py"
  script.write_text(STAND_IN)
  model = directory / "warm_up" / "model"
  model.mkdir(parents=True)
  (model / "config.json").touch()
  return ring.Sweep(
    run_files={loss: str(directory / f"{loss}.gin") for loss in losses},
    model=model,
    lags=lags,
    seeds=seeds,
    steps=steps,
    command=(sys.executable, str(script)),
  )


def record(directory: pathlib.Path) -> dict[str, object]:
  """Makes a small results file as a sweep does; returns the notebook's parameters that read it."""
  parameters = {"losses": ["reinforce", "clipped"], "lags": [0, 2], "seeds": [0, 1], "steps": 3}
  out = directory / "sweep"
  ring.sweep(sweep(directory, **parameters), out, progress=lambda line: None)
  return {"directory": str(out), **parameters}


def changed(todo: ring.Sweep, **fields) -> ring.Sweep:
  """A sweep with other fields."""
  return dataclasses.replace(todo, **fields)


def warm_up_command(directory: pathlib.Path) -> tuple[str, ...]:
  """Makes a model's directory and notes that it did."""
  code = f"""
import pathlib, sys
model = pathlib.Path(sys.argv[2]) / "model"
model.mkdir(parents=True)
(model / "config.json").touch()
with open({json.dumps(str(directory / "warm_ups"))}, "a") as file:
  file.write("made\\n")
"""
  return sys.executable, "-c", code
