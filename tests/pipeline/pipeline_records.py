"""Small RolloutLog records for the pipeline's tests."""

import numpy as np

from intellect3 import rollout_log, types
from intellect3.pipeline import packing


def record(number, length, *, step=1, prompt=2, seed=0):
  """A record of `length` tokens, the first `prompt` of them not sampled; all of it from a seed."""
  rng = np.random.default_rng((seed, step, number))
  sampled = np.arange(length) >= prompt
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
      tokens=rng.integers(1, 200, length, dtype=np.int32),
      loss_mask=sampled,
      inference_logprobs=np.where(sampled, -rng.random(length), 0.0).astype(np.float32),
      policy_versions=np.where(sampled, step - 1, types.NOT_SAMPLED).astype(np.int32),
      temperature=0.5 + 0.25 * (number % 3),
    ),
  )


def commit(log_dir, step, lengths, *, shards=2):
  """Writes and commits a step of the log; returns its manifest and its records."""
  records = [record(number, length, step=step) for number, length in enumerate(lengths)]
  directory = rollout_log.step_directory(log_dir, step)
  cuts = np.array_split(np.arange(len(records)), shards)
  entries = [
    rollout_log.write_shard(directory / f"worker_{index}.arrayrecord", [records[n] for n in cut])
    for index, cut in enumerate(cuts)
  ]
  manifest = types.Manifest(
    step=step,
    shards=entries,
    num_rollouts=len(records),
    num_groups=len({r.group_id for r in records}),
    loss_tokens=sum(sum(entry.loss_tokens) for entry in entries),
    oldest_version=step - 1,
    newest_version=step - 1,
    metrics={},
    scheduler_state={},
  )
  rollout_log.commit_manifest(log_dir, manifest)
  return manifest, records


def counts(records):
  """The global counts of a batch of these records, one by one."""
  trained = [int(r.trajectory.loss_mask.sum()) for r in records]
  components = {}
  for each in records:
    for key, tokens in each.component_tokens().items():
      components[key] = components.get(key, 0) + tokens
  return packing.Counts(sum(trained), sum(tokens > 0 for tokens in trained), components)
