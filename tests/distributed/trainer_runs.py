"""A trainer by itself on a RolloutLog that is there already: it is a function of both."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import safetensors.numpy

from intellect3 import rollout_log, types
from intellect3.distributed import cluster
from intellect3.models import hf, presets, transformer
from intellect3.rl import checks
from intellect3.weights import manifest

STEPS = 4
ROW_LENGTH = 32
LENGTHS = (5, 9, 31, 7, 13, 24, 12, 8, 30, 17)

SETTINGS = {
  "rl.run.steps": STEPS,
  "rl.run.num_workers": 0,
  "rl.run.orchestrator_port": 9,  # nobody is there: the log's directory is enough
  "rl.run.server_port": 10,
  "orchestrator.orchestrator.prompts_per_step": 5,
  "orchestrator.orchestrator.rollouts_per_prompt": 2,
  "trainer.trainer.row_length": ROW_LENGTH,
  "trainer.trainer.micro_rows": 4,
  "trainer.trainer.row_counts": (8,),
  "trainer.trainer.checkpoint_every": 2,
  "trainer.trainer.weights_shard_bytes": 20_000,
  "schedule.constant.warmup_steps": 1,
  "optimizer.adamw.eps": 1e-4,  # else Adam makes steps of the noise in gradients that are zero
}


def make_model(directory):
  """A model of random weights."""
  config = presets.tiny()
  hf.save(directory, config, transformer.init(config, jax.random.key(0)))
  return directory


def write_log(log_dir, steps=STEPS):
  """Commits the batches of steps 1 to `steps`, every number from a seed."""
  for step in range(1, steps + 1):
    records = [_record(number, length, step) for number, length in enumerate(LENGTHS)]
    directory = rollout_log.step_directory(log_dir, step)
    entries = [
      rollout_log.write_shard(directory / f"worker_{index}.arrayrecord", records[index::2])
      for index in range(2)
    ]
    rollout_log.commit_manifest(
      log_dir,
      types.Manifest(
        step=step,
        shards=entries,
        num_rollouts=len(records),
        num_groups=len(records) // 2,
        loss_tokens=sum(sum(entry.loss_tokens) for entry in entries),
        oldest_version=step - 1,
        newest_version=step - 1,
        metrics={},
        scheduler_state={},
      ),
    )


def _record(number, length, step):
  rng = np.random.default_rng((step, number))
  sampled = np.arange(length) >= 2
  return types.TrajectoryRecord(
    step=step,
    rollout_id=number,
    group_id=number // 2,
    branch=0,
    task_id=f"t/{number // 2}",
    environment="t",
    reward=float(number % 2),
    advantage=float(rng.normal()),
    trajectory=types.Trajectory(
      tokens=rng.integers(1, 250, length, dtype=np.int32),
      loss_mask=sampled,
      inference_logprobs=np.where(sampled, -4.0 - rng.random(length), 0.0).astype(np.float32),
      policy_versions=np.where(sampled, step - 1, types.NOT_SAMPLED).astype(np.int32),
      temperature=1.0,
    ),
  )


def start(out, model, settings, *, processes, devices, environment=None, resume=False):
  """Starts a trainer of so many processes, each of so many fake devices; they log into `out`."""
  bindings = {**SETTINGS, "rl.run.model_path": str(model), **settings}
  command = [sys.executable, "-m", "experiments.rl_run", "--role", "trainer", "--out", str(out)]
  command += ["--gin", "experiments/configs/runs/demo.gin", *(["--resume"] if resume else [])]
  command += [part for key, value in bindings.items() for part in ("--set", f"{key}={value!r}")]
  (port,) = checks.free_ports("127.0.0.1", 1)
  flags = os.environ.get("XLA_FLAGS", "")
  started = []
  for index in range(processes):
    own = cluster.variables(f"127.0.0.1:{port}", processes, index) if processes > 1 else {}
    own["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    log = pathlib.Path(out).with_name(f"{pathlib.Path(out).name}_{index}.log")
    with log.open("ab") as file:
      started.append(
        subprocess.Popen(
          command,
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=subprocess.STDOUT,
          env={**os.environ, **own, **(environment or {})},
        )
      )
  return started


def finish(started, seconds=500):
  """Waits for all; gives their exit codes. Whoever is left then is killed."""
  deadline = time.monotonic() + seconds
  try:
    return [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
  finally:
    for process in started:
      process.kill()
      process.wait()


def logs(out):
  """What each process of a trainer wrote, in their order."""
  return [path.read_text() for path in sorted(out.parent.glob(f"{out.name}_[0-9].log"))]


def run(out, model, settings, *, processes, devices, **options):
  """A trainer from start to end, which must be a good one."""
  codes = finish(start(out, model, settings, processes=processes, devices=devices, **options))
  assert codes == [0] * processes, "\n".join(text[-3000:] for text in logs(out))


def weights(out, version):
  """The tensors of a published version, its files checked against its manifest."""
  directory = manifest.version_directory(out / "weights", version)
  assert manifest.verify(directory) == []
  return {
    name: tensor
    for path in sorted(directory.glob("*.safetensors"))
    for name, tensor in safetensors.numpy.load_file(path).items()
  }


def largest_difference(left, right):
  """Of two sets of tensors, relative to each tensor's largest entry."""
  assert left.keys() == right.keys()
  return max(
    float(np.max(np.abs(left[name] - right[name])) / max(np.max(np.abs(right[name])), 1e-30))
    for name in left
  )
